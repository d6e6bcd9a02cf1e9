// The rows of a table or folder, a page at a time, with filter and order: thousands of them cost no more than fifty.
import { button, find, make, named } from "../dom.js";
import { thumbnail } from "../pictures.js";
import * as texts from "../texts.js";
import * as many from "./many_texts.js";
import { classOfState } from "./reading.js";

const ON_A_PAGE = 50;

const ORDERS = {
  row: (one, other) => one.number - other.number,
  high: (one, other, how) => how.read(other).score - how.read(one).score,
  low: (one, other, how) => how.read(one).score - how.read(other).score,
  near: (one, other, how) => distance(how.read(one)) - distance(how.read(other)),
};

const distance = ({ score, threshold }) => Math.abs(score - threshold);

export class RowTable {
  #rows = [];
  #page = 0;
  #shown = []; // the rows on the page, with their elements
  #matching = [];

  /**
   * @param {object} how
   * @param {(row: object) => object} how.read what to show of a row that has a result, as `readingOf` returns it
   * @param {(row: object) => void} how.open called to show a row as a result of its own
   * @param {(row: object) => HTMLElement | null} how.marks what a row's last cell holds, once it has a result
   */
  constructor(how) {
    this.how = how;
    for (const id of ["row-filter", "row-order"]) find(id).addEventListener("change", () => this.#begin());
    find("row-search").addEventListener("input", () => this.#begin());
    find("rows-back").addEventListener("click", () => this.#turn(-1));
    find("rows-on").addEventListener("click", () => this.#turn(1));
  }

  /** Show other rows. */
  take(rows) {
    this.#rows = rows;
    find("row-search").value = "";
    find("row-filter").value = "all";
    find("row-order").value = "row";
    this.#begin();
  }

  /** Show what has changed in rows, their filter and their order. */
  refresh() {
    this.#select();
    this.#draw();
  }

  #begin() {
    this.#page = 0;
    this.refresh();
  }

  #turn(change) {
    this.#page += change;
    this.#draw();
    find("rows-count").scrollIntoView({ block: "nearest" });
  }

  #select() {
    const wanted = find("row-filter").value;
    const words = find("row-search").value.trim().toLowerCase();
    const order = find("row-order").value;
    const fits = (row) => (wanted === "all" || stateOf(row, this.how) === wanted)
      && (!words || row.text.toLowerCase().includes(words) || row.files.some((name) => name.toLowerCase().includes(words)));
    this.#matching = this.#rows.filter(fits);
    if (order !== "row") {
      const scored = this.#matching.filter((row) => row.result).sort((one, other) => ORDERS[order](one, other, this.how));
      this.#matching = [...scored, ...this.#matching.filter((row) => !row.result)];
    }
  }

  #draw() {
    const all = this.#matching.length;
    this.#page = Math.max(0, Math.min(this.#page, Math.ceil(all / ON_A_PAGE) - 1));
    const from = this.#page * ON_A_PAGE;
    const rows = this.#matching.slice(from, from + ON_A_PAGE);
    const before = new Map(this.#shown.map((line) => [line.row, line]));
    const same = rows.length === this.#shown.length && rows.every((row, at) => this.#shown[at].row === row);
    this.#shown = rows.map((row) => before.get(row) ?? lineOf(row, this.how));
    for (const line of this.#shown) update(line, this.how);
    // Left in place where nothing moves, so that the keyboard keeps its place.
    if (!same) find("rows").replaceChildren(...this.#shown.map(({ element }) => element));
    find("rows-count").textContent = many.table.pages(from + 1, from + rows.length, all);
    for (const [id, off] of [["rows-back", from === 0], ["rows-on", from + rows.length >= all]]) find(id).disabled = off;
    find("rows-pages").hidden = all <= ON_A_PAGE;
    find("rows-table").hidden = !all;
  }
}

/** What a row is for the filter. */
export function stateOf(row, { read }) {
  if (row.result) return read(row).state;
  return row.error || row.problem ? "error" : "waiting";
}

function lineOf(row, how) {
  const value = make("td", { className: "number" });
  const verdict = make("td");
  const marks = make("td", { className: "marks" });
  const words = make(
    "td", { className: "words-of-row" },
    row.files.length ? make("span", { className: "note" }, named(row.files.join(", "))) : null,
    make("span", { className: "clamped", dir: "auto" }, row.text),
  );
  const element = make(
    "tr", {},
    make("th", { scope: "row" }, String(row.number)),
    make("td", { className: "small-picture" }, row.pictures.length ? thumbnail(row.pictures[0], row.files[0]) : null),
    words, value, verdict, marks,
  );
  return { row, element, value, verdict, marks, drawn: "" };
}

/** Draw a line again where what it shows has changed. */
function update(line, how) {
  const { row } = line;
  const now = stateOf(row, how);
  const found = row.result ? how.read(row) : null;
  const key = [now, row.error ?? "", found?.words, found?.threshold].join(" ");
  if (line.drawn === key) return;
  line.drawn = key;
  line.element.className = classOfState(now) ? "classed" : now;
  line.value.textContent = found ? many.table.value(found) : "";
  const words = { error: row.error || row.problem, waiting: "" }[now];
  line.verdict.replaceChildren(words === undefined ? make("strong", {}, named(found.words)) : make("span", { className: "failed" }, words));
  if (!row.result) line.marks.replaceChildren();
  else {
    line.marks.replaceChildren(
      button(many.actions.show, () => how.open(row), { "aria-label": many.actions.open(row.number) }),
      ...how.marks(row),
    );
  }
}
