// Pictures to try first, drawn by the server itself.
import { find, make } from "./dom.js";
import { addressOf, listExamples } from "./server.js";
import * as texts from "./texts.js";

/**
 * Offer the examples.
 * @param {(file: File, text: string) => void} pick called with the picture and a text about it
 */
export async function offerExamples(pick) {
  let listed;
  try {
    listed = await listExamples(new AbortController().signal);
  } catch {
    return; // the page works without them
  }
  find("example-pictures").replaceChildren(...listed.map(({ name, text }, at) => {
    const image = make("img", { src: addressOf(`page/examples/${name}`), alt: "" });
    const press = make("button", { type: "button", "aria-label": texts.examples.try(at + 1, text), title: text }, image);
    press.addEventListener("click", async () => {
      const content = await (await fetch(image.src)).blob();
      pick(new File([content], name, { type: "image/png" }), text);
    });
    return make("li", {}, press);
  }));
  find("examples").hidden = false;
}
