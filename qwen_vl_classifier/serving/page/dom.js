// Making and finding elements. Whatever comes from outside becomes a text node or a property, never markup.

export const find = (id) => document.getElementById(id);

/** Make an element: properties by name, `data-`, `aria-` and `role` as attributes, children as elements or text. */
export function make(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (/^(data-|aria-|role$|for$|scope$)/.test(name)) made.setAttribute(name, value);
    else if (name === "on") for (const [event, listener] of Object.entries(value)) made.addEventListener(event, listener);
    else made[name] = value;
  }
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return made;
}

/** Wrap a name that may be written in any direction, so that it disturbs nothing around it. */
export const named = (name, className = "") => make("bdi", { className }, name);

/** Say something to those who do not see the page. */
export function announce(words) {
  find("announcer").textContent = "";
  // In a later task, or the same words twice would be no change and would not be read.
  setTimeout(() => { find("announcer").textContent = words; }, 50);
}

/** Show a message with buttons in a box, or hide the box where there is no message. */
export function tell(box, message, ...buttons) {
  box.replaceChildren();
  box.hidden = !message;
  if (message) box.append(make("p", {}, message), ...buttons);
}

/** Hand out a file. */
export function download(name, content, type) {
  const address = URL.createObjectURL(new Blob([content], { type }));
  make("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

export const button = (words, press, properties = {}) =>
  make("button", { type: "button", textContent: words, on: { click: press }, ...properties });

/** Put the text of an element on the clipboard; where a browser forbids it, mark it, so that one key copies it. */
export async function copyText(source, pressed, { copied, copyFailed }) {
  const words = pressed.textContent;
  try {
    await navigator.clipboard.writeText(source.textContent);
    pressed.textContent = copied;
  } catch {
    getSelection().selectAllChildren(source);
    pressed.textContent = copyFailed;
  }
  announce(pressed.textContent);
  setTimeout(() => { pressed.textContent = words; }, 2000);
}
