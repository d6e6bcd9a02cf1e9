// Many rows, few requests at a time: waits where the server is overloaded or away, and goes on after a row that fails.

const AT_A_TIME = 4; // requests; browsers open six connections to one server, and the page needs some itself
const MOST_TRIES = 8; // of one row
const LONGEST_WAIT = 30; // seconds
const PASSING = new Set(["busy", "loading", "draining", "offline"]); // kinds of refusals that may pass

/**
 * Score rows in their order.
 * @param {object[]} rows each gets `result`, or `error` in words
 * @param {object} how
 * @param {(row: object, signal: AbortSignal) => Promise<object>} how.send asks the server about one row
 * @param {(error: Error) => string} how.words says in words what went wrong with a row
 * @param {() => void} how.changed called after each row
 * @param {(seconds: number, kind: string) => void} how.waiting called when all wait, and with 0 when they go on
 * @param {AbortSignal} how.signal ends it; rows that are not done stay as they are
 * @throws the refusal that no waiting helps against: a key is needed, or the server failed
 */
export async function score(rows, { send, words, changed, waiting, signal }) {
  const waits = rows.filter(isWaiting);
  const own = new AbortController();
  const ended = AbortSignal.any([signal, own.signal]);
  let next = 0;
  let resume = 0; // when requests may be sent again
  let overloads = 0; // in a row
  let refused = null;

  async function lane() {
    while (next < waits.length && !ended.aborted) {
      const row = waits[next];
      next += 1;
      for (let tries = 1; !ended.aborted; tries += 1) {
        try {
          await until(() => resume, ended);
          row.result = await send(row, ended);
          if (performance.now() >= resume) { // else it was sent before another one was refused
            overloads = 0;
            waiting(0, "");
          }
          break;
        } catch (error) {
          if (ended.aborted) return;
          if (error.kind === "key" || error.kind === "failed") {
            refused = error;
            own.abort();
            return;
          }
          if (!PASSING.has(error.kind) || tries >= MOST_TRIES) {
            row.error = words(error);
            break;
          }
          if (performance.now() >= resume) { // else another lane has seen the same moment
            overloads += 1;
            const seconds = Math.min(LONGEST_WAIT, Math.max(error.retryAfter || 0, 2 ** (overloads - 1)));
            resume = performance.now() + 1000 * seconds;
            waiting(seconds, error.kind);
          }
        }
      }
      if (row.result || row.error) changed();
    }
  }

  await Promise.all(Array.from({ length: AT_A_TIME }, lane));
  if (refused) throw refused;
}

/** Whether a row can be scored and is not yet. */
export const isWaiting = (row) => !row.result && !row.error && !row.problem;

/** Wait until a moment that may be moved meanwhile, or until the end. */
async function until(moment, signal) {
  while (performance.now() < moment() && !signal.aborted) {
    await new Promise((resolve) => { setTimeout(resolve, Math.min(250, Math.max(1, moment() - performance.now()))); });
  }
  signal.throwIfAborted();
}
