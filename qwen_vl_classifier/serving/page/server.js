// Requests to the server. Whatever goes wrong becomes a `Refusal` of a known kind, with words that may be shown as text.
import * as texts from "./texts.js";

const KINDS = { loading: "loading", warming: "loading", draining: "draining", failed: "failed" };
const LONGEST_DETAIL = 600; // characters of an answer that is shown

export class Refusal extends Error {
  /**
   * @param {"loading"|"draining"|"failed"|"offline"|"key"|"busy"|"other"} kind what kind of trouble it is
   * @param {number} retryAfter seconds after which the server asks to be tried again, or 0
   */
  constructor(kind, message, retryAfter = 0) {
    super(message);
    this.kind = kind;
    this.retryAfter = retryAfter;
  }
}

/** What to say about an error: a defect of this page means that an answer was not as expected. */
export const wordsOf = (error) => (error instanceof TypeError ? texts.problem.strange : error.message);

/** Where a route is; built without the user name and password that the address of the page may hold. */
export const addressOf = (route) => new URL(route, location.origin + location.pathname).href;

/** List the classifiers that are served. */
export const listModels = async (signal) => (await call("v1/models", { signal })).data;

/** List the pictures to try first. */
export const listExamples = (signal) => call("page/examples.json", { signal });

export const classify = (request, signal) => call("v1/classify", { body: request, signal });

export const explain = (request, signal) => call("v1/explain", { body: request, signal });

async function call(route, { body, signal }) {
  const limit = AbortSignal.timeout(1000 * (Number(document.body.dataset.deadline) + 15));
  let response;
  let content;
  try {
    response = await fetch(addressOf(route), {
      method: body ? "POST" : "GET",
      headers: { Accept: "application/json", ...(body && { "Content-Type": "application/json" }) },
      body: body && JSON.stringify(body),
      signal: AbortSignal.any([signal, limit]),
      cache: "no-store",
      redirect: "error",
    });
    content = await response.text();
  } catch (error) {
    if (signal.aborted) throw error;
    throw limit.aborted ? new Refusal("other", texts.problem.late) : new Refusal("offline", texts.problem.offline);
  }
  const read = parse(content);
  if (!response.ok) throw refusalOf(response, read);
  if (read === null) throw new Refusal("other", texts.problem.strange);
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

function refusalOf({ status, headers }, problem) {
  const detail = typeof problem?.detail === "string" ? problem.detail.slice(0, LONGEST_DETAIL) : "";
  const code = problem?.error?.code;
  if (status === 401) return new Refusal("key", texts.notice.key);
  const seconds = Number(headers.get("Retry-After")) || 0;
  if (status === 429) return new Refusal("busy", texts.problem.busy(seconds), seconds);
  if (status === 503 && Object.hasOwn(KINDS, code)) return new Refusal(KINDS[code], texts.notice[KINDS[code]], seconds);
  if (status === 504) return new Refusal("other", texts.problem.late);
  return new Refusal("other", detail ? texts.problem.refused(status, detail) : texts.problem.failed(status));
}
