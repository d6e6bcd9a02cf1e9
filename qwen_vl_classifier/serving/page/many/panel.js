// Many examples: a table or a folder is opened, its rows are scored in this browser, looked through and downloaded.
import { isPanel } from "../answers/panels.js";
import { thresholdSlider } from "../answers/threshold.js";
import { announce, button, download, find, make, tell } from "../dom.js";
import { Refusal, wordsOf } from "../server.js";
import * as texts from "../texts.js";
import { TableError, decode, readTable } from "./csv.js";
import * as many from "./many_texts.js";
import { scoredCsv } from "./output.js";
import { hasClasses, readingOf, stateOfClass } from "./reading.js";
import { RowTable, stateOf } from "./rowtable.js";
import { isWaiting, score } from "./scoring.js";
import { Pictures, guessColumns, pictureRows, tableRows } from "./sources.js";

const MOST_ROWS = 50_000;
const MOST_COUNTED = 20; // labels or classes
const REDRAWN_AFTER = 250; // milliseconds

export class ManyPanel {
  #served = new Map();
  #table = null; // what `readTable` gives, or null for pictures alone
  #files = []; // pictures, each a row, where there is no table
  #pictures = new Pictures();
  #name = ""; // of the table or folder
  #rows = [];
  #running = null; // what aborts the run
  #tried = null; // the threshold that is tried, or null for the classifier's own
  #drawing = null; // the timer of the next drawing
  #saved = true;
  #decisions = null; // the filters of a classifier

