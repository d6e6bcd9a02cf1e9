// How files come in: chosen, dropped, pasted or photographed; one example, several examples, or a table.
import { announce, button, find, tell } from "./dom.js";
import { chosenFiles, droppedFiles, isPicture, isSpreadsheet, isTable } from "./many/sources.js";
import * as many from "./many/many_texts.js";
import * as texts from "./texts.js";

export class Intake {
  #drags = 0;

  /**
   * @param {object} how
   * @param {import("./example.js").ExampleForm} how.form takes pictures of one example
   * @param {import("./many/panel.js").ManyPanel} how.panel takes tables, folders and pictures of many examples
   * @param {number} how.maxImages most pictures in one example
   */
  constructor({ form, panel, maxImages }) {
    this.form = form;
    this.panel = panel;
    this.maxImages = maxImages;
    this.#takeChoices();
    this.#takeDrops();
    this.#takePastes();
  }

  #takeChoices() {
    const choices = { choose: "files", photograph: "camera", "choose-table": "table-files", "choose-folder": "folder-files", "add-pictures": "more-files" };
    for (const [press, id] of Object.entries(choices)) {
      const input = find(id);
      find(press).addEventListener("click", () => input.click());
      input.addEventListener("change", () => {
        const found = chosenFiles(input.files);
        if (id === "more-files") this.panel.add(found.files);
        else this.take(found);
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
    addEventListener("dragover", (event) => { if (withFiles(event) || event.target !== this.form.text) event.preventDefault(); });
    addEventListener("drop", async (event) => {
      this.#drags = 0;
      show(0);
      const files = event.dataTransfer?.files ?? [];
      if (!files.length && event.target === this.form.text) return;
      event.preventDefault();
      if (!files.length) this.form.warn([texts.warnings.noFiles]);
      else this.take(await droppedFiles(event.dataTransfer));
    });
  }

  #takePastes() {
    addEventListener("paste", (event) => {
      const files = event.clipboardData?.files ?? [];
      // Office programs put a picture of the text beside the text: within a field, words are what is meant.
      const words = event.target.matches?.("textarea, input") && event.clipboardData?.types.includes("text/plain");
      if (!files.length || words) return;
      event.preventDefault();
      this.take(chosenFiles(files));
    });
  }

  /** Take files, and ask what is meant where several pictures come at once. */
  take({ files, folder }) {
    tell(find("question"), "");
    const tables = files.filter(({ file }) => isTable(file));
    const pictures = files.filter(isPicture);
    const spreadsheet = files.find(({ file }) => isSpreadsheet(file));
    if (tables.length) {
      this.panel.openTable(tables, pictures);
    } else if (spreadsheet && !pictures.length) {
      this.form.warn([many.problem.spreadsheet(spreadsheet.file.name)]);
    } else if (this.panel.lacksPictures && pictures.length) {
      this.panel.add(pictures);
    } else if (folder) {
      if (pictures.length) this.panel.openPictures(pictures, folder, files.length - pictures.length);
      else this.form.warn([many.problem.noPictures]);
    } else if (pictures.length > 1) {
      this.#ask(pictures);
    } else {
      this.#addToExample(files);
    }
  }

  #ask(pictures) {
    const box = find("question");
    const total = this.form.pictures.length + pictures.length;
    const done = (act) => () => { tell(box, ""); act(); };
    const one = button(texts.question.one(pictures.length), done(() => { this.#addToExample(pictures); find("text").focus(); }));
    const several = button(texts.question.several(pictures.length), done(() => this.panel.openPictures(pictures, "", 0)));
    const none = button(texts.question.neither, done(() => find("choose").focus()));
    const fits = total <= this.maxImages;
    tell(box, fits ? texts.question.words(pictures.length) : texts.question.tooMany(pictures.length, this.maxImages), ...(fits ? [one] : []), several, none);
    (fits ? one : several).focus();
    announce(box.querySelector("p").textContent);
  }

  #addToExample(files) {
    const pictures = files.map(({ file }) => file);
    this.form.add(pictures);
  }
}
