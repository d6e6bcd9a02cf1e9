// Everything that the page says at run time, in one place.

import { counted, signed } from "./numbers.js";

export { counted, signed };

export const size = (bytes) => {
  const [unit, name] = bytes < 1e6 ? [1e3, "kB"] : [1e6, "MB"];
  // Rounded up: what is a little too large must not look as if it fitted.
  return `${(Math.ceil(10 * bytes / unit) / 10).toLocaleString("en")} ${name}`;
};

/** Write a probability so that it stays on its side of the others: 0.4998 is not 0.500 beside a threshold of 0.5. */
export function probability(value, ...others) {
  for (let digits = 3; digits < 7; digits += 1) {
    const written = value.toFixed(digits);
    const told = others.every((other) => other === value || other.toFixed(digits) !== written);
    if (told && digits === 3 && value < 1 && Number(written) === 1) return "> 0.999";
    if (told && digits === 3 && value > 0 && Number(written) === 0) return "< 0.001";
    if (told) return written;
  }
  return String(value);
}

/** Name a class as its classifier does; bare numbers get the word before them. */
export const className = (name) => (/^\d+$/.test(name) ? `class ${name}` : name);

export const decisions = { yes: "Yes", no: "No", abstain: "Undecided" };

export const state = {
  ready: (classifiers, panels) => `Ready: ${[classifiers || !panels ? counted(classifiers, "classifier", "classifiers") : "", panels ? counted(panels, "panel", "panels") : ""].filter(Boolean).join(", ")}`,
  loading: "Loading",
  draining: "Shutting down",
  failed: "Failed",
  offline: "Not reachable",
  key: "Key needed",
};

export const notice = {
  loading: "The server is loading its classifiers. This page continues by itself as soon as they are ready.",
  draining: "The server is shutting down. It finishes the requests that it has accepted and takes no new ones. This page tries again from time to time.",
  failed: "The server could not load its classifiers; its log says why.",
  offline: "The server cannot be reached. It may have stopped, or the network is down. This page tries again from time to time.",
  key: "The server asks for a key. Reload the page: the browser then asks for a name, which may be anything, and a password, which is the key.",
};

export const problem = {
  busy: (seconds) => `The server is overloaded (429)${seconds ? ` and asks to wait ${counted(seconds, "second", "seconds")}` : ""}. Nothing is lost: try again.`,
  late: "The server did not answer in time. It may be busy: try again.",
  offline: "The server cannot be reached. Nothing is lost: try again when it is back.",
  refused: (status, detail) => `The server refused the request (${status}): ${detail}`,
  failed: (status) => `The server answered with an error (${status}). Its log may say why.`,
  strange: "This page does not understand the answer. Is another program answering at this address?",
  unreadable: (name) => `The file ${name} can no longer be read. Remove it and choose it again.`,
};

export const actions = {
  again: "Try again",
  reload: "Reload",
  remove: (name) => `Remove ${name}`,
  earlier: (name) => `Move ${name} one place forward`,
  explain: "Explain this answer",
  unexplain: "Hide the explanation",
  save: "Save as a picture",
  copied: "Copied",
  copyFailed: "Selected; copy it with your keyboard",
};

const MOST_NAMES = 5; // of labels in a line

const firstOf = (names) => names.slice(0, MOST_NAMES).join(", ") + (names.length > MOST_NAMES ? ` and ${names.length - MOST_NAMES} more` : "");

export const panels = {
  count: (found, all) => `${found || "None"} of ${counted(all, "label", "labels")} ${found > 1 ? "apply" : "applies"}`,
  found: (yes, undecided, all) =>
    [yes.length ? firstOf(yes) : `none of ${counted(all, "label", "labels")}`, undecided.length ? `undecided: ${firstOf(undecided)}` : ""].filter(Boolean).join("; "),
  chosen: (name, value) => `${name}, ${value}`,
  probability: "Probability",
  more: (count) => `Show ${count.toLocaleString("en")} more`,
  labels: (names, count) => `${counted(count, "label", "labels")}, each answered for itself: ${names}`,
  classes: (names, count) => `one of ${counted(count, "class", "classes")}: ${names}`,
  others: (count) => ` and ${count.toLocaleString("en")} more`,
};

export const models = {
  yes: "yes = ",
  no: ", no = ",
  version: (digest) => `version ${digest}`,
  threshold: (threshold, band) => `“Yes” from ${threshold} on${band ? `; undecided from ${band[0]} to ${band[1]}` : ""}.`,
  all: (count) => `All ${count}, compared`,
};

