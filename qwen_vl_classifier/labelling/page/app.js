// The page of `label`: one question at a time. The next one is shown when the server has the answer on its disk, not before.
import { Answers } from "./answers.js";
import { Refusal, getQuestions, getSetup, postAnswer, postFinish, postUndo } from "./api.js";
import { announce, button, find, make, tell } from "./dom.js";
import { Figures } from "./figures.js";
import { Finish } from "./finish.js";
import { watchKeys } from "./keys.js";
import { Pictures } from "./pictures.js";
import { watchSwipes } from "./swipe.js";
import { browserId } from "./window.js";
import * as words from "./words.js";

const AHEAD = 4; // questions that are read ahead
const POLL = { busy: 1, idle: 10, elsewhere: 2 }; // seconds between looks at the progress
const LONGEST_WAIT = 15; // seconds between tries to reach the server again
const MEASURES = 500; // that are kept for those who look at them

let setup;
let answers;
let figures;
let question = null; // the current one
let coming = []; // those after it
let progress = null;
let seen = 0; // when the current question came into view, or 0 while it has not
let pressed = 0; // when the last answer was given
let pending = null; // the answer that no server has confirmed
let busy = false; // a request that changes something is on its way
let undone = false; // the current question came back by undo
let given = new Map(); // answers to other labels of the current row
let failures = 0; // tries in a row that did not reach the server
let timer; // of the next try, or of the next look at the progress
let saved = false; // an answer was saved since the page was opened
let resting = false; // "more labels would hardly help" was put aside
let id;

const pictures = new Pictures(() => { if (question && !seen) watchForPaint(); });
const finish = new Finish(async () => {
  const latest = await postFinish();
  showProgress(latest);
  return latest;
});

/** Get what is labelled, and the first question; begin again where a server has been started again. */
async function connect() {
  if (busy) return;
  clearTimeout(timer);
  try {
    const found = await getSetup();
    if (setup && sessionOf(found) !== sessionOf(setup)) {
      halt();
      return;
    }
    if (!setup) begin(found);
    const again = failures > 0;
    const waiting = pending;
    if (waiting) {
      await send();
      if (pending) return; // still in trouble
    } else {
      take(await getQuestions(id, AHEAD));
    }
    if (again) announce(waiting ? words.spoken.savedAfterAll : words.spoken.connected);
  } catch (error) {
    mind(error);
  }
}

/** What must be the same for the page to go on after the server was started again. */
const sessionOf = ({ data, out, labels, one_of }) => JSON.stringify([data, out, labels, one_of]);

function begin(found) {
  setup = found;
  answers = new Answers(setup, answer);
  figures = new Figures(setup);
  const [label] = setup.labels;
  const binary = !setup.one_of;
  const [yes, no] = binary ? (setup.labels.length > 1 ? ["yes", "no"] : [words.className(label.yes), words.className(label.no)]) : [];
  const rows = [...(binary ? words.keys.binary(yes, no) : words.keys.classes(setup.labels.length)), ...words.keys.common];
  find("keys").tBodies[0].replaceChildren(...rows.map(([key, meaning]) => make("tr", {}, make("th", { scope: "row" }, ...keyCaps(key)), make("td", {}, meaning))));
  find("help-touch").textContent = binary ? words.keys.swipe(yes, no) : words.keys.tap;
}

/** Write keys as keys, and words between them as words. */
const keyCaps = (keys) => keys.split(/( or | to )/).map((part, at) => (at % 2 ? part : make("kbd", {}, part)));

/** Show what a server answered: the current question and the progress. */
function take({ questions, progress: latest }, { back = false } = {}) {
  failures = 0;
  const [next = null, ...after] = questions;
  if (next?.key !== question?.key) given = new Map();
  undone = back;
  question = next;
  coming = after;
  const place = pictures.show(question);
  showQuestion();
  tell(find("notice"), "");
  enter("ready");
  seen = 0;
  find("stage").ariaBusy = String(Boolean(question)); // until it is in view
  if (question && place) watchForPaint();
  // After the paint, so that the next row does not wait for them.
  afterPaint(() => {
    pictures.preload(coming);
    showProgress(latest);
  });
}

function showQuestion() {
  const asked = question ? questionOf(question) : "";
  find("card").hidden = !question;
  find("controls").hidden = false;
  find("answers").hidden = !question;
  find("filter-field").hidden = !question || !answers.filtered;
  for (const name of ["unsure", "skip"]) find(name).hidden = !question;
  find("end").hidden = Boolean(question);
  if (!question) return;
  answers.show(question);
  answers.mark(null);
  answers.clear();
  find("question").textContent = asked;
  find("question").classList.toggle("unseen", setup.one_of || (setup.labels.length < 2 && setup.labels[0].name === "label"));
  find("text").textContent = question.text;
  find("text").hidden = !question.text;
  find("text").scrollTop = 0;
  find("name").textContent = question.name;
  const source = words.sources[question.source] ?? question.source;
  find("source").textContent = source ? ` · ${source}` : "";
  const answer = question.before ? answers.nameOf(question, question.before) : "";
  const kind = undone ? "undone" : question.source === "check" ? "check" : "other";
  find("before").textContent = answer ? words.before[kind](answer) : "";
  find("before").hidden = !answer;
  showSteps();
}

