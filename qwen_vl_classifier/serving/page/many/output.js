// The scored table, as a file of the columns that came in and those of the answers.
import { writeCsv } from "./csv.js";
import { columnsOf } from "./reading.js";

/**
 * Write rows with their answers.
 * @param {object[]} rows
 * @param {string[]} columns those of the table
 * @param {{withText: string, moved: object | null, delimiter: string}} how `withText` names a column for the text where the
 *   table has none; `moved` holds the threshold that was tried and what it would decide
 */
export function scoredCsv(rows, columns, { withText, moved, delimiter = "," }) {
  const first = rows.find(({ result }) => result)?.result;
  const plain = ["probability", "label", "decision", "label_name"];
  const answers = [...(first ? Object.keys(columnsOf(first)) : plain), "classifier", "version", "error"];
  const tried = moved ? ["tried_threshold", "decision_at_tried_threshold"] : [];
  const prefix = prefixFor([...answers, ...tried], columns);
  const own = new Map([...answers, ...tried].map((name) => [name, prefix + name]));
  if (withText) own.set(withText, prefixFor([withText], columns) + withText);
  const written = rows.map((row) => {
    const made = withText ? { [withText]: row.text } : {};
    const { result } = row;
    if (result) {
      Object.assign(made, columnsOf(result), { classifier: result.classifier.id, version: result.classifier.version });
      if (moved) Object.assign(made, { tried_threshold: moved.threshold, decision_at_tried_threshold: moved.decide(row) });
    } else {
      made.error = row.error || row.problem || "not scored";
    }
    return { ...row.values, ...Object.fromEntries(Object.entries(made).map(([name, value]) => [own.get(name), value])) };
  });
  return writeCsv([...columns, ...own.values()], written, delimiter);
}

/** What to put before names of which the table has one already, as `predict --out` does: what people wrote there stays. */
function prefixFor(names, columns) {
  const taken = new Set(columns.map((column) => column.trim().toLowerCase()));
  return names.some((name) => taken.has(name)) ? "predicted_" : "";
}
