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
      const name = texts.className(of.classifier.label_names[label]);
      const press = button("", () => this.#mark(result, of, label), { className: "mark" });
      const draw = () => {
        const marked = this.#records.get(result)?.label === label;
        press.replaceChildren(marked ? texts.corrections.marked : texts.corrections.mark(result.decision), named(name));
        press.setAttribute("aria-pressed", String(marked));
      };
      this.#draws.set(press, draw);
      draw();
      return press;
    });
  }

  #mark(result, { id, files, text, when, classifier }, label) {
    if (this.#records.get(result)?.label === label) this.#records.delete(result);
    else {
      this.#records.set(result, {
        id,
        image: files.length > 1 ? files : files[0] ?? null,
        text,
        label,
        label_name: classifier.label_names[label],
        probability: result.score,
        decision: result.decision,
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
