// The form: pictures, text and which classifiers to use.
import { announce, button, find, make } from "./dom.js";
import { mayBePicture, thumbnail } from "./pictures.js";
import * as texts from "./texts.js";

const ALL = ""; // the value of the choice of every classifier; no classifier has an empty name

export class ExampleForm {
  #pictures = [];
  #drags = 0;
  #limits;
  #names = [];

  /**
   * @param {object} limits maxImageBytes, maxBodyBytes, maxTextChars
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
    this.#takeFiles();
    this.#takeDrops();
    this.#takePastes();
  }

  /** The names of the chosen classifiers, in the server's order. */
  get models() {
    return this.model.value === ALL ? [...this.#names] : [this.model.value];
  }

  get pictures() {
    return [...this.#pictures];
  }

  /** Offer classifiers to choose from, keeping the choice where it is still there. */
  offer(names) {
    const chosen = this.model.value;
    const had = this.#names.length;
    this.#names = names;
    this.model.replaceChildren(...names.map((name) => make("option", { value: name, textContent: name })));
    if (names.length > 1) this.model.append(make("option", { value: ALL, textContent: texts.models.all(names.length) }));
    if (had && [...this.model.options].some(({ value }) => value === chosen)) this.model.value = chosen;
    find("which").hidden = names.length < 2;
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
    return !blank && !tooMuch && this.#lengthOf() <= this.#limits.maxTextChars;
  }

  #takeFiles() {
    for (const [press, input] of [["choose", find("files")], ["photograph", find("camera")]]) {
      find(press).addEventListener("click", () => input.click());
      input.addEventListener("change", () => {
        this.#add(input.files);
        input.value = ""; // so that the same file can be chosen again
      });
    }
  }

  #takeDrops() {
    const withFiles = (event) => event.dataTransfer?.types.includes("Files");
    const show = (change) => {
      this.#drags = Math.max(0, this.#drags + change);
      find("drop").classList.toggle("over", this.#drags > 0);
    };
    addEventListener("dragenter", (event) => { if (withFiles(event)) show(1); });
    addEventListener("dragleave", (event) => { if (withFiles(event)) show(-1); });
    // A browser opens what is dropped, and the page would be gone; only into the text may words be dropped.
    addEventListener("dragover", (event) => { if (withFiles(event) || event.target !== this.text) event.preventDefault(); });
    addEventListener("drop", (event) => {
      this.#drags = 0;
      show(0);
      const files = event.dataTransfer?.files ?? [];
      if (!files.length && event.target === this.text) return;
      event.preventDefault();
      if (files.length) this.#add(files);
      else this.#warn([texts.warnings.noFiles]);
    });
  }

  #takePastes() {
    addEventListener("paste", (event) => {
      const files = event.clipboardData?.files ?? [];
      // Office programs put a picture of the text beside the text: within the field, words are what is meant.
      const words = event.target === this.text && event.clipboardData?.types.includes("text/plain");
      if (!files.length || words) return;
      event.preventDefault();
      this.#add(files);
    });
  }

  #add(files) {
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
    const { maxImageBytes, maxBodyBytes } = this.#limits;
    const tooLarge = this.#pictures
      .filter(({ size }) => size > maxImageBytes)
      .map(({ name, size }) => texts.warnings.bytes(name, size, maxImageBytes));
    // As base64, four bytes for three, with some room for text and names.
    const total = this.#pictures.reduce((sum, { size }) => sum + 4 * Math.ceil(size / 3), 0) + 6 * this.text.value.length + 1000;
    if (!tooLarge.length && total > maxBodyBytes) tooLarge.push(texts.warnings.total(total, maxBodyBytes));
    this.#warn([...others, ...tooLarge]);
    return tooLarge.length > 0;
  }

  #warn(warnings) {
    find("picture-warnings").replaceChildren(...warnings.map((words) => make("li", {}, words)));
  }

  #checkText() {
    const length = this.#lengthOf();
    const most = this.#limits.maxTextChars;
    find("text-warning").textContent = length > most ? texts.warnings.length(length, most) : "";
    this.text.setAttribute("aria-invalid", String(length > most));
  }

  /** Count as the server does: characters, not the halves in which scripts hold some of them. */
  #lengthOf() {
    return [...this.text.value].length;
  }
}
