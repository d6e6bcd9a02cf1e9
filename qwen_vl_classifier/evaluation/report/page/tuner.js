// The threshold slider: reads counts from the table in the page and writes what follows from them. Nothing is loaded.
"use strict";
(() => {
  const element = (id) => document.getElementById(id);
  if (!element("thresholds")) return;
  const { table, stored, low, high, names } = JSON.parse(element("thresholds").textContent);
  const slider = element("threshold");
  const costs = { fn: element("cost-fn"), fp: element("cost-fp") };
  let now = stored; // a place in the table
  const share = (part, whole) => (whole ? part / whole : NaN);
  const percent = (value) => {
    if (Number.isNaN(value)) return "—";
    const rounded = Math.round(1000 * value) / 10;
    return `${(value < 1 ? Math.min(rounded, 99.9) : rounded).toFixed(1)} %`; // never rounded up to all
  };
  const price = (input) => {
    const value = Number(input.value);
    return Number.isFinite(value) && value > 0 ? value : 0;
  };
  const costAt = (row) => row.fn * price(costs.fn) + row.fp * price(costs.fp);
  const round = (value) => value.toLocaleString("en", { maximumFractionDigits: 2 });
  const write = (id, text) => { element(id).textContent = text; };
  const within = (value) => Math.min(Math.max(value, 0), 1);
  const along = (threshold) => within((threshold - low) / (high - low)); // as a share of the histogram's axis
  const place = (id, across, up) => {
    const point = element(id);
    if (!point) return;
    if (up === undefined) {
      point.setAttribute("transform", `translate(${284 * across} 0)`);
    } else {
      point.setAttribute("visibility", Number.isNaN(across + up) ? "hidden" : "visible");
      if (!Number.isNaN(across + up)) {
        point.setAttribute("cx", 62 + 284 * across);
        point.setAttribute("cy", 10 + 220 * (1 - up));
      }
    }
  };

  // At one threshold the mean cost is a straight line over the weight of a miss.
  const drawCosts = ({ tp, fp, fn, tn }) => {
    const line = element("on-cost");
    const most = Number(line.dataset.most);
    const at = (weight) => `${62 + 284 * weight},${10 + 220 * (1 - (weight * fn + (1 - weight) * fp) / (tp + fp + fn + tn) / most)}`;
    line.setAttribute("points", `${at(0)} ${at(1)}`);
    const [miss, alarm] = [price(costs.fn), price(costs.fp)];
    place("cost-weight", miss + alarm ? miss / (miss + alarm) : 0.5);
  };

  const show = () => {
    const row = table[now];
    const { threshold, tp, fp, fn, tn } = row;
    const rows = tp + fp + fn + tn;
    const recall = share(tp, tp + fn);
    const precision = share(tp, tp + fp);
    const written = threshold.toFixed(3);
    for (const name of ["tp", "fp", "fn", "tn"]) write(name, row[name].toLocaleString("en"));
    write("threshold-now", written);
    write("threshold-of-table", written);
    write("accuracy", percent(share(tp + tn, rows)));
    write("precision", percent(precision));
    write("recall", percent(recall));
    write("f1", tp + fp + fn ? ((2 * tp) / (2 * tp + fp + fn)).toFixed(3) : "—");
    write("cost", round(costAt(row)));
    write("told", `At ${written}, ${fp + fn} of ${rows} answers are wrong: ${fn} missed, ${fp} false alarms for \u2068${names[1]}\u2069. Cost: ${round(costAt(row))}.`);
    slider.setAttribute("aria-valuetext", written);
    place("on-histogram", along(threshold));
    place("on-reliability", within(threshold));
    drawCosts(row);
    place("on-roc", share(fp, fp + tn), recall);
    place("on-pr", recall, precision);
  };

  const go = (at) => {
    now = Math.min(Math.max(at, 0), table.length - 1);
    slider.value = String(1000 * along(table[now].threshold));
    show();
  };
  const nearest = (threshold) => table.reduce((best, row, at) => (Math.abs(row.threshold - threshold) < Math.abs(table[best].threshold - threshold) ? at : best), 0);
  const cheapest = () => table.reduce((best, row, at) => (costAt(row) < costAt(table[best]) ? at : best), 0);
  // The slider is as long as the axis above it; at its ends all rows are on one side.
  slider.addEventListener("input", () => {
    const share = Number(slider.value) / 1000;
    now = { 0: 0, 1: table.length - 1 }[share] ?? nearest(low + share * (high - low));
    show();
  });
  // Keys go through the thresholds at which something changes.
  slider.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 10, PageDown: -10 };
    const ends = { Home: 0, End: table.length - 1 };
    const at = ends[event.key] ?? (event.key in steps ? now + steps[event.key] : null);
    if (at === null) return;
    event.preventDefault();
    go(at);
  });
  for (const input of Object.values(costs)) input.addEventListener("input", show);
  element("to-cheapest").addEventListener("click", () => go(cheapest()));
  element("to-stored").addEventListener("click", () => go(stored));
  addEventListener("beforeprint", () => { for (const part of document.querySelectorAll("details")) part.open = true; });
  for (const part of document.querySelectorAll(".tuning")) part.hidden = false;
  go(stored); // a browser that comes back to the page may remember another place
})();
