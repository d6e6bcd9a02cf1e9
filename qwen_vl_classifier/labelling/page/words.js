// Everything that the page says at run time, in one place.
import { counted, signed } from "./numbers.js";

const MOST_OF_A_NAME = 60; // characters of a file name in a message

export const rows = (number) => counted(number, "row", "rows");

const tidy = (value, digits) => signed(value, digits).replace("+", "");

export const percent = (value) => `${tidy(100 * value, value < 0.0995 || (value > 0.9905 && value < 1) ? 1 : 0).replace(/\.0$/, "")}\u00a0%`; // a space that does not break

const points = (value) => tidy(100 * value, 1);

const range = ([, low, high], write) => `${write(low)} to ${write(high)}`;

/** Name an answer as its label does; bare numbers get the word before them. */
export const className = (name) => (/^\d+$/.test(name) ? `class ${name}` : name);

export const short = (name) => (name.length > MOST_OF_A_NAME ? `${name.slice(0, MOST_OF_A_NAME - 1)}…` : name);

export const state = {
  starting: "Connecting …",
  ready: "Ready",
  saved: "Saved",
  saving: "Saving …",
  offline: "Not reachable",
  key: "New address",
  unsaved: "Not saved",
  other: "Another session",
};

export const trouble = {
  offline: "The server cannot be reached. The command may have stopped: start the same command again.",
  key: "The command was started again, and has a new address. Open the address that it printed: this page then continues, or close this page.",
  notCurrent: "The server does not know this row. The next one is shown.",
  strange: "This page does not understand the answer. Is another program running at this address?",
  failed: (status) => `The server answered with an error (${status}). The command may have printed why.`,
  refused: (status, detail) => `The server refused the request (${status}): ${detail}`,
  other: "The command at this address labels other data now. Reload the page to see it.",
  pending: (answer) => `Your last answer, “${answer}”, is not saved yet. This page sends it again by itself.`,
  waits: "This page tries again by itself.",
  undo: "The connection broke before the server confirmed the undo. Check whether your last answer was taken back.",
  picture: "This picture cannot be shown.",
  pictureHint: "Skip the row, or answer if the text is enough.",
};

export const actions = {
  again: "Try again",
  reload: "Reload",
  finish: "Finish …",
  dismiss: "Continue labelling",
  undo: "Undo the last answer",
  copy: "Copy",
  copied: "Copied",
  copyFailed: "Selected; copy it with your keyboard",
  close: "Close",
  start: "Finish and train",
  cancel: "Cancel",
  outcome: "Show the result",
  hide: "Hide",
};

export const question = {
  one: "Which answer is right?",
  label: (name) => `${name}?`,
  classes: "Which class is it?",
  connecting: "Connecting to the server",
  loading: "Loading the picture …",
  noText: "(no text)",
  picture: (number, count, name) => `Picture${count > 1 ? ` ${number} of ${count}` : ""} of row ${short(name)}`,
  choose: (number) => `Show picture ${number} large`,
  enlarge: "Enlarge the picture",
  fit: "Fit the picture to the window",
};

export const before = {
  check: (answer) => `Second look: you answered “${answer}” before. Is that still right?`,
  undone: (answer) => `Taken back: you had answered “${answer}”.`,
  other: (answer) => `You answered “${answer}” before. Is that still right?`,
};

export const sources = {
  random: "drawn at random",
  uncertain: "the model is unsure",
  diverse: "unlike the rows so far",
  check: "second look",
  queued: "from the list of rows",
  agreement: "answered by somebody else too",
};

export const answers = { skip: "skip", unsure: "unsure" };

export const spoken = {
  saved: (answer) => `Saved: ${answer}.`,
  undone: "Taken back.",
  nothingToUndo: "There is no answer to take back.",
  next: (asked, text, name) => `${asked} ${text || name}`,
  connected: "Connected again.",
  savedAfterAll: "Connected again. Your answer is saved.",
  stop: "More labels would hardly help.",
};

export const filter = {
  hint: "Type a part of the name, then press Enter.",
  found: (count) => (count ? counted(count, "class", "classes") : "No class has this in its name."),
};

export const end = {
  title: "All rows are done",
  words: (count) => `You have gone through ${count === 1 ? "the only row" : `all ${count.toLocaleString("en")} rows`}. “Finish” trains a classifier on your answers.`,
  elsewhereTitle: "Nothing to do here now",
  elsewhere: (left) => `${left === 1 ? "The last row is" : `The last ${rows(left)} are`} open in another window. This page continues by itself if one becomes free.`,
};

