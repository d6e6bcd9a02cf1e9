// The pictures of a row: read ahead and decoded, so that the next row is there at once; shown large, and enlarged on a click.
import { reasonOf } from "./api.js";
import { announce, find, make } from "./dom.js";
import * as words from "./words.js";

const SMALL = 64; // pixels of the longer side up to which pixels are shown as squares
const ENLARGED = 2; // times the size that fits, at least; more where the file has more pixels
const KEPT_BEHIND = 4; // rows that undo may bring back

/** Pictures by address, each decoded before it is needed. */
class Ahead {
  #kept = new Map();

  /** Begin to read a picture, if that has not begun; `ready` tells at its end whether it can be shown. */
  get(url) {
    const known = this.#kept.get(url);
    if (known) return known;
    const image = new Image();
    image.src = url;
    const entry = { image, settled: false, shown: false };
    entry.ready = image.decode().then(() => true, () => false).then((shown) => Object.assign(entry, { settled: true, shown }).shown);
    this.#kept.set(url, entry);
    return entry;
  }

  /** Forget all pictures but these. */
  keep(urls) {
    for (const url of this.#kept.keys()) if (!urls.has(url)) this.#kept.delete(url);
  }

  /** Forget a picture that could not be shown, so that it is read again when it is needed again. */
  retry(url) {
    const known = this.#kept.get(url);
    if (known?.settled && !known.shown) this.#kept.delete(url);
  }
}

export class Pictures {
  #ahead = new Ahead();
  #behind = []; // addresses of the rows before, newest first
  #row = null;
  #at = 0;
  #inView = null; // what is known of the picture in view
  #changed;

  /** @param {() => void} changed called when the picture in view has become another or could be shown at last */
  constructor(changed) {
    this.#changed = changed;
    find("picture").addEventListener("click", (event) => this.zoom(event));
  }

  /** Show the pictures of a row, the first one large; returns whether all that is in view is there already. */
  show(row) {
    if (this.#row && this.#row.key !== row?.key) this.#behind = [this.#row.images, ...this.#behind].slice(0, KEPT_BEHIND);
    const same = this.#row && row && this.#row.key === row.key;
    this.#row = row;
    if (same) return this.ready;
    this.#at = 0;
    const count = row?.images.length ?? 0;
    find("picture").hidden = count === 0;
    find("card").classList.toggle("wordy", count === 0);
    find("strip").hidden = count < 2;
    find("strip").replaceChildren(...(count < 2 ? [] : row.images.map((url, at) => this.#choice(url, at))));
    this.#place();
    return this.ready;
  }

  /** Whether the picture in view is there, or is known to be one that cannot be shown. */
  get ready() {
    return !this.#inView || this.#inView.settled;
  }

  /** Read the pictures of rows that come next, in their order. */
  preload(coming) {
    const urls = new Set([this.#row?.images ?? [], ...coming.map((row) => row.images), ...this.#behind].flat());
    this.#ahead.keep(urls);
    for (const row of coming) for (const url of row.images) this.#ahead.get(url);
  }

  get enlarged() {
    return find("picture").classList.contains("enlarged");
  }

  /** Show the next picture of the row. */
  turn() {
    const count = this.#row?.images.length ?? 0;
    if (count > 1) this.#choose((this.#at + 1) % count);
  }

  /** Enlarge the picture around the place of a click, or make it fit again. */
  zoom(event) {
    const box = find("picture");
    const image = box.querySelector("img");
    if (!image) return;
    if (this.enlarged) {
      this.#fit();
      return;
    }
    const { width, height } = box.getBoundingClientRect();
    const fit = Math.min(width / image.naturalWidth, height / image.naturalHeight);
    const scale = Math.max(1, ENLARGED * fit);
    // Where the click was, as a part of the picture, which may leave room at two sides of its box.
    const at = (offset, room, size) => (offset - (room - size * fit) / 2) / (size * fit);
    const inside = event?.isTrusted && event.target === image;
    const left = inside ? at(event.offsetX, width, image.naturalWidth) : 0.5;
    const top = inside ? at(event.offsetY, height, image.naturalHeight) : 0.5;
    box.classList.add("enlarged");
    box.tabIndex = 0; // so that the keyboard can scroll it
    image.style.width = `${image.naturalWidth * scale}px`;
    image.style.height = `${image.naturalHeight * scale}px`;
    image.title = words.question.fit;
    box.scrollTo(left * image.naturalWidth * scale - width / 2, top * image.naturalHeight * scale - height / 2);
  }

  #fit() {
    const box = find("picture");
    box.classList.remove("enlarged");
    box.removeAttribute("tabindex");
    const image = box.querySelector("img");
    if (!image) return;
    image.style.width = "";
    image.style.height = "";
    image.title = words.question.enlarge;
  }

  #choice(url, at) {
    const count = this.#row.images.length;
    const small = make("img", { src: url, alt: "", decoding: "async" });
    return make("li", {}, make(
      "button",
      { type: "button", "aria-label": words.question.choose(at + 1), title: `${at + 1}/${count}`, on: { click: () => this.#choose(at) } },
      small,
    ));
  }

  #choose(at) {
    this.#at = at;
    this.#place();
    announce(words.question.picture(at + 1, this.#row.images.length, this.#row.name));
    this.#changed();
  }

  #place() {
    const box = find("picture");
    this.#fit();
    box.removeAttribute("role");
    for (const [at, item] of [...find("strip").children].entries()) {
      if (at === this.#at) item.firstChild.setAttribute("aria-current", "true");
      else item.firstChild.removeAttribute("aria-current");
    }
    this.#inView = null;
    if (!this.#row?.images.length) {
      box.replaceChildren();
      return;
    }
    const [row, at] = [this.#row, this.#at];
    this.#ahead.retry(row.images[at]);
    const entry = this.#ahead.get(row.images[at]);
    this.#inView = entry;
    const put = () => {
      if (!entry.shown) {
        const why = make("span", {});
        box.replaceChildren(make("p", { className: "unshown" }, make("strong", {}, words.trouble.picture), why, make("span", {}, words.trouble.pictureHint)));
        reasonOf(row.images[at]).then((reason) => { why.textContent = reason; });
        return;
      }
      const { image } = entry;
      image.decoding = "sync"; // it is decoded: the row and its picture are painted together
      image.draggable = false;
      image.alt = words.question.picture(at + 1, row.images.length, row.name);
      image.title = words.question.enlarge;
      image.style.width = "";
      image.style.height = "";
      image.classList.toggle("few-pixels", Math.max(image.naturalWidth, image.naturalHeight) <= SMALL);
      box.replaceChildren(image);
    };
    if (entry.settled) {
      put();
      return;
    }
    box.replaceChildren(make("p", { className: "unshown" }, words.question.loading));
    entry.ready.then(() => {
      if (this.#row?.key !== row.key || this.#at !== at) return; // another is in view by now
      put();
      this.#changed();
    });
  }
}
