// Keys that answer. They work wherever the focus is, but in fields, and leave alone whatever is pressed with Ctrl, Alt or Meta.

const DIGIT = /^(?:Digit|Numpad)([0-9])$/;

/**
 * Watch the keyboard.
 * @param {(key: string) => boolean} press called once for each press, not for repetitions; returns whether the key means something
 */
export function watchKeys(press) {
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.isComposing || event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.target instanceof Element && event.target.closest("input, textarea, select, [contenteditable]")) return;
    if (event.repeat ? isAnswer(event) : press(keyOf(event))) event.preventDefault();
  });
}

/** A key that is held down must neither answer again nor scroll. */
const isAnswer = (event) => /^(?:[0-9]|ArrowLeft|ArrowRight)$/.test(keyOf(event));

/** The key by what it writes; a digit also by its place, for keyboards where digits need Shift. */
function keyOf({ key, code, shiftKey }) {
  const digit = DIGIT.exec(code);
  if (digit && !shiftKey && !/^[\d/?]$/.test(key)) return digit[1];
  return key.length === 1 ? key.toLowerCase() : key;
}