function questionOf({ label }) {
  if (setup.one_of) return words.question.classes;
  return setup.labels.length > 1 || setup.labels[0].name !== "label" ? words.question.label(label ?? setup.labels[0].name) : words.question.one;
}

/** Show the labels of this row: which are answered, which one is asked now. */
function showSteps() {
  const several = !setup.one_of && setup.labels.length > 1;
  find("steps").hidden = !several;
  if (!several) return;
  find("steps").replaceChildren(...setup.labels.map(({ name }) => {
    const current = name === question.label;
    const answer = given.get(name);
    return make(
      "li",
      { className: current ? "current" : answer ? "done" : "", ...(current && { "aria-current": "step" }) },
      make("bdi", {}, name),
      answer ? make("span", {}, ` ${answers.nameOf({ label: name }, answer)}`) : null,
    );
  }));
}

/** From when on the current question is in view, and so can be answered. */
function watchForPaint() {
  const shown = question;
  afterPaint(() => {
    if (question !== shown || seen || !pictures.ready) return;
    seen = performance.now();
    find("stage").ariaBusy = "false";
    if (pressed) measure("answer to next row", seen);
    pressed = 0;
  });
}

/** Keep how long something took since the last answer, for those who look at it. */
function measure(name, end) {
  performance.measure(name, { start: pressed, end });
  if (performance.getEntriesByName(name).length > MEASURES) performance.clearMeasures(name);
}

/** Call back when what was just changed has been painted. A page in the background paints nothing and need not wait. */
function afterPaint(act) {
  if (document.hidden) {
    setTimeout(act, 0);
    return;
  }
  requestAnimationFrame(() => {
    const channel = new MessageChannel();
    channel.port1.onmessage = act;
    channel.port2.postMessage(null);
  });
}

/** Whether an answer would be one to what is in view. */
const answerable = () => Boolean(question && seen && !busy && !pending && !document.querySelector("dialog[open]"));

function answer(word) {
  if (!answerable()) return;
  pressed = performance.now();
  const seconds = Math.min(86_400, Math.round(pressed - seen) / 1000);
  pending = { browser: id, key: question.key, label: question.label, answer: word, seconds };
  answers.mark(word);
  find("stage").ariaBusy = "true";
  enter("saving");
  send();
}

/** Send the answer that is not confirmed yet. */
async function send() {
  const { label, answer: word } = pending;
  const name = answers.nameOf({ label }, word);
  busy = true;
  try {
    const answered = await postAnswer(pending);
    if (pressed) measure("answer to confirmation", performance.now());
    pending = null;
    saved = true;
    const key = question?.key;
    const before = new Map(given).set(label, word);
    take(answered);
    if (question?.key === key) {
      given = before;
      showSteps();
    }
    speak(words.spoken.saved(name));
  } catch (error) {
    pressed = 0;
    if (!(error instanceof Refusal) || !error.passing) {
      pending = null;
      answers.mark(null);
      find("stage").ariaBusy = "false";
    }
    mind(error, name);
  } finally {
    busy = false;
  }
}

async function undo() {
  if (busy || pending || !setup) return;
  busy = true;
  enter("saving");
  const before = question;
  try {
    const answered = await postUndo(id);
    take(answered, { back: true });
    const same = before && question && before.key === question.key && before.label === question.label;
    undone = !same;
    if (question) showQuestion();
    speak(same ? words.spoken.nothingToUndo : words.spoken.undone);
  } catch (error) {
    // Not sent again: the server may have taken an answer back before the connection broke.
    mind(error, "", words.trouble.undo);
  } finally {
    busy = false;
  }
}

/** Say to those who do not see the page what was done, and what is asked now. */
function speak(done) {
  announce([done, question ? words.spoken.next(questionOf(question), question.text, question.name) : words.end.title].join(" "));
}

/** Show the state of the connection. */
function enter(state) {
  find("state").dataset.state = { saving: "ready", key: "failed", unsaved: "failed", other: "failed" }[state] ?? state;
  find("state").textContent = words.state[state === "ready" && saved ? "saved" : state];
}

