// What was asked in this session, in memory alone: closing or loading the page anew forgets it.
import { announce, find, make } from "./dom.js";
import { thumbnail } from "./pictures.js";
import * as texts from "./texts.js";

const MOST = 50; // entries; the oldest goes first

export class History {
  #entries = [];
  #pick;

  /** @param {(asked: object) => void} pick called with the entry to bring back */
  constructor(pick) {
    this.#pick = pick;
    find("clear").addEventListener("click", () => this.#clear());
  }

  /** Add an answer, newest first. */
  add(asked, said) {
    const entry = make("li", {}, make(
      "button",
      { type: "button", "aria-label": texts.history.entry(asked.text, said), on: { click: () => this.#pick(asked) } },
      asked.pictures.length ? thumbnail(asked.pictures[0]) : make("span", { className: "thumbnail" }, texts.results.noPicture),
      make(
        "span", { className: "entry" },
        make("span", { className: "quoted", dir: "auto" }, asked.text),
        make("span", { className: "said" }, said),
        make(
          "span", { className: "note" },
          asked.when.toLocaleTimeString("en-GB"),
          asked.pictures.length > 1 ? ` · ${texts.history.pictures(asked.pictures.length)}` : "",
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
