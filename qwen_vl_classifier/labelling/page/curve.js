// The learning curve as a drawing: what was measured, with intervals; the fitted curve; the band in which it levels off.
import * as words from "./words.js";

const [WIDTH, HEIGHT] = [330, 170];
const [LEFT, RIGHT, TOP, BOTTOM] = [40, 14, 8, 32];
const STEPS = [0.01, 0.02, 0.05, 0.1, 0.2, 0.25]; // between lines of the grid
const MOST_LINES = 5;
const BEYOND = 1.25; // how far the axis goes beyond the last point

/** Make an element of a drawing: attributes by name, children as elements or text. */
function draw(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, String(value));
  made.append(...children);
  return made;
}

/** Draw a curve as `progress` gives it. */
export function drawCurve({ points, fit, level, metric, sentence }) {
  const longest = BEYOND * Math.max(...points.map(([labels]) => labels), 1);
  const line = (fit ?? []).filter(([labels]) => labels <= longest);
  const seen = [...points.flatMap(([, ...values]) => values), ...line.map(([, value]) => value), ...(level ?? [])].filter(Number.isFinite);
  const [low, high, step] = rangeOf(seen);
  const x = (labels) => LEFT + (labels / longest) * (WIDTH - LEFT - RIGHT);
  const y = (value) => TOP + ((high - Math.min(high, Math.max(low, value))) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const name = words.curve.metric[metric] ?? words.curve.metric.accuracy;
  const write = metric === "auroc" ? words.estimate.ratio : words.percent;
  const drawing = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", class: "curve", "aria-label": words.curve.alt(name, sentence) });
  for (let value = low; value <= high + step / 2; value += step) {
    drawing.append(
      draw("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }),
      draw("text", { class: "tick", x: LEFT - 5, y: y(value) + 4, "text-anchor": "end" }, write(value)),
    );
  }
  for (const labels of ticks(longest)) {
    drawing.append(draw("text", { class: "tick", x: x(labels), y: HEIGHT - BOTTOM + 15, "text-anchor": "middle" }, labels.toLocaleString("en")));
  }
  drawing.append(draw("text", { class: "tick", x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, words.curve.axis));
  if (level) {
    drawing.append(
      draw("rect", { class: "level", x: LEFT, width: WIDTH - LEFT - RIGHT, y: y(level[2]), height: Math.max(1, y(level[1]) - y(level[2])) }, draw("title", {}, words.curve.level(level))),
      draw("line", { class: "level-line", x1: LEFT, x2: WIDTH - RIGHT, y1: y(level[0]), y2: y(level[0]) }),
    );
  }
  if (line.length > 1) drawing.append(draw("polyline", { class: "fit", points: line.map(([labels, value]) => `${x(labels).toFixed(1)},${y(value).toFixed(1)}`).join(" ") }));
  for (const [labels, value, below, above] of points) {
    drawing.append(
      draw("line", { class: "whisker", x1: x(labels), x2: x(labels), y1: y(below), y2: y(above) }),
      draw("circle", { class: "point", cx: x(labels), cy: y(value), r: 3.5 }, draw("title", {}, words.curve.point(labels, value))),
    );
  }
  return drawing;
}

/** Choose lines of the grid around values, so that all of them lie between the first and the last. */
function rangeOf(values) {
  const [least, most] = [Math.min(...values), Math.max(...values)];
  const step = STEPS.find((size) => Math.ceil(most / size) - Math.floor(least / size) <= MOST_LINES) ?? STEPS.at(-1);
  const low = Math.floor(least / step + 1e-9) * step;
  const high = Math.ceil(most / step - 1e-9) * step;
  return high > low ? [low, high, step] : [low - step, high + step, step];
}

/** Choose round numbers of labels along the axis. */
function ticks(longest) {
  const raw = longest / 4;
  const size = 10 ** Math.floor(Math.log10(raw));
  const step = Math.max(1, [1, 2, 5, 10].map((factor) => factor * size).find((candidate) => candidate >= raw));
  return Array.from({ length: Math.floor(longest / step) + 1 }, (_, at) => at * step);
}
