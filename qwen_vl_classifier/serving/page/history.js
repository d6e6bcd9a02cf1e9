// The trials of this session, in memory alone: closing or reloading the page forgets them.
import { announce, find, make } from "./dom.js";
import { thumbnail } from "./pictures.js";
import * as texts from "./texts.js";

const MOST = 50; // entries; the oldest goes first

export class History {
  #entries = [];
  #pick;

  /** @param {(trial: object) => void} pick called with the entry to bring back */
  constructor(pick) {
    this.#pick = pick;
    find("clear").addEventListener("click", () => this.#clear());
  }

  /** Add an answer, newest first. */
  add(trial, outcome) {
    const entry = make("li", {}, make(
      "button",
      { type: "button", on: { click: () => this.#pick(trial) } },
      make("span", { className: "unseen" }, texts.history.entry),
      trial.pictures.length ? thumbnail(trial.pictures[0]) : make("span", { className: "thumbnail" }, texts.results.noPicture),
      make(
        "span", { className: "entry" },
        make("span", { className: "quoted", dir: "auto" }, trial.text),
        make("span", { className: "outcome" }, outcome),
        make(
          "span", { className: "note" },
          trial.when.toLocaleTimeString("en-GB"),
          trial.pictures.length > 1 ? ` · ${texts.history.pictures(trial.pictures.length)}` : "",
        ),
      ),
    ));
    find("history").prepend(entry);
    this.#entries.unshift(entry);
    for (const old of this.#entries.splice(MOST)) old.remove();
    find("past").hidden = false;
  }

  #clear() {
    this.#entries = [];
    find("history").replaceChildren();
    find("past").hidden = true;
    find("text").focus();
    announce(texts.results.cleared);
  }
}
