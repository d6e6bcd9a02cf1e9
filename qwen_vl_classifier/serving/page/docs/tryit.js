// Forms on the page of the interface that send a request and show the answer. Without scripts the page has none.
import { find, make } from "../dom.js";
import * as texts from "../texts.js";

const LONGEST = 20_000; // characters of an answer that are shown
const PATIENCE = 120_000; // milliseconds
let model = ""; // the first of several that are served

/** Make the fields of a form that the path and the body ask for, and send what is in them. */
function prepare(form) {
  const { method, path } = form.dataset;
  const id = form.id;
  const names = [...path.matchAll(/\{(\w+)\}/g)].map(([, name]) => name);
  for (const name of names) {
    form.prepend(make("p", {}, make("label", { for: `${id}-${name}` }, name), make("input", { id: `${id}-${name}`, type: "text", name, autocomplete: "off" })));
  }
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const press = form.querySelector("[type=submit]");
    const status = form.querySelector(".answer-status");
    if (press.getAttribute("aria-disabled") === "true") return;
    press.setAttribute("aria-disabled", "true"); // not disabled, or the keyboard would lose its place
    status.textContent = texts.tryIt.sending;
    const began = performance.now();
    try {
      const response = await fetch(addressFor(path, names, form), { method, ...requestOf(form, method), signal: AbortSignal.timeout(PATIENCE), cache: "no-store", redirect: "error" });
      const shown = await wordsOf(response);
      status.textContent = texts.tryIt.answered(response.status, (performance.now() - began) / 1000, response.headers.get("Retry-After"));
      show(form, shown);
    } catch (error) {
      status.textContent = error.name === "TimeoutError" ? texts.problem.late : texts.problem.offline;
      show(form, "");
    }
    press.removeAttribute("aria-disabled");
  });
  form.hidden = false;
}

function addressFor(path, names, form) {
  const filled = names.reduce((before, name) => before.replace(`{${name}}`, encodeURIComponent(form.elements[name].value)), path);
  return new URL(filled.slice(1), new URL(".", location.origin + location.pathname)).href;
}

function requestOf(form, method) {
  const key = find("key").value;
  const headers = { Accept: "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  // With a key of its own, a request takes none that the browser keeps for this page, and a wrong one opens no dialog.
  const credentials = key ? "omit" : "same-origin";
  const { body, image, text } = form.elements;
  if (method === "GET" || !body) return { headers, credentials };
  if (!image?.files.length) return { headers: { ...headers, "Content-Type": "application/json" }, credentials, body: body.value };
  const fields = new FormData();
  fields.append("image", image.files[0]);
  fields.append("text", text.value);
  if (model) fields.append("model", model);
  return { headers, credentials, body: fields };
}

async function wordsOf(response) {
  const content = await response.text();
  let words = content;
  try {
    words = JSON.stringify(JSON.parse(content), null, 2);
  } catch { /* not JSON: shown as it is */ }
  return words.length > LONGEST ? `${words.slice(0, LONGEST)}\n${texts.tryIt.cut(words.length)}` : words;
}

function show(form, words) {
  form.querySelector("pre")?.remove();
  if (words) form.append(make("pre", { tabIndex: 0, role: "group", "aria-label": texts.tryIt.answer }, words));
}

/** Name a classifier in the bodies where several are served, since a request must then say which. */
async function nameModel() {
  try {
    const response = await fetch(new URL("v1/models", new URL(".", location.origin + location.pathname)), { cache: "no-store", redirect: "error" });
    const { data } = await response.json();
    if (data.length < 2) return;
    model = data[0].id;
  } catch {
    return; // the examples stay as they are
  }
  for (const body of document.querySelectorAll("[data-takes-model]")) {
    const content = JSON.parse(body.value);
    if (!Object.hasOwn(content, "model")) body.value = JSON.stringify({ model, ...content }, null, 2);
  }
}

for (const form of document.querySelectorAll("form.try")) prepare(form);
find("keys").hidden = false;
nameModel();
