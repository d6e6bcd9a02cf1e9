// Answers of panels: a bar for each label, or the classes in the order of their probabilities.
import { make, named } from "../dom.js";
import * as texts from "../texts.js";

const MOST_SHOWN = 12; // labels or classes before one has to ask for all

/** Whether a model that /v1/models lists is a panel. */
export const isPanel = (model) => Array.isArray(model?.labels);

const made = new WeakMap(); // by result of a panel, so that a label's result stays the same object

/** What each label of a panel says, as if its classifier alone had answered; nothing for classes. */
export function labelResults(result) {
  if (!made.has(result)) {
    const { model, labels, classifier } = result;
    made.set(result, Object.entries(labels ?? {}).map(([name, one]) => {
      const own = classifier.labels.find((label) => label.name === name);
      return { ...one, name, model: `${model}/${name}`, classifier: { ...own, version: classifier.version } };
    }));
  }
  return made.get(result);
}

/** The classes of a panel, most probable first. */
export const ranked = ({ probabilities }) => Object.entries(probabilities).sort(([, one], [, other]) => other - one);

/** Say an answer of a panel in a few words. */
export function inShort(result) {
  if (result.class !== undefined) return texts.panels.chosen(result.class, texts.probability(result.probability));
  const found = labelResults(result);
  return texts.panels.found(namesOf(found, "yes"), namesOf(found, "abstain"), found.length);
}

const namesOf = (found, decision) => found.filter((one) => one.decision === decision).map(({ name }) => name);

/**
 * Draw the answer of a panel.
 * @param {object} result
 * @param {(label: object) => Array} detail draws all that is known of one label, from a result of `labelResults`
 * @param {(name: string) => Array} reasons draws the buttons for one class
 */
export function panelAnswer(result, detail, reasons) {
  return result.class === undefined ? labelAnswer(result, detail) : classAnswer(result, reasons);
}

function labelAnswer(result, detail) {
  const found = labelResults(result);
  const order = found.length > MOST_SHOWN ? [...found].sort((one, other) => weight(other) - weight(one)) : found;
  return [
    make("p", { className: "verdict" }, make("strong", { className: "plain" }, texts.panels.count(namesOf(found, "yes").length, found.length))),
    ...list(order.map((label) => {
      const { name, decision, score, threshold } = label;
      const value = texts.probability(score, threshold);
      return lineOf(name, score, value, decision, { threshold, words: texts.decisions[decision], more: () => detail(label) });
    })),
  ];
}

/** Those that apply first, then those that are undecided, each by their probability. */
const weight = ({ decision, score }) => ({ yes: 2, abstain: 1, no: 0 })[decision] + score;

function classAnswer(result, reasons) {
  const lines = ranked(result).map(([name, share], at) =>
    lineOf(name, share, texts.probability(share), at ? "no" : "yes", { more: () => reasons(name) }));
  return [
    make(
      "div", { className: "headline" },
      make("p", { className: "verdict" }, make("strong", { className: "plain" }, named(result.class))),
      make("p", { className: "value" }, make("span", { className: "note" }, texts.panels.probability), " ", make("b", {}, texts.probability(result.probability))),
    ),
    ...list(lines),
  ];
}

/** One label or class: its name, a bar, its value, and what more there is to say once it is opened. */
function lineOf(name, score, value, decision, { threshold, words, more }) {
  const track = make("span", { className: "track" }, make("span", { className: "fill" }));
  track.style.setProperty("--score", String(score));
  if (threshold !== undefined) {
    track.append(make("span", { className: "threshold" }));
    track.style.setProperty("--threshold", String(Math.min(1, Math.max(0, threshold))));
  }
  const details = make(
    "details", {},
    make(
      "summary", { className: "label-line" },
      named(name, "label-name"), track,
      make("span", { className: "label-value" }, value, words ? make("span", { className: "label-decision" }, words) : null),
    ),
  );
  details.addEventListener("toggle", () => { if (details.open && details.children.length === 1) details.append(...more()); });
  return make("li", { className: decision }, details);
}

/** A list that shows the first ones, and the others when they are asked for. */
function list(lines) {
  const first = make("ul", { className: "labels" }, ...lines.slice(0, MOST_SHOWN));
  const others = lines.slice(MOST_SHOWN);
  if (!others.length) return [first];
  return [first, make("details", {}, make("summary", {}, texts.panels.more(others.length)), make("ul", { className: "labels" }, ...others))];
}
