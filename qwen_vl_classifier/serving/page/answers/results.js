// Answers as cards: decision in words, probability on a scale with threshold and abstention, and what moved it.
import { button, find, make, named, tell } from "../dom.js";
import { drawExplanation } from "./heatmap.js";
import { inShort, isPanel, panelAnswer } from "./panels.js";
import { largePicture } from "../pictures.js";
import { wordsOf } from "../server.js";
import * as texts from "../texts.js";
import { thresholdSlider } from "./threshold.js";

/**
 * One example and what came back for it; a result has its `classifier` too, as /v1/models tells of it.
 * @typedef {{pictures: File[], text: string, models: string[], results: object[], tokens: number, when: Date, seconds: number}} Asked
 */

/**
 * Show answers in place of earlier ones.
 * @param {Asked} trial
 * @param {(model: string) => Promise<object>} explain asks for an explanation
 * @param {import("./corrections.js").Corrections} corrections
 */
export function showAnswers(trial, explain, corrections) {
  const alone = trial.results.filter(({ classifier }) => !isPanel(classifier));
  const many = trial.results.length > 1 && alone.length > 0;
  find("answers").replaceChildren(
    example(trial),
    ...(many ? [make("p", { className: "compared" }, texts.results.compare(alone.length, count(alone)))] : []),
    ...trial.results.map((result) => card(result, trial, explain, corrections)),
    make("p", { className: "note facts" }, texts.results.facts(trial.when.toLocaleTimeString("en-GB"), trial.seconds, trial.tokens)),
  );
}

/** Say answers in one line, for those who hear the page and for the history. */
export const spoken = ({ results }) =>
  results.map((result) => {
    if (result.error) return `${result.model}: ${messageOf(result.error)}`;
    if (isPanel(result.classifier)) return `${result.model}: ${inShort(result)}.`;
    const value = texts.probability(result.score, result.threshold);
    return texts.results.spoken(result.model, texts.decisions[result.decision], labelOf(result), value);
  }).join(" ");

/** Say answers in a few words. */
export function summary(trial) {
  const panels = trial.results.filter(({ classifier, error }) => isPanel(classifier) && !error).map(inShort);
  if (trial.results.length > 1) {
    const others = trial.results.filter(({ classifier, error }) => !isPanel(classifier) || error);
    return [...panels, texts.results.compared(count(others))].filter(Boolean).join("; ");
  }
  const [result] = trial.results;
  if (result.error) return texts.results.told.error;
  if (panels.length) return panels[0];
  const label = labelOf(result);
  return `${texts.decisions[result.decision]}${label ? `, ${label}` : ""}, ${texts.probability(result.score, result.threshold)}`;
}

function count(results) {
  const counts = { yes: 0, no: 0, abstain: 0, error: 0 };
  for (const { error, decision } of results) counts[error ? "error" : decision] += 1;
  return Object.fromEntries(Object.entries(counts).map(([decision, number]) => [texts.results.told[decision], number]));
}

/** The name of the class that was decided for, unless it only repeats the decision. */
function labelOf({ decision, label, classifier }) {
  if (decision === "abstain") return texts.results.closeToCall;
  const name = texts.className(classifier.label_names[label]);
  return name.toLowerCase() === decision ? "" : name;
}

const messageOf = (error) => (typeof error.message === "string" ? error.message.slice(0, 600) : texts.problem.strange);

function example({ pictures, text }) {
  return make(
    "div", { className: "trial" },
    ...pictures.map(largePicture),
    make("p", { className: "quoted", dir: "auto" }, text),
  );
}

function card(result, trial, explain, corrections) {
  const version = result.classifier?.version;
  const title = make("h3", {}, named(result.model), version ? make("span", { className: "note" }, ` ${texts.models.version(version)}`) : null);
  if (result.error) return make("article", { className: "answer" }, title, make("p", { className: "failed" }, messageOf(result.error)));
  if (!isPanel(result.classifier)) return make("article", { className: `answer ${result.decision}` }, title, ...body(result, trial, explain, corrections));
  return make("article", { className: "answer of-panel" }, title, ...panelAnswer(
    result,
    (label) => body(label, trial, explain, corrections),
    (name) => reasons(
      { model: `${result.model}/${name}`, classifier: result.classifier.labels.find((label) => label.name === name) },
      trial, explain, corrections.ofClass(result, name, about(result, trial)),
    ),
  ));
}

