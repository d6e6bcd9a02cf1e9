// The panel beside the rows: how far it is, how good the model is, what more labels are worth, and who answers.
import { find, make, named } from "./dom.js";
import { drawCurve } from "./curve.js";
import * as words from "./words.js";

const MANY = 8; // classes, from which on they stand in two columns

export class Figures {
  #setup;
  #drawn = ""; // the curve that is shown, as JSON

  constructor(setup) {
    this.#setup = setup;
    const several = setup.labels.length > 1;
    find("label-field").hidden = !several;
    find("label-name").textContent = setup.one_of ? words.session.oneClass : words.session.oneLabel;
    find("label").replaceChildren(...setup.labels.map(({ name }) => make("option", { value: name, textContent: name })));
    find("label").addEventListener("change", () => this.#quality());
    const facts = [[words.session.data, setup.data], [words.session.out, setup.out], [words.session.model, setup.model], [words.session.annotator, setup.annotator]];
    find("session").replaceChildren(...facts.filter(([, value]) => value).flatMap(([term, value]) => [make("dt", {}, term), make("dd", {}, named(value))]));
  }

  /** Show the progress of the session. */
  show(progress) {
    this.progress = progress;
    this.#classes();
    find("left-out").textContent = words.progress.leftOut(progress);
    find("notes").replaceChildren(...(progress.notes ?? []).map((note) => make("li", {}, note)));
    const { refit } = progress;
    const waiting = this.#setup.one_of ? words.progress.waitingClasses : words.progress.waiting;
    find("refit").textContent = refit.running
      ? words.progress.running(progress.answered)
      : refit.labels ? words.progress.learned(refit.labels, refit.seconds ?? 0) : waiting;
    find("refit").classList.toggle("busy", Boolean(refit.running));
    this.#quality();
    this.#people();
  }

  /** How many rows have each answer. */
  #classes() {
    const { labels } = this.progress;
    const { one_of: oneOf } = this.#setup;
    const most = Math.max(1, ...labels.flatMap(({ yes, no }) => (oneOf ? [yes] : labels.length > 1 ? [yes + no] : [yes, no])));
    const parts = (...counts) => counts.map(([kind, count]) => [kind, count / most]);
    const names = (name) => this.#setup.labels.find((label) => label.name === name) ?? { yes: "yes", no: "no" };
    const bars = labels.flatMap(({ name, yes, no }) => {
      if (oneOf) return [bar(words.className(name), yes.toLocaleString("en"), parts(["one", yes]))];
      const { yes: yesName, no: noName } = names(name);
      if (labels.length > 1) return [bar(name, words.progress.both(yes, words.className(yesName), no, words.className(noName)), parts(["one", yes], ["zero", no]))];
      return [bar(words.className(yesName), yes.toLocaleString("en"), parts(["one", yes])), bar(words.className(noName), no.toLocaleString("en"), parts(["zero", no]))];
    });
    find("classes").classList.toggle("dense", bars.length > MANY);
    find("classes").replaceChildren(...bars);
  }

  /** The estimates and the curve of the label that is chosen. */
  #quality() {
    const { labels } = this.progress;
    const chosen = labels.find(({ name }) => name === find("label").value) ?? labels[0];
    const estimate = chosen?.estimate ?? {};
    const known = isKnown(estimate.accuracy) || isKnown(estimate.auroc);
    find("quality").hidden = !chosen;
    find("basis").textContent = known ? words.estimate.basis(estimate.rows) : words.estimate.none;
    find("metrics").replaceChildren(...(known ? metricsOf(estimate) : []));
    find("calibration").textContent = known && isKnown(estimate.ece) ? words.estimate.calibration(estimate.ece) : "";
    const curve = chosen?.curve ?? null;
    find("growth").hidden = !curve;
    const drawn = JSON.stringify(curve);
    if (!curve || drawn === this.#drawn) return;
    this.#drawn = drawn;
    find("curve").replaceChildren(...(curve.points.length ? [drawCurve(curve), legend(curve)] : []));
    find("curve-sentence").textContent = curve.sentence || (curve.next_50 ? words.curve.next(curve.next_50) : "");
  }

  #people() {
    const { agreement, annotators } = this.progress;
    const names = Object.entries(annotators ?? {});
    find("people").hidden = names.length < 2 && !agreement;
    const most = Math.max(1, ...names.map(([, count]) => count));
    find("annotators").replaceChildren(...names.map(([name, count]) => bar(name, words.agreement.answers(count), [["mid", count / most]])));
    const said = !agreement ? "" : agreement.kappa ? words.agreement.kappa(agreement.kappa, agreement.rows) : words.agreement.none(agreement.rows);
    find("agreement").textContent = [said, agreement?.ties ? words.agreement.ties(agreement.ties) : ""].filter(Boolean).join(" ");
  }
}

/** A name, a number and a bar of parts, each with its kind and its share of the room. */
function bar(name, number, parts) {
  const lengths = parts.map(([kind, share]) => {
    const length = make("span", { className: `length ${kind}` });
    length.style.setProperty("--share", String(share));
    return length;
  });
  return make("li", {}, named(name), make("b", {}, number), make("span", { className: "room", "aria-hidden": "true" }, ...lengths));
}

/** Whether a value and its interval are all there. */
const isKnown = (three) => three?.every(Number.isFinite) ?? false;

function metricsOf({ accuracy, auroc, majority }) {
  const base = typeof majority === "number" ? majority : null;
  return [
    ...(isKnown(accuracy) ? metric(words.estimate.accuracy, accuracy, words.percent, base, base === null ? "" : words.estimate.majority(base)) : []),
    ...(isKnown(auroc) ? metric(words.estimate.auroc, auroc, words.estimate.ratio, 0.5, words.estimate.chance) : []),
  ];
}

/** A metric with its interval, in words and on a scale from 0 to 1, where a mark shows what needs no model. */
function metric(name, three, write, mark, note) {
  const scale = make("span", { className: "interval", "aria-hidden": "true" }, make("span", { className: "between" }), make("span", { className: "value" }), mark === null ? null : make("span", { className: "mark" }));
  for (const [part, value] of Object.entries({ value: three[0], low: three[1], high: three[2], mark: mark ?? 0 })) scale.style.setProperty(`--${part}`, String(value));
  return [
    make("dt", {}, name, make("span", { className: "note" }, note)),
    make("dd", {}, make("b", {}, write(three[0])), ` (${words.estimate.interval(three, write)})`, scale),
  ];
}

function legend({ fit, level }) {
  const entry = (kind, what) => make("span", {}, make("span", { className: `key ${kind}` }), what);
  return make("p", { className: "legend note", "aria-hidden": "true" }, fit?.length ? entry("line", words.curve.legendFit) : null, level ? entry("band", words.curve.legendLevel) : null);
}