export const progress = {
  count: (answered, all) => `${answered.toLocaleString("en")} of ${all.toLocaleString("en")} rows answered`,
  title: (answered, all, title) => `${answered.toLocaleString("en")}/${all.toLocaleString("en")} · ${title}`,
  leftOut: ({ skipped, unsure, given = 0 }) => [[skipped, "skipped"], [unsure, "unsure"], [given, "with labels from the data"]]
    .filter(([count]) => count).map(([count, what]) => `${count.toLocaleString("en")} ${what}`).join(", "),
  both: (yes, yesName, no, noName) => `${yes.toLocaleString("en")} ${yesName}, ${no.toLocaleString("en")} ${noName}`,
  waiting: "The model learns as soon as both answers have occurred.",
  waitingClasses: "The model learns as soon as two classes have occurred.",
  running: (labels) => `Learning from ${counted(labels, "label", "labels")} …`,
  learned: (labels, seconds) => `Learned from ${counted(labels, "label", "labels")} in ${seconds.toFixed(seconds < 0.95 ? 2 : 1)} s.`,
};

export const estimate = {
  none: "No estimate yet. It needs rows that were drawn at random, with both answers among them.",
  basis: (count) => `From ${rows(count)} drawn at random, with 95\u00a0% intervals.`,
  accuracy: "Accuracy",
  auroc: "AUROC",
  majority: (value) => `dotted: one answer for all, ${percent(value)}`,
  chance: "dotted: chance, 0.50",
  interval: (three, write) => range(three, write),
  ratio: (value) => value.toFixed(2),
  calibration: (ece) => `Probabilities are off by ${percent(ece[0])} on average (${range(ece, percent)}).`,
};

export const curve = {
  metric: { accuracy: "accuracy", auroc: "AUROC" },
  axis: "labels",
  next: (next) => `50 more labels would add about ${points(next[0])} points (${range(next, points)}).`,
  alt: (metric, shown) => `Learning curve: ${metric} by number of labels. ${shown}`,
  point: (labels, value) => `${percent(value)} at ${labels}`,
  level: (level) => `levels off at ${percent(level[0])} (${range(level, percent)})`,
  legendFit: "fitted curve",
  legendLevel: "where it levels off",
};

export const agreement = {
  answers: (count) => counted(count, "answer", "answers"),
  none: (count) => `Agreement: not enough rows that two annotators answered (${count} so far).`,
  kappa: (value, count) => `Agreement: Cohen’s kappa ${tidy(value[0], 2)} (${range(value, (part) => tidy(part, 2))}) from ${rows(count)} that two annotators answered.`,
  ties: (count) => `${rows(count)} with as many yes as no ${count === 1 ? "is" : "are"} left out of the data set.`,
};

export const session = {
  oneLabel: "Label",
  oneClass: "Class",
  data: "Data",
  out: "Answers are written to",
  model: "Model",
  annotator: "Annotator",
};

export const finish = {
  titles: { confirm: "Finish and train?", running: "Training …", done: "The classifier is ready", failed: "Training failed" },
  confirm: (count) => `This trains a classifier on ${counted(count, "answered row", "answered rows")} with the full search, and writes a report. The pictures are not encoded again. You can continue labelling afterwards.`,
  few: "There are no two different answers yet, so nothing can be trained.",
  running: "The classifier is being trained.",
  closable: "You can close this window and continue labelling. Answers that you give now are not part of this training.",
  done: (folder) => `It was saved in ${folder}.`,
  failed: "The command may have printed why.",
  report: "Open the report",
  serve: "Serve it:",
  train: "Train it again, with other options:",
};

export const keys = {
  binary: (yes, no) => [["1 or →", yes], ["0 or ←", no]],
  classes: (count) => [[count > 1 ? `1 to ${Math.min(9, count)}` : "1", count > 9 ? "one of the first nine classes" : "the class with this number"], ...(count > 9 ? [["f", "find a class by its name"]] : [])],
  common: [["s", "skip the row: it is not asked again"], ["?", "unsure: nobody could tell from this row"], ["u", "undo the last answer"], ["z", "enlarge the picture, or fit it to the window"], ["p", "next picture of the row"], ["h or /", "this help"]],
  swipe: (yes, no) => `On a phone, swipe the picture to the right for “${yes}” and to the left for “${no}”. Tap it to enlarge it.`,
  tap: "Tap the picture to enlarge it.",
};
