// The page of a server: what it serves, what is sent, what comes back. Nothing is sent anywhere but to this server.
import { Corrections } from "./answers/corrections.js";
import { isPanel } from "./answers/panels.js";
import { showAnswers, spoken, summary } from "./answers/results.js";
import { announce, button, copyText, find, tell } from "./dom.js";
import { ExampleForm } from "./example.js";
import { offerExamples } from "./examples.js";
import { History } from "./history.js";
import { Intake } from "./intake.js";
import { pictureProblems, textProblem } from "./limits.js";
import { ManyPanel } from "./many/panel.js";
import { dataUri } from "./pictures.js";
import { Refusal, addressOf, classify, explain, listModels, wordsOf } from "./server.js";
import { asCurl, asPython } from "./snippets.js";
import * as texts from "./texts.js";

const AGAIN_AFTER = { loading: 2, draining: 5, failed: 15, offline: 5 }; // seconds; other states wait for a person
const settings = document.body.dataset;
let served = new Map(); // classifiers by name
let state = "starting";
let waiting; // the timer of the next try to connect
let running; // what aborts the request in progress

function enter(next, message) {
  state = next;
  find("state").dataset.state = next;
  find("state").textContent = next === "ready" ? texts.state.ready(served.size - panels(), panels()) : texts.state[next];
  const again = next === "key"
    ? button(texts.actions.reload, () => location.reload())
    : button(texts.actions.again, connect);
  const shown = find("notice").querySelector("p")?.textContent ?? "";
  const words = next === "ready" ? "" : message;
  if (words !== shown) tell(find("notice"), words, ...(next === "loading" ? [] : [again]));
}

const panels = () => [...served.values()].filter(isPanel).length;

/** List what is served, and try again as long as that may change. */
async function connect() {
  clearTimeout(waiting);
  try {
    const models = await listModels(new AbortController().signal);
    served = new Map(models.map((model) => [model.id, model]));
    form.offer(served);
    panel.offer(served);
    enter("ready");
  } catch (error) {
    mind(error);
  }
}

/** Go into the state that an error tells of. */
function mind(error) {
  const known = Object.hasOwn(texts.state, error.kind);
  enter(known ? error.kind : "offline", known ? texts.notice[error.kind] : error.message);
  clearTimeout(waiting);
  const seconds = AGAIN_AFTER[state];
  if (seconds) waiting = setTimeout(() => { if (!document.hidden) connect(); }, 1000 * seconds);
}

async function submit() {
  if (running) return;
  if (state !== "ready") await connect();
  if (state !== "ready") {
    find("notice").scrollIntoView({ block: "nearest" });
    announce(find("notice").textContent);
    return;
  }
  tell(find("problem"), "");
  if (!form.check()) {
    tell(find("problem"), texts.warnings.blocked);
    return;
  }
  const when = new Date();
  const trial = { id: `page ${when.toISOString()}`, pictures: form.pictures, text: form.text.value, models: form.models, when };
  running = new AbortController();
  const { signal } = running;
  show({ busy: true });
  try {
    await ask(trial, signal);
    present(trial);
    history.add(trial, summary(trial));
    announce(spoken(trial));
    find("result").scrollIntoView({ block: "nearest" });
  } catch (error) {
    if (signal.aborted) announce(texts.results.cancelled);
    else fail(error);
  } finally {
    running = undefined;
    show({ busy: false });
  }
}

/** Send an example, and keep with it what came back. */
async function ask(trial, signal) {
  const images = await Promise.all(trial.pictures.map(dataUri));
  const began = performance.now();
  const answer = await classify({ model: trial.models, input: [{ image: images.length ? images : null, text: trial.text }] }, signal);
  trial.seconds = (performance.now() - began) / 1000;
  trial.tokens = answer.usage?.total_tokens ?? 0;
  trial.results = trial.models.map((name, at) => withClassifier(answer.data[at], name, answer.version?.[at]));
}

/** Keep with a result who gave it: what is served may change before it is looked at again. */
function withClassifier(result, model, version) {
  if ((result.model ?? model) !== model) throw new Refusal("other", texts.problem.strange);
  const classifier = served.get(model);
  return { ...result, model, classifier: { ...classifier, version: version ?? classifier.version } };
}

/** Score one row of many. */
async function askRow(row, model, signal) {
  const when = new Date();
  const trial = { id: row.id || `row ${row.number}`, files: row.files, pictures: row.pictures, text: row.text, models: [model], when };
  await ask(trial, signal);
  const [result] = trial.results;
  if (result.error) throw new Refusal("other", String(result.error.message).slice(0, 600));
  row.trial = trial;
  row.when = when;
  return result;
}

function fail(error) {
  if (error instanceof Refusal && Object.hasOwn(texts.state, error.kind)) mind(error);
  tell(find("problem"), wordsOf(error), button(texts.actions.again, submit));
}

function show({ busy }) {
  find("busy").hidden = !busy;
  find("cancel").hidden = !busy;
  find("classify").setAttribute("aria-disabled", String(busy)); // not disabled, or the keyboard would lose its place
  find("answers").classList.toggle("stale", busy);
}

/** Show an answer, and the same request as a program sends it. */
function present(trial) {
  find("nothing").hidden = true;
  showAnswers(trial, async (model) => {
    const images = await Promise.all(trial.pictures.map(dataUri));
    const found = await explain({ model, image: images.length ? images : null, text: trial.text }, new AbortController().signal);
    announce(texts.explanation.done(model));
    return found;
  }, corrections);
  const request = {
    address: addressOf("v1/classify"),
    pictures: trial.pictures,
    text: trial.text,
    models: served.size > 1 ? trial.models : [],
    keyVariable: settings.keyVariable,
  };
  find("curl").textContent = asCurl(request);
  find("python").textContent = asPython(request);
  find("snippets").hidden = false;
}

const limits = {
  maxImageBytes: Number(settings.maxImageBytes),
  maxBodyBytes: Number(settings.maxBodyBytes),
  maxTextChars: Number(settings.maxTextChars),
  maxImages: Number(settings.maxImages),
};

/** Show an earlier answer again, with its example in the form. */
function bringBack(trial) {
  running?.abort();
  form.restore(trial);
  tell(find("problem"), "");
  present(trial);
  find("result").focus();
  announce(`${texts.results.back} ${spoken(trial)}`);
}

const corrections = new Corrections();
const form = new ExampleForm(limits, submit);
const history = new History(bringBack);
const panel = new ManyPanel({
  check: ({ pictures, text }) => [...pictureProblems(pictures, text, limits), textProblem(text, limits)].filter(Boolean).join(" "),
  ask: askRow,
  open: (row) => bringBack(row.trial),
  refused: (error) => { if (Object.hasOwn(texts.state, error.kind)) mind(error); },
  suggest: () => form.text.value,
  corrections,
});
new Intake({ form, panel, maxImages: limits.maxImages });
find("cancel").addEventListener("click", () => { running?.abort(); find("classify").focus(); });
for (const id of ["curl", "python"]) {
  const press = find(`copy-${id}`);
  press.addEventListener("click", () => copyText(find(id), press, texts.actions));
}
addEventListener("online", connect);
addEventListener("beforeunload", (event) => { if (panel.unsaved || corrections.unsaved) event.preventDefault(); });
document.addEventListener("visibilitychange", () => { if (!document.hidden && state !== "ready") connect(); });
connect();
offerExamples((file, text) => { form.replace(file, text); submit(); });