/** Say what went wrong, and try again where that may help. */
function mind(error, name = "", more = "") {
  const kind = error instanceof Refusal ? error.kind : "defect";
  if (kind === "defect") throw error;
  const lines = [error.message, pending ? words.trouble.pending(words.short(name || answers.nameOf(pending, pending.answer))) : more];
  if (!error.passing) {
    enter("ready");
    if (kind === "not_current") Promise.resolve().then(connect).then(() => tell(find("notice"), error.message));
    else tell(find("notice"), lines.join(" ").trim());
    return;
  }
  enter(kind);
  failures += 1;
  if (!pending) lines.push(words.trouble.waits);
  const message = lines.filter(Boolean).join(" ");
  // The same words are not read to a person again at every try.
  if (find("notice").querySelector("p")?.textContent !== message) tell(find("notice"), message, button(words.actions.again, connect));
  clearTimeout(timer);
  timer = setTimeout(connect, 1000 * Math.min(LONGEST_WAIT, 2 ** (failures - 1)));
}

/** The server labels something else now: nothing of this page may be sent to it. */
function halt() {
  clearTimeout(timer);
  enter("other");
  tell(find("notice"), words.trouble.other, button(words.actions.reload, () => location.reload()));
  seen = 0;
  pending = null;
}

function showProgress(latest) {
  progress = latest;
  const { answered, rows } = progress;
  find("count").textContent = words.progress.count(answered, rows);
  find("bar").max = Math.max(1, rows);
  find("bar").value = rows - progress.left;
  document.title = words.progress.title(answered, rows, setup.title);
  figures.show(progress);
  finish.show(progress);
  showEnd();
  showStop();
  plan();
}

function showEnd() {
  if (question || !progress) return;
  const elsewhere = progress.left > 0;
  const key = `${elsewhere} ${progress.left}`;
  if (find("end").dataset.shown === key && find("end").childElementCount) return;
  find("end").dataset.shown = key;
  find("end").replaceChildren(
    make("h2", {}, elsewhere ? words.end.elsewhereTitle : words.end.title),
    make("p", {}, elsewhere ? words.end.elsewhere(progress.left) : words.end.words(progress.rows)),
    make("p", { className: "buttons" }, button(words.actions.finish, () => finish.open(), { className: "primary" })),
  );
}

/** Suggest to stop, once, where more labels would hardly help. */
function showStop() {
  const curves = progress.labels.map(({ curve }) => curve).filter(Boolean);
  const stop = !resting && question && curves.length === progress.labels.length && curves.length > 0 && curves.every((curve) => curve.stop);
  const sentence = stop ? (curves.length === 1 && curves[0].sentence) || words.spoken.stop : "";
  if ((find("stop").querySelector("p")?.textContent ?? "") === sentence) return;
  tell(find("stop"), sentence, button(words.actions.finish, () => finish.open()), button(words.actions.dismiss, () => { resting = true; showStop(); }));
}

/** Look at the progress again after a while: answers of others, a refit that ends, a training. */
function plan() {
  clearTimeout(timer);
  const seconds = !question && progress.left > 0 ? POLL.elsewhere : progress.refit.running || finish.running ? POLL.busy : POLL.idle;
  timer = setTimeout(look, 1000 * seconds);
}

/** Get the progress; the server also learns that this window is still there, and keeps its rows for it. */
async function look() {
  if (document.hidden && !finish.running) return; // becoming visible looks again
  if (busy || pending) return; // its answer brings the progress
  const asked = question;
  try {
    const found = await getQuestions(id, AHEAD);
    if (busy || pending || question !== asked) return; // what is shown is newer
    if (question || !found.questions.length) showProgress(found.progress);
    else take(found);
  } catch (error) {
    if (!busy && !pending) mind(error);
  }
}

/** Do what a key stands for; returns whether it stands for something. */
function press(key) {
  const help = find("help");
  if (document.querySelector("dialog[open]")) {
    if (!help.open || (key !== "h" && key !== "/")) return false;
    help.close();
    return true;
  }
  if (key === "h" || key === "/") {
    help.showModal();
    return true;
  }
  if (!setup) return false;
  const word = answers.ofKey(key) ?? { s: "skip", "?": "unsure" }[key];
  const act = word ? () => answer(word) : {
    u: undo,
    z: () => pictures.zoom(),
    p: () => pictures.turn(),
    f: find("filter-field").hidden ? undefined : () => find("filter").focus(),
  }[key];
  act?.();
  return Boolean(act);
}

watchKeys(press);
watchSwipes({
  allowed: () => Boolean(setup && !setup.one_of && answerable() && !pictures.enlarged),
  names: () => ({ yes: answers.nameOf(question, "yes"), no: answers.nameOf(question, "no") }),
  answer,
});
find("undo").addEventListener("click", undo);
find("unsure").addEventListener("click", () => answer("unsure"));
find("skip").addEventListener("click", () => answer("skip"));
find("help-open").addEventListener("click", () => find("help").showModal());
find("help-close").addEventListener("click", () => find("help").close());
addEventListener("online", () => { if (failures) connect(); });
addEventListener("beforeunload", (event) => { if (pending) event.preventDefault(); });
document.addEventListener("visibilitychange", () => {
  if (document.hidden) return;
  if (failures) connect();
  else if (progress) look();
});
id = await browserId();
connect();