  /**
   * @param {object} how
   * @param {(row: object) => string} how.check says why the server would refuse a row, or ""
   * @param {(row: object, model: string, signal: AbortSignal) => Promise<object>} how.ask scores one row
   * @param {(row: object) => void} how.open shows a scored row as a result of its own
   * @param {(error: Refusal) => void} how.refused told of a refusal that ends a run
   * @param {() => string} how.suggest the text of the form
   * @param {import("../answers/corrections.js").Corrections} how.corrections
   */
  constructor(how) {
    this.how = how;
    this.read = (row) => {
      const found = readingOf(row.result, find("many-label").value);
      if (this.#tried === null) return found;
      const state = found.score >= this.#tried ? "yes" : "no";
      return { ...found, state, words: texts.decisions[state], threshold: this.#tried };
    };
    this.view = new RowTable({
      read: this.read,
      open: how.open,
      marks: (row) => {
        const { of: result } = readingOf(row.result, find("many-label").value);
        return result ? how.corrections.buttons(result, {
          id: row.id || `${this.#name} row ${row.number}`, files: row.files, text: row.text, when: row.when, classifier: result.classifier,
        }) : [];
      },
    });
    find("many-label").addEventListener("change", () => { this.#offerThreshold(); this.view.take(this.#rows); this.#draw(); });
    for (const id of ["text-column", "image-column"]) find(id).addEventListener("change", () => this.#prepare());
    find("same-text").addEventListener("input", () => this.#prepare());
    find("many-model").addEventListener("change", () => { this.#offerLabels(); this.#prepare(); });
    find("many-cancel").addEventListener("click", () => this.#running?.abort());
    find("many-download").addEventListener("click", () => this.#download());
    find("many-again").addEventListener("click", () => this.#startOver());
    find("many-close").addEventListener("click", () => this.#close());
  }

  /** Whether results were not downloaded. */
  get unsaved() {
    return !this.#saved;
  }

  /** Whether a table waits for pictures. */
  get lacksPictures() {
    return !find("many").hidden && this.#running === null && this.#rows.some(({ missing }) => missing);
  }

  get #classifier() {
    return this.#served.get(find("many-model").value);
  }

  /** Offer classifiers to score with. */
  offer(served) {
    this.#served = served;
    const chosen = find("many-model").value;
    find("many-model").replaceChildren(...[...served.keys()].map((name) => make("option", { value: name, textContent: name })));
    if (served.has(chosen)) find("many-model").value = chosen;
    find("many-which").hidden = served.size < 2;
    if (!find("many").hidden && !this.#rows.some(({ result }) => result)) this.#offerLabels();
  }

  /** Open the first of some tables, with the pictures that came along. */
  async openTable([first, ...others], pictures) {
    const { file } = first;
    let table;
    try {
      table = readTable(decode(await file.arrayBuffer()), file.name);
      if (!table.rows.length) throw new TableError("holds no rows");
    } catch (error) {
      this.#reject(error instanceof TableError ? many.problem.unreadable(file.name, error.message) : texts.problem.unreadable(file.name));
      return;
    }
    if (!this.#begin(file.name, table.rows.length)) return;
    this.#table = table;
    this.#pictures.add(pictures);
    const chosen = guessColumns(table.columns);
    this.#offerColumns("text-column", many.columns.same, chosen.text);
    this.#offerColumns("image-column", many.columns.none, chosen.image);
    find("many-source").textContent = many.source.table(file.name, table.rows.length, table.delimiter);
    if (others.length) tell(find("many-problem"), many.source.otherTables(others.map(({ path }) => path)));
    this.#opened();
  }

  /** Open pictures, each of which is an example. */
  openPictures(pictures, folder, others) {
    if (!this.#begin(folder, pictures.length)) return;
    this.#files = pictures;
    find("many-source").textContent = many.source.folder(folder, pictures.length, others);
    this.#opened();
  }

  /** Add pictures that a table names. */
  add(pictures) {
    this.#pictures.add(pictures);
    this.#prepare(this.#rows);
    announce(find("many-missing").textContent || texts.pictures.added(pictures.length));
  }

  #reject(words) {
    find("many").hidden = false;
    tell(find("many-problem"), words);
    find("many-problem").scrollIntoView({ block: "nearest" });
  }

  /** Forget what was open, unless the new one is too large. */
  #begin(name, count) {
    this.#running?.abort();
    this.#running = null;
    tell(find("many-problem"), "");
    if (count > MOST_ROWS) {
      this.#reject(many.problem.tooMany(count, MOST_ROWS));
      return false;
    }
    this.#table = null;
    this.#files = [];
    this.#pictures = new Pictures();
    this.#name = name;
    this.#rows = [];
    return true;
  }

  #opened() {
    for (const part of document.querySelectorAll(".of-table")) part.hidden = !this.#table;
    find("same-text").value = this.#classifier?.text || this.how.suggest();
    find("many-work").hidden = false;
    find("many").hidden = false;
    this.#offerLabels();
    this.#prepare();
    find("many").focus();
    announce(find("many-source").textContent);
  }

  #offerColumns(id, without, chosen) {
    find(id).replaceChildren(
      ...this.#table.columns.map((name) => make("option", { value: name, textContent: name })),
      make("option", { value: "", textContent: without }),
    );
    find(id).value = chosen;
  }

  /** Offer the labels of a panel to look at, and its classes to filter by. */
  #offerLabels() {
    const [model, exclusive] = [this.#classifier, hasClasses(this.#classifier)];
    const labels = isPanel(model) && !exclusive ? model.labels : [];
    find("many-label").replaceChildren(
      make("option", { value: "", textContent: many.labels.all }), ...labels.map(({ name }) => make("option", { value: name, textContent: name })),
    );
    find("many-label").value = "";
    find("many-labels").hidden = !labels.length;
    this.#offerThreshold();
    const filter = find("row-filter");
    this.#decisions ??= [...filter.options];
    const states = exclusive ? model.labels.map(({ name }) => make("option", { value: stateOfClass(name), textContent: name })) : [];
    filter.replaceChildren(...this.#decisions.filter(({ value }) => !exclusive || !["yes", "no", "abstain"].includes(value)));
    filter.options[0].after(...states);
    filter.value = "all";
  }

  /** What is looked at, where that has a threshold: a classifier, or one label of a panel. */
  get #single() {
    const model = this.#classifier;
    return isPanel(model) ? model.labels.find(({ name }) => name === find("many-label").value) : model;
  }

  #offerThreshold() {
    this.#tried = null;
    if (!this.#single) {
      find("many-threshold").replaceChildren();
      find("many-classes").textContent = this.#classifier ? many.labels[hasClasses(this.#classifier) ? "exclusive" : "answers"] : "";
      return;
    }
    const { threshold, label_names: labels } = this.#single;
    const names = labels.map(texts.className);
    find("many-threshold").replaceChildren(thresholdSlider(threshold, (value, moved) => {
      this.#tried = moved ? value : null;
      this.#draw();
      return moved ? many.tried : texts.threshold.own;
    }));
    find("many-classes").textContent = many.classes(names);
  }

  /** Make rows of what is open and chosen; answers are forgotten, but for those of the rows that are given. */
  #prepare(answered = []) {
    const column = (id) => (this.#table ? find(id).value : "");
    const chosen = { text: column("text-column"), image: column("image-column"), id: guessColumns(this.#table?.columns ?? []).id };
    const sameText = chosen.text ? "" : find("same-text").value;
    find("same-text-field").hidden = Boolean(chosen.text);
    this.#rows = this.#table ? tableRows(this.#table, chosen, sameText, this.#pictures) : pictureRows(this.#files, sameText);
    for (const row of this.#rows) row.problem ||= this.how.check(row);
    this.#rows = this.#rows.map((row, at) => (answered[at]?.result ? answered[at] : row));
    this.#saved ||= !answered.length;
    const missing = this.#rows.filter((row) => row.missing).length;
    const unusable = this.#rows.filter((row) => row.problem && !row.missing).length;
    find("many-missing").textContent = [missing ? many.source.missing(missing) : "", unusable ? many.source.unusable(unusable) : ""].join(" ").trim();
    this.view.take(this.#rows);
    this.#draw();
  }

  async #run() {
    this.#running = new AbortController();
    const { signal } = this.#running;
    const model = this.#classifier?.id;
    const rows = this.#rows;
    tell(find("many-problem"), "");
    this.#draw();
    find("many-cancel").focus();
    try {
      await score(rows, {
        send: (row, ended) => this.how.ask(row, model, ended),
        words: wordsOf,
        changed: () => { this.#saved = false; this.#drawSoon(); },
        waiting: (seconds, kind) => tell(find("many-waiting"), seconds ? many.state.waiting[kind](seconds) : ""),
        signal,
      });
    } catch (error) {
      if (!signal.aborted) {
        tell(find("many-problem"), wordsOf(error));
        this.how.refused(error);
      }
    }
    if (this.#running?.signal !== signal) return; // another table was opened meanwhile
    this.#running = null;
    tell(find("many-waiting"), "");
    this.#draw();
    announce(find("many-state").textContent);
    (find("many-start").querySelector("button") ?? find("many-download")).focus();
  }

  #drawSoon() {
    this.#drawing ??= setTimeout(() => this.#draw(), REDRAWN_AFTER);
  }

  /** Draw all that follows from the rows. */
  #draw() {
    clearTimeout(this.#drawing);
    this.#drawing = null;
    const count = { yes: 0, no: 0, abstain: 0, error: 0, waiting: 0 };
    for (const row of this.#rows) {
      const now = stateOf(row, { read: this.read });
      count[now] = (count[now] ?? 0) + 1;
    }
    const waits = this.#rows.filter(isWaiting).length;
    const failed = this.#rows.filter((row) => row.error);
    const [all, done] = [this.#rows.length, this.#rows.length - waits];
    const begun = this.#rows.some((row) => row.result || row.error);
    const running = this.#running !== null;
    find("many-start").replaceChildren(...(running ? [] : [
      waits ? button((begun ? many.actions.proceed : many.actions.score)(waits), () => this.#run(), { className: "primary" }) : null,
      failed.length ? button(many.actions.retry(failed.length), () => { for (const row of failed) row.error = ""; this.#run(); }) : null,
    ].filter(Boolean)));
    find("many-cancel").hidden = !running;
    find("add-pictures").hidden = running || !this.lacksPictures;
    find("many-download").hidden = !begun;
    find("many-again").hidden = running || !begun;
    for (const id of ["text-column", "image-column", "same-text", "many-model"]) find(id).disabled = running || begun;
    Object.assign(find("many-progress"), { max: Math.max(1, all), value: done, hidden: !running });
    find("many-state").textContent = running ? many.state.running(done, all)
      : !begun ? many.state.ready(waits) : waits ? many.state.stopped(done, all) : many.state.done(all, count.error);
    find("many-counts").textContent = begun ? this.#counts(count) : "";
    find("many-threshold").hidden = !begun;
    find("many-filters").hidden = !all;
    this.view.refresh();
  }

  /** Say how many rows each decision, class or label has. */
  #counts(count) {
    if (this.#single) return many.counts(count);
    const { labels } = this.#classifier;
    const of = (name) => this.#rows.filter(({ result }) => result?.labels?.[name]?.decision === "yes").length;
    const found = labels.map(({ name }) => [name, hasClasses(this.#classifier) ? count[stateOfClass(name)] ?? 0 : of(name)]);
    return many.labelCounts(found.slice(0, MOST_COUNTED), found.length - MOST_COUNTED, count.error);
  }

  #download() {
    const moved = this.#tried === null ? null : { threshold: this.#tried, decide: (row) => this.read(row).state };
    const columns = this.#table?.columns ?? ["image"];
    const base = (this.#name || "pictures").replace(/\.\w+$/, "");
    const withText = this.#table && find("text-column").value ? "" : "text";
    download(`${base}-scored.csv`, scoredCsv(this.#rows, columns, { withText, moved, delimiter: this.#table?.delimiter }), "text/csv;charset=utf-8");
    this.#saved = true;
  }

  #startOver() {
    this.#prepare();
    find("many").focus();
  }

  #close() {
    this.#begin("", 0);
    this.#saved = true;
    find("many").hidden = true;
    find("choose-table").focus();
  }
}