const about = (result, trial) => ({
  id: trial.id, files: trial.files ?? trial.pictures.map((file) => file.name), text: trial.text, when: trial.when, classifier: result.classifier,
});

/** All that is known of the answer of one classifier. */
function body(result, trial, explain, corrections) {
  const { decision, score, threshold, classifier } = result;
  const names = classifier.label_names.map(texts.className);
  const band = classifier.abstention?.[0] < classifier.abstention?.[1] ? classifier.abstention : null;
  const ends = band?.map((end) => texts.probability(end)) ?? null;
  const [value, border] = [texts.probability(score, threshold), texts.probability(threshold, score)];
  const label = labelOf(result);
  return [
    make(
      "div", { className: "headline" },
      make("p", { className: "verdict" }, make("strong", {}, texts.decisions[decision]), label ? ", " : null, label ? named(label) : null),
      make("p", { className: "value" }, make("span", { className: "note" }, texts.results.probabilityOf, named(names[1])), " ", make("b", {}, value)),
    ),
    scale(result, band, texts.results.scale(value, border, ends), texts.results.threshold(border)),
    make(
      "p", { className: "ends", "aria-hidden": "true" },
      make("span", {}, "0 · ", named(names[0])),
      make("span", {}, named(names[1]), " · 1"),
    ),
    make("p", { className: "note" }, texts.results.rule(border, ends)),
    ...reasons(result, trial, explain, corrections.buttons(result, about(result, trial))),
    make("details", {}, make("summary", {}, texts.threshold.title), thresholdSlider(threshold, (tried, moved) => {
      const yes = score >= tried;
      return moved ? texts.threshold.tried(texts.decisions[yes ? "yes" : "no"], names[Number(yes)]) : texts.threshold.own;
    })),
  ];
}

function scale({ score, threshold }, band, words, border) {
  const track = make("div", { className: "track" }, make("div", { className: "fill" }));
  const drawn = make(
    "div", { className: "scale", role: "img", "aria-label": words },
    make("span", { className: "border" }, border), track,
  );
  if (band) track.append(make("div", { className: "band" }));
  track.append(make("div", { className: "threshold" }));
  // Through the object model, which the policy allows; attributes would be refused.
  const place = { "--score": score, "--threshold": threshold, "--low": band?.[0] ?? 0, "--high": band?.[1] ?? 0 };
  for (const [name, value] of Object.entries(place)) drawn.style.setProperty(name, String(Math.min(1, Math.max(0, value))));
  return drawn;
}

/** The button for an explanation, with others beside it, and where it is shown. */
function reasons({ model, classifier }, trial, explain, others) {
  const shown = make("div", { className: "reasons", hidden: true });
  const trouble = make("div", { className: "notice", role: "alert", hidden: true });
  const state = make("p", { className: "busy", hidden: true }, texts.explanation.working);
  const press = button(texts.actions.explain, async () => {
    if (press.getAttribute("aria-disabled") === "true") return;
    if (shown.childElementCount) {
      show(shown.hidden);
      return;
    }
    press.setAttribute("aria-disabled", "true"); // not disabled, or the keyboard would lose its place
    state.hidden = false;
    tell(trouble, "");
    try {
      drawExplanation(shown, trial, await explain(model), classifier);
      show(true);
    } catch (error) {
      tell(trouble, wordsOf(error));
    }
    state.hidden = true;
    press.removeAttribute("aria-disabled");
  }, { "aria-expanded": "false" });
  const show = (open) => {
    shown.hidden = !open;
    press.setAttribute("aria-expanded", String(open));
    press.textContent = open ? texts.actions.unexplain : texts.actions.explain;
  };
  return [make("p", { className: "buttons" }, press, ...others), state, trouble, shown];
}
