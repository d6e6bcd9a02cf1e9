// Requests to the server of `label`. Whatever goes wrong becomes a `Refusal` of a known kind, with words that may be shown.
import * as words from "./words.js";

const PATIENCE = 30; // seconds that a request may take
const LONGEST_DETAIL = 600; // characters of an answer that is shown

export class Refusal extends Error {
  /**
   * @param {"offline"|"key"|"unsaved"|"not_current"|"other"} kind what kind of trouble it is; of the first three,
   *   the same request may succeed later
   * @param {string} detail what the server says itself, if anything
   */
  constructor(kind, message, detail = "") {
    super(message);
    this.kind = kind;
    this.detail = detail;
  }

  get passing() {
    return ["offline", "key", "unsaved"].includes(this.kind);
  }
}

/** Where a route is; built without what follows the path in the address of the page. */
const addressOf = (route) => new URL(route, location.origin + location.pathname).href;

export const getSetup = () => call("api/setup");

/** Return the current question of a browser first, then those that follow, and the progress. */
export const getQuestions = (browser, ahead) => call("api/questions", { browser, ahead });

/** Write an answer to disk; returns what `getQuestions` does. */
export const postAnswer = (answer) => call("api/answers", answer);

export const postUndo = (browser) => call("api/undo", { browser });

export const postFinish = () => call("api/finish", {});

/** Return what the server says about a picture that it cannot give, empty where it says nothing. */
export async function reasonOf(picture) {
  try {
    await call(picture.replace(/^\//, ""));
  } catch (error) {
    if (error instanceof Refusal) return error.detail;
  }
  return "";
}

async function call(route, body) {
  let response;
  let content;
  try {
    response = await fetch(addressOf(route), {
      method: body ? "POST" : "GET",
      headers: { Accept: "application/json", ...(body && { "Content-Type": "application/json" }) },
      body: body && JSON.stringify(body),
      signal: AbortSignal.timeout(1000 * PATIENCE),
      cache: "no-store",
      redirect: "error",
    });
    content = await response.text();
  } catch {
    throw new Refusal("offline", words.trouble.offline);
  }
  const read = parse(content);
  if (!response.ok) throw refusalOf(response.status, read);
  if (read === null) throw new Refusal("other", words.trouble.strange);
  return read;
}

function parse(content) {
  try {
    const read = JSON.parse(content);
    return typeof read === "object" ? read : null;
  } catch {
    return null;
  }
}

function refusalOf(status, problem) {
  const detail = typeof problem?.detail === "string" ? problem.detail.slice(0, LONGEST_DETAIL) : "";
  if (status === 401) return new Refusal("key", words.trouble.key);
  if (status === 409 && problem?.error?.code === "not_current") return new Refusal("not_current", words.trouble.notCurrent);
  if (status >= 500 || status === 429) return new Refusal("unsaved", detail || words.trouble.failed(status), detail);
  return new Refusal("other", detail ? words.trouble.refused(status, detail) : words.trouble.failed(status), detail);
}
