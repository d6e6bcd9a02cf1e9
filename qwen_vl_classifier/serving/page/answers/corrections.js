// "This is wrong": right answers that are collected in this page alone, to download in the columns that `train` reads.
import { button, download, find, named } from "../dom.js";
import * as texts from "../texts.js";

export class Corrections {
  #records = new Map(); // by result
  #saved = true;
  #draws = new WeakMap(); // by button, what draws it again

  constructor() {
    find("save-corrections").addEventListener("click", () => this.#save());
    find("forget-corrections").addEventListener("click", () => this.#forget());
  }

  /** Whether some were not downloaded. */
  get unsaved() {
    return !this.#saved;
  }

  /**
   * Make buttons that say which class is right: the other one, or one of both where the classifier is undecided.
   * @param {object} result of one classifier, as the server answers it
   * @param {{id: string, files: string[], text: string, when: Date, classifier: object}} of what it is about
   * @returns {HTMLElement[]}
   */
  buttons(result, of) {
    const labels = result.decision === "abstain" ? [0, 1] : [1 - result.label];
    return labels.map((label) => {
      const { label_names: names } = of.classifier;
      // The label of a panel has a column of its own, as `train --labels` reads it.
      const right = result.name === undefined ? { label, label_name: names[label] } : { [result.name]: label };
      const found = { ...right, probability: result.score, decision: result.decision };
      return this.#button(result, of, found, texts.corrections.mark(result.decision), texts.className(names[label]));
    });
  }

  /**
   * Make a button that says that a class of a panel is right; none for the one that was answered.
   * @param {object} result of the panel
   * @param {string} name of the class
   * @param {{id: string, files: string[], text: string, when: Date, classifier: object}} of what it is about
   * @returns {HTMLElement[]}
   */
  ofClass(result, name, of) {
    if (name === result.class) return [];
    const found = { label: name, probability: result.probabilities[name], answered: result.class };
    return [this.#button(result, of, found, texts.corrections.mark("no"), name)];
  }

  #button(result, of, found, words, name) {
    const press = button("", () => this.#mark(result, of, found), { className: "mark" });
    const draw = () => {
      const marked = this.#isMarked(result, found);
      press.replaceChildren(marked ? texts.corrections.marked : words, named(name));
      press.setAttribute("aria-pressed", String(marked));
    };
    this.#draws.set(press, draw);
    draw();
    return press;
  }

  #isMarked(result, found) {
    const record = this.#records.get(result);
    return record !== undefined && Object.entries(found).every(([name, value]) => record[name] === value);
  }

  #mark(result, { id, files, text, when, classifier }, found) {
    if (this.#isMarked(result, found)) this.#records.delete(result);
    else {
      this.#records.set(result, {
        id,
        image: files.length > 1 ? files : files[0] ?? null,
        text,
        ...found,
        classifier: classifier.id,
        version: classifier.version ?? null,
        time: when.toISOString(),
      });
    }
    this.#saved = !this.#records.size;
    this.#show();
  }

  #forget() {
    this.#records.clear();
    this.#saved = true;
    this.#show();
    find("text").focus();
  }

  #show() {
    for (const press of document.querySelectorAll(".mark")) this.#draws.get(press)();
    find("corrections").hidden = !this.#records.size;
    find("corrections-count").textContent = texts.corrections.count(this.#records.size);
  }

  #save() {
    const lines = [...this.#records.values()].map((record) => `${JSON.stringify(record)}\n`).join("");
    download("corrections.jsonl", lines, "application/x-ndjson");
    this.#saved = true;
  }
}
