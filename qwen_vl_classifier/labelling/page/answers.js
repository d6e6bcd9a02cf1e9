// The answers as buttons: two for a label, one for each class; where there are many classes, a field to find one by its name.
import { find, make, named } from "./dom.js";
import * as words from "./words.js";

const NUMBERED = 9; // classes that have a key of their own

export class Answers {
  #setup;
  #label; // whose two answers are shown
  #give;
  #buttons = new Map();

  /** @param {(answer: string) => void} give called with "yes", "no" or the name of a class */
  constructor(setup, give) {
    this.#setup = setup;
    this.#give = give;
    const box = find("answers");
    box.classList.toggle("many", setup.one_of);
    if (!setup.one_of) return;
    this.#buttons = new Map(setup.labels.map(({ name }, at) => [name, this.#button(name, words.className(name), at < NUMBERED ? String(at + 1) : "", "")]));
    box.replaceChildren(...this.#buttons.values());
    if (this.filtered) this.#offerFilter();
  }

  /** Whether there are so many classes that there is a field to find one. */
  get filtered() {
    return this.#setup.one_of && this.#setup.labels.length > NUMBERED;
  }

  /** Show the two answers of a label. */
  show(question) {
    if (this.#setup.one_of || question.label === this.#label) return;
    this.#label = question.label;
    const { no, yes } = this.labelOf(question);
    this.#buttons = new Map([
      ["no", this.#button("no", words.className(no), "0", "no")],
      ["yes", this.#button("yes", words.className(yes), "1", "yes")],
    ]);
    find("answers").replaceChildren(...this.#buttons.values());
  }

  /** The label that a question is about. */
  labelOf(question) {
    return this.#setup.labels.find(({ name }) => name === question.label) ?? this.#setup.labels[0];
  }

  /** Name an answer as people see it. */
  nameOf(question, answer) {
    if (Object.hasOwn(words.answers, answer)) return words.answers[answer];
    if (this.#setup.one_of) return words.className(answer);
    return words.className(this.labelOf(question)[answer] ?? answer);
  }

  /** The answer that a key stands for, if any. */
  ofKey(key) {
    if (!this.#setup.one_of) return { 1: "yes", 0: "no", ArrowRight: "yes", ArrowLeft: "no" }[key];
    return /^[1-9]$/.test(key) ? this.#setup.labels[Number(key) - 1]?.name : undefined;
  }

  /** Mark the answer that is on its way to the disk, or none. */
  mark(answer) {
    for (const [given, button] of this.#buttons) button.classList.toggle("given", given === answer);
  }

  /** Empty the field of names for the next row. */
  clear() {
    const field = find("filter");
    if (!field.value) return;
    field.value = "";
    this.#filter();
  }

  #button(answer, name, key, kind) {
    return make(
      "button",
      { type: "button", className: `answer ${kind}`, "aria-keyshortcuts": key, on: { click: () => this.#give(answer) } },
      named(name),
      key ? make("kbd", { "aria-hidden": "true" }, key) : null,
    );
  }

  #offerFilter() {
    const field = find("filter");
    field.addEventListener("input", () => this.#filter());
    field.addEventListener("keydown", (event) => {
      if (event.isComposing || event.repeat) return;
      if (event.key === "Escape") {
        this.clear();
        field.blur();
      }
      const [first] = this.#matching();
      if (event.key === "Enter" && field.value.trim() && first) this.#give(first);
    });
    this.#filter();
  }

  #matching() {
    const typed = find("filter").value.trim().toLowerCase();
    const names = [...this.#buttons.keys()].filter((name) => name.toLowerCase().includes(typed));
    // Names that begin with what was typed come first; sorting keeps the order of the others.
    return typed ? names.sort((one, other) => Number(other.toLowerCase().startsWith(typed)) - Number(one.toLowerCase().startsWith(typed))) : names;
  }

  #filter() {
    const typed = find("filter").value.trim() !== "";
    const matching = this.#matching();
    const shown = new Set(matching);
    for (const [name, button] of this.#buttons) {
      button.hidden = !shown.has(name);
      button.classList.toggle("first", typed && name === matching[0]);
    }
    find("filter-note").textContent = typed ? words.filter.found(matching.length) : words.filter.hint;
  }
}
