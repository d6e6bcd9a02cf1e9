// What the table of rows shows of one answer: of a classifier, of one label of a panel, of all of its labels, or a class.
import { inShort, isPanel, labelResults } from "../answers/panels.js";
import * as texts from "../texts.js";

const CLASS = "class "; // before the name of a class, so that no class is taken for a decision

/** Whether the rows of a model are classes of which each has exactly one. */
export const hasClasses = (model) => isPanel(model) && model.one_of;

/**
 * Read an answer.
 * @param {object} result as the server answers it, with its `classifier`
 * @param {string} label the label of a panel to look at, or "" for all
 * @returns {{state: string, words: string, score: number, threshold: number, of: object | null}} `state` is yes, no, abstain
 *   or that of a class; `of` is the result of one classifier, where there is one
 */
export function readingOf(result, label) {
  const { classifier } = result;
  if (hasClasses(classifier)) {
    const { class: name, probability } = result;
    return { state: stateOfClass(name), words: name, score: probability, threshold: 0, of: null };
  }
  if (!isPanel(classifier)) return { state: result.decision, words: texts.decisions[result.decision], score: result.score, threshold: result.threshold, of: result };
  const found = labelResults(result);
  const one = found.find(({ name }) => name === label);
  if (one) return { state: one.decision, words: texts.decisions[one.decision], score: one.score, threshold: one.threshold, of: one };
  // Of all labels together the one counts that is furthest above its threshold, or least below.
  const first = found.reduce((best, other) => (other.score - other.threshold > best.score - best.threshold ? other : best));
  const state = ["yes", "abstain"].find((decision) => found.some((other) => other.decision === decision)) ?? "no";
  return { state, words: inShort(result), score: first.score, threshold: first.threshold, of: null };
}

/** The state of rows of a class, as the filter names it. */
export const stateOfClass = (name) => CLASS + name;

/** The class of a state, or "" where it is a decision. */
export const classOfState = (state) => (state.startsWith(CLASS) ? state.slice(CLASS.length) : "");

/** The columns that an answer fills in a file, as `score` names them. */
export function columnsOf(result) {
  const { classifier } = result;
  if (hasClasses(classifier)) {
    const shares = Object.entries(result.probabilities).map(([name, share]) => [`probability_${name}`, share]);
    return { ...Object.fromEntries(shares), class: result.class, class_probability: result.probability };
  }
  if (isPanel(classifier)) {
    return Object.fromEntries(["probability", "label", "decision"].flatMap((kind) => labelResults(result).map((one) => [
      `${kind}_${one.name}`, kind === "probability" ? one.score : one[kind],
    ])));
  }
  return { probability: result.score, label: result.label, decision: result.decision, label_name: classifier.label_names[result.label] };
}
