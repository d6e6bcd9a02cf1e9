// The id of this window, by which the server keeps its place: the same after a reload, another in every other window.

const PLACE = "browser";
const PATIENCE = 150; // milliseconds in which another window of the same id says so

/** Return the id of this window. */
export async function browserId() {
  const kept = sessionStorage.getItem(PLACE);
  const id = kept && !(await isTaken(kept)) ? kept : fresh();
  sessionStorage.setItem(PLACE, id);
  const channel = new BroadcastChannel(PLACE);
  channel.addEventListener("message", ({ data }) => { if (data.asked === id) channel.postMessage({ taken: id }); });
  return id;
}

/** A window that is duplicated gets a copy of what the first one keeps: ask whether another window has this id. */
function isTaken(id) {
  const channel = new BroadcastChannel(PLACE);
  return new Promise((resolve) => {
    const end = (taken) => {
      channel.close();
      resolve(taken);
    };
    channel.addEventListener("message", ({ data }) => { if (data.taken === id) end(true); });
    channel.postMessage({ asked: id });
    setTimeout(() => end(false), PATIENCE);
  });
}

const fresh = () => Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