export const warnings = {
  format: (name) => `${name} is not a JPEG, PNG or WebP file; the server accepts no others.`,
  bytes: (name, bytes, limit) => `${name} has ${size(bytes)}; the server accepts at most ${size(limit)} for one picture. Choose a smaller file: this page does not shrink it, so that results equal those of programs.`,
  count: (number, most) => `These are ${number} pictures; an example may have at most ${most}. Remove some, or classify each by itself.`,
  total: (bytes, limit) => `Together this is about ${size(bytes)} to send; the server accepts at most ${size(limit)}. Remove a picture.`,
  noFiles: "Only files can be dropped here. Save the picture first, then choose or drop the file.",
  blank: "Type the text that goes with the example.",
  length: (count, limit) => `${counted(count, "character", "characters")}; the server accepts at most ${limit.toLocaleString("en")}.`,
  blocked: "The request was not sent, since the server would refuse it: see the notes beside the example.",
};

export const pictures = {
  none: "No preview",
  added: (count) => `${counted(count, "picture", "pictures")} added.`,
  removed: (name) => `${name} removed.`,
  moved: (name, place) => `${name} is now number ${place}.`,
};

export const question = {
  words: (count) => `${count} pictures: one example that has all of them, or ${count} examples?`,
  tooMany: (count, most) => `${count} pictures: one example may have at most ${most}. Are these ${count} examples?`,
  one: (count) => `One example with ${count} pictures`,
  several: (count) => `${count} examples`,
  neither: "Cancel",
};

export const examples = {
  try: (number, text) => `Try example ${number}: ${text}`,
};

export const threshold = {
  label: "Threshold to try",
  back: (own) => `Back to ${own}`,
  own: "This is the classifier’s own threshold.",
  tried: (decision, label) => `At this threshold the answer would be ${decision}, ${label}. The server keeps its own.`,
  title: "Try another threshold",
};

export const corrections = {
  mark: (decision) => (decision === "abstain" ? "It is " : "Wrong: it is "),
  marked: "Marked: it is ",
  count: (number) => `${counted(number, "correction", "corrections")} collected`,
};

export const results = {
  probabilityOf: "Probability of ",
  threshold: (value) => `threshold ${value}`,
  rule: (threshold, band) =>
    `“Yes” begins at the threshold, ${threshold}.${band ? ` From ${band[0]} to ${band[1]} the classifier abstains.` : ""}`,
  scale: (value, threshold, band) =>
    `Probability ${value} on a scale from 0 to 1; threshold ${threshold}${band ? `; abstains from ${band[0]} to ${band[1]}` : ""}`,
  spoken: (model, decision, label, value) => `${model}: ${decision}${label ? `, ${label}` : ""}, probability ${value}.`,
  compared: (counts) =>
    Object.entries(counts).filter(([, count]) => count).map(([decision, count]) => `${count} ${decision}`).join(", "),
  compare: (total, counts) => `${counted(total, "classifier", "classifiers")}: ${results.compared(counts)}.`,
  told: { yes: "yes", no: "no", abstain: "undecided", error: "without an answer" },
  closeToCall: "too close to the threshold",
  facts: (when, seconds, tokens) => [`answered at ${when}`, `${seconds.toFixed(seconds < 1 ? 2 : 1)} s`, tokens ? counted(tokens, "token", "tokens") : null].filter(Boolean).join(" · "),
  noPicture: "No picture",
  cancelled: "Cancelled.",
  back: "Earlier result shown again.",
  cleared: "History cleared.",
};

export const explanation = {
  working: "Computing the explanation. This takes longer than an answer …",
  done: (model) => `The explanation of ${model} is shown.`,
  towards: "towards ",
  unit: "log odds",
  strength: "Strength of the colours",
  grey: "Picture in grey",
  words: "Words",
  noPatches: "There is no picture, so only words are shown.",
  numbers: "As numbers",
  sumCaption: "What the log odds are made of",
  wordCaption: (shown, all) => (shown < all ? `The ${shown} of ${all} words that changed the answer most` : "Every word"),
  picture: (number, many) => (many ? `Picture ${number}` : "Picture"),
  prompt: "Prompt around picture and text",
  rest: {
    gradients: "Where it starts, and what the steps miss",
    tokens: "Bias of the head, and what is left out",
    occlusion: "Remainder",
  },
  sum: "Log odds in total",
  note: "Squares and words show what the classifier responded to; they do not prove why. Numbers are log odds of class 1, before the isotonic curve if there is one.",
};

export const tryIt = {
  sending: "Waiting for the answer …",
  answered: (status, seconds, retry) => `Status ${status} after ${seconds.toFixed(2)} s${retry ? `; try again in ${retry} s` : ""}`,
  answer: "Answer",
  cut: (length) => `… (${counted(length, "character", "characters")} in all)`,
};

export const history = {
  entry: "Show again: ",
  pictures: (count) => counted(count, "picture", "pictures"),
};
