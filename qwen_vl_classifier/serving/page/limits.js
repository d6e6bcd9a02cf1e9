// What the server would refuse, told before it is sent.
import * as texts from "./texts.js";

/**
 * Say which pictures of an example are too large or too many.
 * @param {File[]} pictures
 * @param {{maxImageBytes: number, maxBodyBytes: number, maxImages: number}} limits
 */
export function pictureProblems(pictures, text, { maxImageBytes, maxBodyBytes, maxImages }) {
  const problems = pictures
    .filter(({ size }) => size > maxImageBytes)
    .map(({ name, size }) => texts.warnings.bytes(name, size, maxImageBytes));
  if (pictures.length > maxImages) problems.push(texts.warnings.count(pictures.length, maxImages));
  // As base64, four bytes for three, with some room for text and names.
  const total = pictures.reduce((sum, { size }) => sum + 4 * Math.ceil(size / 3), 0) + 6 * text.length + 1000;
  if (!problems.length && total > maxBodyBytes) problems.push(texts.warnings.total(total, maxBodyBytes));
  return problems;
}

/** Say whether a text is too long, or "". Counted as the server does: characters, not the halves in which scripts hold some. */
export function textProblem(text, { maxTextChars }) {
  const length = [...text].length;
  return length > maxTextChars ? texts.warnings.length(length, maxTextChars) : "";
}
