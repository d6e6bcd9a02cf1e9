// The form: pictures, text and which classifiers to use.
import { isPanel } from "./answers/panels.js";
import { announce, button, find, make, named } from "./dom.js";
import { pictureProblems, textProblem } from "./limits.js";
import { mayBePicture, thumbnail } from "./pictures.js";
import * as texts from "./texts.js";

const ALL = ""; // the value of the choice of every classifier; no classifier has an empty name

const MOST_NAMES = 10; // labels of a panel that are listed

function aboutPanel({ id, version, labels, one_of: oneOf }) {
  const names = labels.slice(0, MOST_NAMES).map(({ name }) => name).join(", ");
  const more = labels.length > MOST_NAMES ? texts.panels.others(labels.length - MOST_NAMES) : "";
  return make(
    "li", {},
    make("b", {}, named(id)), version ? make("span", { className: "note" }, ` ${texts.models.version(version)}`) : null,
    make("br"), (oneOf ? texts.panels.classes : texts.panels.labels)(names + more, labels.length),
  );
}

export class ExampleForm {
  #pictures = [];
  #limits;
  #served = new Map();
  #suggested = ""; // the text that this page put into the field

  /**
   * @param {object} limits maxImageBytes, maxBodyBytes, maxTextChars, maxImages
   * @param {() => void} submit called when the example is to be classified
   */
  constructor(limits, submit) {
    this.#limits = limits;
    this.text = find("text");
    this.model = find("model");
    find("example").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
    addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || event.repeat) return;
      event.preventDefault();
      submit();
    });
    this.text.addEventListener("input", () => this.#checkText());
    this.model.addEventListener("change", () => this.#describe());
  }

  /** The names of the chosen classifiers, in the server's order. */
  get models() {
    return this.model.value === ALL ? [...this.#served.keys()] : [this.model.value];
  }

  get pictures() {
    return [...this.#pictures];
  }

  /** Offer classifiers to choose from, by name, keeping the choice where it is still there. */
  offer(served) {
    const names = [...served.keys()];
    const chosen = this.model.value;
    const had = this.#served.size;
    this.#served = served;
    this.model.replaceChildren(...names.map((name) => make("option", { value: name, textContent: name })));
    if (names.length > 1) this.model.append(make("option", { value: ALL, textContent: texts.models.all(names.length) }));
    if (had && [...this.model.options].some(({ value }) => value === chosen)) this.model.value = chosen;
    find("which").hidden = names.length < 2;
    this.#describe();
  }

  /** Say what the chosen classifiers answer, and suggest the text that they were trained with. */
  #describe() {
    const chosen = this.models.map((name) => this.#served.get(name)).filter(Boolean);
    find("about").replaceChildren(...chosen.map((model) => {
      if (isPanel(model)) return aboutPanel(model);
      const [no, yes] = model.label_names.map(texts.className);
      const band = model.abstention?.[0] < model.abstention?.[1] ? model.abstention.map((end) => texts.probability(end)) : null;
      return make(
        "li", {},
        make("b", {}, named(model.id)), model.version ? make("span", { className: "note" }, ` ${texts.models.version(model.version)}`) : null,
        make("br"), texts.models.yes, named(yes), texts.models.no, named(no),
        make("br"), make("span", { className: "note" }, texts.models.threshold(texts.probability(model.threshold), band)),
      );
    }));
    const [text, ...others] = new Set(chosen.map((model) => model.text ?? ""));
    this.suggest(others.length ? "" : text ?? "");
  }

  /** Put a text into the field, unless a person has written there. */
  suggest(text) {
    if (this.text.value.trim() && this.text.value !== this.#suggested) return;
    this.text.value = text;
    this.#suggested = text;
    find("text-origin").hidden = !text || !this.models.some((name) => this.#served.get(name)?.text === text);
    this.#checkText();
  }

  /** Begin anew with one picture, and a text unless the classifier was trained with one text alone. */
  replace(picture, text) {
    this.#pictures = [picture];
    this.#draw();
    const own = new Set(this.models.map((name) => this.#served.get(name)?.text ?? ""));
    this.text.value = this.#suggested = own.size === 1 && !own.has("") ? [...own][0] : text;
    this.#checkText();
  }

  /** Put an earlier example into the form. */
  restore({ pictures, text, models }) {
    this.#pictures = [...pictures];
    this.text.value = text;
    const choice = models.length > 1 ? ALL : models[0];
    if ([...this.model.options].some(({ value }) => value === choice)) this.model.value = choice;
    this.#draw();
    this.#checkText();
  }

  /** Check what is to be sent; returns whether the server may take it, and otherwise says why beside the field. */
  check() {
    const blank = !this.text.value.trim();
    if (blank) find("text-warning").textContent = texts.warnings.blank;
    this.text.setAttribute("aria-invalid", String(blank));
    if (blank) this.text.focus();
    const tooMuch = this.#checkPictures();
    return !blank && !tooMuch && !textProblem(this.text.value, this.#limits);
  }

  /** Add pictures to the example. */
  add(files) {
    const taken = [...files].filter(mayBePicture);
    this.#pictures.push(...taken);
    this.#draw([...files].filter((file) => !mayBePicture(file)).map(({ name }) => texts.warnings.format(name)));
    if (taken.length) announce(texts.pictures.added(taken.length));
  }

  #remove(index) {
    const [gone] = this.#pictures.splice(index, 1);
    this.#draw();
    // Whoever pressed the button by keyboard stays near: at the next picture, or where pictures are chosen.
    (find("chosen").children[Math.min(index, this.#pictures.length - 1)]?.querySelector(".remove") ?? find("choose")).focus();
    announce(texts.pictures.removed(gone.name));
  }

  #advance(index) {
    const [moved] = this.#pictures.splice(index, 1);
    this.#pictures.splice(index - 1, 0, moved);
    this.#draw();
    const item = find("chosen").children[index - 1];
    (item.querySelector(".earlier") ?? item.querySelector(".remove")).focus();
    announce(texts.pictures.moved(moved.name, index));
  }

  #draw(warnings = []) {
    find("chosen").replaceChildren(...this.#pictures.map((file, index) => make(
      "li", {},
      thumbnail(file),
      make("span", { className: "file" }, make("bdi", {}, file.name), make("span", { className: "note" }, texts.size(file.size))),
      index ? button("↑", () => this.#advance(index), { className: "earlier", "aria-label": texts.actions.earlier(file.name) }) : null,
      button("×", () => this.#remove(index), { className: "remove", "aria-label": texts.actions.remove(file.name) }),
    )));
    this.#checkPictures(warnings);
  }

  /** Say which pictures are too large; returns whether any is. */
  #checkPictures(others = []) {
    const tooLarge = pictureProblems(this.#pictures, this.text.value, this.#limits);
    this.warn([...others, ...tooLarge]);
    return tooLarge.length > 0;
  }

  /** Say what is wrong with files, beside the place for them. */
  warn(warnings) {
    find("picture-warnings").replaceChildren(...warnings.map((words) => make("li", {}, words)));
  }

  #checkText() {
    if (this.text.value !== this.#suggested) find("text-origin").hidden = true;
    const problem = textProblem(this.text.value, this.#limits);
    find("text-warning").textContent = problem;
    this.text.setAttribute("aria-invalid", String(Boolean(problem)));
  }
}
