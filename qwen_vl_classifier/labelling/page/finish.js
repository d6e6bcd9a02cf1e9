// "Finish": asks, has the server train, shows how far that is, and then what to do with the classifier.
import { button, copyText, find, make, tell } from "./dom.js";
import * as words from "./words.js";

export class Finish {
  #start;
  #progress = null;
  #view = ""; // what the dialog shows: "confirm", or a state of the training
  #known = ""; // the state that was shown outside of the dialog

  /** @param {() => Promise<object>} start has the server train; resolves to the progress */
  constructor(start) {
    this.#start = start;
    find("finish-open").addEventListener("click", () => this.open());
  }

  get running() {
    return this.#progress?.finish?.state === "running";
  }

  /** Open the dialog: a question at first, while it trains how far it is. */
  open() {
    if (!this.#progress) return;
    this.#render(this.running ? "running" : "confirm");
    if (!find("finish").open) find("finish").showModal();
  }

  /** Take note of the progress. Nobody is interrupted: a dialog that is open follows, else a banner says how it ended. */
  show(progress) {
    this.#progress = progress;
    const state = progress.finish?.state ?? "no";
    if (find("finish").open && this.#view === "running" && state !== "no") this.#render(state);
    if (this.#known === state) return;
    this.#known = state;
    find("finish-open").textContent = state === "running" ? words.finish.titles.running : words.actions.finish;
    const said = state === "done" || state === "failed" ? words.finish.titles[state] : "";
    const box = find("outcome");
    tell(
      box, said,
      button(words.actions.outcome, () => { this.#render(state); find("finish").showModal(); }),
      button(words.actions.hide, () => { box.hidden = true; }),
    );
  }

  async #begin(pressed) {
    pressed.disabled = true;
    try {
      const progress = await this.#start();
      this.#progress = progress;
      this.#render("running");
      this.show(progress);
    } catch (error) {
      this.#render("confirm", error.message);
    }
  }

  #render(view, problem = "") {
    const { finish } = this.#progress;
    const message = finish?.message || { running: words.finish.running, failed: words.finish.failed }[view];
    if (view === "running" && this.#view === "running") {
      find("finish-message").textContent = message;
      return;
    }
    this.#view = view;
    const close = (name, className = "") => button(name, () => find("finish").close(), { className });
    const start = (name) => {
      const pressed = button(name, () => this.#begin(pressed), { className: "primary" });
      return pressed;
    };
    find("finish-title").textContent = words.finish.titles[view];
    const [body, buttons] = {
      confirm: () => [
        [make("p", {}, this.#trainable ? words.finish.confirm(this.#progress.answered) : words.finish.few)],
        this.#trainable ? [start(words.actions.start), close(words.actions.cancel)] : [close(words.actions.close)],
      ],
      running: () => [
        [make("p", { role: "status", id: "finish-message" }, message), make("progress", { "aria-label": words.finish.titles.running }), make("p", { className: "note" }, words.finish.closable)],
        [close(words.actions.close)],
      ],
      done: () => [
        [
          make("p", {}, finish.message || words.finish.done(finish.classifier)),
          finish.report ? make("p", {}, make("a", { href: "report/", target: "_blank", rel: "noopener" }, words.finish.report)) : "",
          ...command(words.finish.serve, finish.command),
          ...command(words.finish.train, finish.train),
        ],
        [close(words.actions.dismiss, "primary")],
      ],
      failed: () => [[make("p", { className: "failed" }, message)], [start(words.actions.again), close(words.actions.close)]],
    }[view]();
    if (problem) body.push(make("p", { className: "failed", role: "alert" }, problem));
    find("finish-body").replaceChildren(...body.filter(Boolean));
    find("finish-buttons").replaceChildren(...buttons);
  }

  /** Whether answers of two kinds have been given. */
  get #trainable() {
    const { labels } = this.#progress;
    return labels.some(({ yes, no }) => yes && no) || labels.filter(({ yes }) => yes).length > 1;
  }
}

/** A command with a button that copies it. */
function command(title, line) {
  if (!line) return [];
  const shown = make("pre", { tabIndex: 0, role: "group", "aria-label": title.replace(/:$/, "") }, line);
  const copy = button(words.actions.copy, () => copyText(shown, copy, words.actions));
  return [make("h3", {}, title), make("div", { className: "command" }, shown, copy)];
}
