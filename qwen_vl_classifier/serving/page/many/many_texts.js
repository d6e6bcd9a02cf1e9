// What the page says about many examples at once.
import { counted, probability } from "../texts.js";

export const rows = {
  missing: (name) => `the picture ${name} is not here`,
  ambiguous: (name) => `several paths of the table end in the name of one picture, ${name}; add the folder instead of single files`,
  blank: "the text is blank",
};

export const source = {
  table: (name, count, delimiter) =>
    `${name}: ${counted(count, "row", "rows")}${{ ";": ", cells separated by semicolons", "\t": ", cells separated by tabs" }[delimiter] ?? ""}.`,
  folder: (name, count, others) =>
    `${name || "Pictures"}: ${counted(count, "picture", "pictures")}${others ? `; ${counted(others, "other file is", "other files are")} left out` : ""}.`,
  otherTables: (names) => `Only the first table is read; left out: ${names.join(", ")}.`,
  missing: (count) => `${counted(count, "row names a picture that is", "rows name pictures that are")} not here. Add the pictures, or choose or drop the folder that holds them.`,
  unusable: (count) => `${counted(count, "row", "rows")} cannot be scored; the table says why.`,
};

export const problem = {
  spreadsheet: (name) => `${name} is a file of a spreadsheet program. Save it there as CSV (UTF-8), then drop that file.`,
  unreadable: (name, why) => `${name} ${why}.`,
  noRows: (name) => `${name} holds no rows.`,
  tooMany: (count, most) => `These are ${count.toLocaleString("en")} rows; this page takes at most ${most.toLocaleString("en")}. Use the command line for more: qwen-vl-classifier predict or score.`,
  noPictures: "There are no JPEG, PNG or WebP pictures in this folder.",
  sameTextNeeded: "Type the text that goes with every picture.",
};

export const columns = {
  none: "no pictures",
  same: "the same text for every row",
};

export const state = {
  ready: (count) => (count ? `${counted(count, "row", "rows")} can be scored.` : "No row can be scored yet."),
  running: (done, all) => `Scoring: ${done.toLocaleString("en")} of ${all.toLocaleString("en")}.`,
  stopped: (done, all) => `Stopped: ${done.toLocaleString("en")} of ${all.toLocaleString("en")} scored.`,
  done: (count, failed) => `Done: ${counted(count, "row", "rows")}${failed ? `, ${failed.toLocaleString("en")} of them without an answer` : ""}.`,
  waiting: {
    busy: (seconds) => `The server is overloaded. Waiting ${counted(Math.ceil(seconds), "second", "seconds")}, then going on.`,
    loading: () => "The server is loading its classifiers. Going on as soon as it is ready.",
    draining: () => "The server is shutting down. Trying again from time to time.",
    offline: () => "The server cannot be reached. Trying again from time to time.",
  },
};

export const tried = "Rows show what would be decided at this threshold; no row is undecided there. The server keeps its own.";

export const classes = ([no, yes]) => `Answers: yes = ${yes}, no = ${no}.`;

export const labels = {
  all: "all labels",
  answers: "The decision lists the labels that apply; the probability is that of the label closest to applying. Choose a label to look at it alone.",
  exclusive: "The decision is the most probable class, with its probability.",
};

export const labelCounts = (counts, others, error) =>
  [
    ...counts.map(([name, count]) => `${count.toLocaleString("en")} ${name}`),
    others > 0 ? `and ${counted(others, "more label", "more labels")}` : "",
    error ? `${error.toLocaleString("en")} without an answer` : "",
  ].filter(Boolean).join(", ");

export const counts = ({ yes, no, abstain, error }) =>
  [
    `${yes.toLocaleString("en")} yes`,
    `${no.toLocaleString("en")} no`,
    abstain ? `${abstain.toLocaleString("en")} undecided` : "",
    error ? `${error.toLocaleString("en")} without an answer` : "",
  ].filter(Boolean).join(", ");

export const actions = {
  score: (count) => `Score ${counted(count, "row", "rows")}`,
  proceed: (count) => `Continue with ${counted(count, "row", "rows")}`,
  retry: (count) => `Try ${counted(count, "row", "rows")} again`,
  open: (number) => `Show row ${number}`,
  show: "Show",
};

export const table = {
  pages: (from, to, all) => (all ? `Rows ${from.toLocaleString("en")} to ${to.toLocaleString("en")} of ${all.toLocaleString("en")}` : "No row fits the filter."),
  value: ({ score, threshold }) => probability(score, threshold),
};
