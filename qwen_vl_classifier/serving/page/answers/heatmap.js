// What moved an answer: colours over the picture, coloured words, and the numbers behind them.
import { button, download, make, named } from "../dom.js";
import { isSmall } from "../pictures.js";
import * as texts from "../texts.js";

// The colours of `explain` on the command line: most kinds of colour blindness tell them apart.
const TOWARDS_1 = [194, 65, 12];
const TOWARDS_0 = [29, 95, 180];
const MOST_WORDS = 20; // in the table
let sliders = 0; // so far; numbers the labels

const largest = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);

/** Draw an explanation, as `/v1/explain` answers it, into an empty box. */
export function drawExplanation(box, { pictures, text }, explanation, { label_names: labels }) {
  const limit = largest(explanation.patches.flat(2));
  const maps = pictures.slice(0, explanation.patches.length).map((file, at) => overlay(file, explanation.patches[at], limit));
  box.append(
    maps.length ? strength(box) : make("p", { className: "note" }, texts.explanation.noPatches),
    make("div", { className: "maps" }, ...maps),
    legend(labels, maps.length ? limit : 0),
    make("h4", {}, texts.explanation.words),
    sentence(text, explanation.words),
    ...summaryOf(explanation),
    make(
      "details", {},
      make("summary", {}, texts.explanation.numbers),
      sums(explanation),
      wordTable(explanation.words),
    ),
    make("p", { className: "note" }, texts.explanation.note),
    save(explanation.heat_map),
  );
}

/** A picture under one square for each image token. */
function overlay(file, grid, limit) {
  const [rows, columns] = [grid.length, grid[0]?.length ?? 0];
  const canvas = make("canvas", { width: columns, height: rows });
  const pen = canvas.getContext("2d");
  const squares = pen.createImageData(columns, rows);
  grid.flat().forEach((value, at) => {
    const opacity = limit ? Math.abs(value) / limit : 0;
    squares.data.set([...(value > 0 ? TOWARDS_1 : TOWARDS_0), Math.round(255 * opacity)], 4 * at);
  });
  pen.putImageData(squares, 0, 0);
  const address = URL.createObjectURL(file);
  const forget = () => URL.revokeObjectURL(address);
  const figure = make("figure", { className: "map" });
  const fit = ({ target }) => {
    figure.style.setProperty("--ratio", String(target.naturalWidth / target.naturalHeight));
    target.classList.toggle("few-pixels", isSmall(target.naturalWidth, target.naturalHeight));
    forget();
  };
  figure.append(make("img", { src: address, alt: file.name, on: { load: fit, error: forget } }), canvas);
  return figure;
}

/** A slider that lets the picture shine through, and a choice to take its own colours away. */
function strength(box) {
  sliders += 1;
  const id = `strength-${sliders}`;
  const slider = make("input", { id, type: "range", min: 0, max: 100, value: 60, autocomplete: "off" });
  const grey = make("input", { id: `${id}-grey`, type: "checkbox", autocomplete: "off" });
  grey.addEventListener("change", () => box.classList.toggle("grey", grey.checked));
  const follow = () => {
    box.style.setProperty("--strength", String(slider.value / 100));
    slider.setAttribute("aria-valuetext", `${slider.value} %`);
  };
  slider.addEventListener("input", follow);
  follow();
  return make(
    "p", { className: "strength" },
    make("label", { for: id }, texts.explanation.strength), slider,
    make("span", {}, grey, make("label", { for: grey.id }, texts.explanation.grey)),
  );
}

function legend(labels, limit) {
  const end = (label, className, value) => make(
    "span", { className },
    make("span", { className: "swatch" }), texts.explanation.towards, named(texts.className(labels[label])),
    limit ? ` (${texts.signed(value)})` : "",
  );
  return make("p", { className: "legend" }, end(0, "zero", -limit), end(1, "one", limit));
}

/** The text as it was written, its words coloured. */
function sentence(text, words) {
  const limit = largest(words.map(({ contribution }) => contribution));
  const parts = [];
  let done = 0;
  for (const { word, contribution } of words) {
    const at = text.indexOf(word, done);
    if (at < 0) continue;
    const span = make("span", {
      className: contribution > 0 ? "word one" : "word zero",
      title: `${texts.signed(contribution)} ${texts.explanation.unit}`,
    }, word);
    span.style.setProperty("--share", String(limit ? Math.abs(contribution) / limit : 0));
    parts.push(text.slice(done, at), span);
    done = at + word.length;
  }
  parts.push(text.slice(done));
  return make("p", { className: "words", dir: "auto" }, ...parts);
}

const row = (name, value, tag = named(name)) =>
  make("tr", {}, make("th", { scope: "row" }, tag), make("td", {}, texts.signed(value, 3)));

const summaryOf = ({ summary }) => summary.map((line) => make("p", { className: "note" }, line));

function sums({ method, patches, words, template, rest, log_odds: total }) {
  const sum = (values) => values.reduce((before, value) => before + value, 0);
  return make(
    "table", {},
    make("caption", {}, texts.explanation.sumCaption),
    make(
      "tbody", {},
      ...patches.map((grid, at) => row(texts.explanation.picture(at + 1, patches.length > 1), sum(grid.flat()))),
      row(texts.explanation.words, sum(words.map(({ contribution }) => contribution))),
      row(texts.explanation.prompt, template),
      row(texts.explanation.rest[method], rest),
      row(texts.explanation.sum, total, make("b", {}, texts.explanation.sum)),
    ),
  );
}

function wordTable(words) {
  const strongest = [...words].sort((a, b) => Math.abs(b.contribution) - Math.abs(a.contribution)).slice(0, MOST_WORDS);
  return make(
    "table", {},
    make("caption", {}, texts.explanation.wordCaption(strongest.length, words.length)),
    make("tbody", {}, ...strongest.map(({ word, contribution }) => row(word, contribution))),
  );
}

/** A button that hands out the server's own drawing, where there is one that is what it should be. */
function save(uri) {
  if (typeof uri !== "string" || !uri.startsWith("data:image/png;base64,")) return null;
  return make("p", { className: "buttons" }, button(texts.actions.save, () => {
    const bytes = Uint8Array.from(atob(uri.slice(uri.indexOf(",") + 1)), (character) => character.charCodeAt(0));
    download("heat-map.png", bytes, "image/png");
  }));
}
