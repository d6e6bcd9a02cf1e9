// Picture files: which may be sent, how they travel, and small copies for the eye.
import { make } from "./dom.js";
import * as texts from "./texts.js";

const FORMATS = ["image/jpeg", "image/png", "image/webp"];
const SIDE = 192; // pixels of a small copy, twice what it takes on the page
const SMALL = 64; // pixels of the longer side
const DECODED_AT_ONCE = 2;

/** Tell whether a file may be a picture that the server takes; a browser that knows no type is not believed. */
export const mayBePicture = (file) => FORMATS.includes(file.type) || !file.type;

/** Read a file as a data URI, byte for byte. */
export function dataUri(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(`data:${FORMATS.includes(file.type) ? file.type : ""};base64,${reader.result.split(",")[1] ?? ""}`);
    reader.onerror = () => reject(new Error(texts.problem.unreadable(file.name)));
    reader.readAsDataURL(file);
  });
}

/** Tell whether a picture has so few pixels that they are shown as squares where it is enlarged. */
export const isSmall = (width, height) => Math.max(width, height) <= SMALL;

/** Make a small copy of a picture, drawn as soon as it is decoded; words in its place where it cannot be. */
export function thumbnail(file, alt = file.name) {
  const frame = make("span", { className: "thumbnail", role: "img", "aria-label": alt });
  inTurn(() => createImageBitmap(file)).then((bitmap) => {
    const scale = Math.min(1, SIDE / Math.max(bitmap.width, bitmap.height));
    const canvas = make("canvas", {
      width: Math.max(1, Math.round(bitmap.width * scale)),
      height: Math.max(1, Math.round(bitmap.height * scale)),
      className: isSmall(bitmap.width, bitmap.height) ? "few-pixels" : "",
    });
    const pen = canvas.getContext("2d");
    pen.imageSmoothingQuality = "high";
    pen.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    bitmap.close();
    frame.append(canvas);
  }, () => frame.append(texts.pictures.none));
  return frame;
}

/** Show a picture as large as there is room, so that small ones can be seen; words in its place where it cannot be. */
export function largePicture(file) {
  const address = URL.createObjectURL(file);
  const frame = make("span", { className: "large-picture" });
  const image = make("img", { src: address, alt: file.name });
  image.addEventListener("load", () => {
    image.classList.toggle("few-pixels", isSmall(image.naturalWidth, image.naturalHeight));
    frame.style.setProperty("--ratio", String(image.naturalWidth / image.naturalHeight));
    URL.revokeObjectURL(address);
  });
  image.addEventListener("error", () => { URL.revokeObjectURL(address); frame.replaceChildren(thumbnail(file)); });
  frame.append(image);
  return frame;
}

let decoding = 0;
const waits = [];

/** Run few at a time: each decoded photo takes tens of megabytes for a moment. */
async function inTurn(work) {
  if (decoding >= DECODED_AT_ONCE) await new Promise((resolve) => { waits.push(resolve); });
  decoding += 1;
  try {
    return await work();
  } finally {
    decoding -= 1;
    waits.shift()?.();
  }
}
