// A slider to try a threshold: what would be yes there. It changes nothing on the server.
import { button, make } from "../dom.js";
import * as texts from "../texts.js";

let sliders = 0; // so far; numbers the labels

/**
 * Make a slider that stands at the classifier's own threshold until it is moved.
 * @param {number} own
 * @param {(value: number, moved: boolean) => string} describe called at each change; says in words what would follow
 */
export function thresholdSlider(own, describe) {
  sliders += 1;
  const id = `try-threshold-${sliders}`;
  const slider = make("input", { id, type: "range", min: 0, max: 1, step: 0.01, autocomplete: "off" });
  const shown = make("output", { for: id, className: "tried" });
  const words = make("p", { className: "note", role: "status" });
  const follow = (value) => {
    const moved = value !== own;
    shown.textContent = texts.probability(value);
    words.textContent = describe(value, moved);
    slider.setAttribute("aria-valuetext", texts.probability(value));
    back.hidden = !moved;
  };
  const back = button(texts.threshold.back(texts.probability(own)), () => { slider.value = String(own); follow(own); slider.focus(); });
  slider.value = String(own);
  slider.addEventListener("input", () => follow(Number(slider.value)));
  follow(own);
  return make("div", {}, make("p", { className: "strength" }, make("label", { for: id }, texts.threshold.label), slider, shown, back), words);
}
