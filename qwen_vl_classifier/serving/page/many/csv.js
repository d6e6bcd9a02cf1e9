// Tables as text: CSV with commas, semicolons or tabs, and JSON lines; read as spreadsheets write them, and written back.

const DELIMITERS = [",", ";", "\t"];
const BYTE_ORDER_MARK = "\ufeff";
const PLAIN_NUMBER = /^[-+]?(\d+([.,]\d*)?|[.,]\d+)(e[-+]?\d+)?$/i;

/** A table that cannot be read; its message is for people. */
export class TableError extends Error {}

/**
 * Decode the bytes of a table. Spreadsheets write UTF-8, UTF-16 with a mark, or, older ones, the code page of Windows.
 * @param {ArrayBuffer} bytes
 */
export function decode(bytes) {
  const [first, second] = new Uint8Array(bytes.slice(0, 2));
  if (first === 0xff && second === 0xfe) return new TextDecoder("utf-16le").decode(bytes);
  if (first === 0xfe && second === 0xff) return new TextDecoder("utf-16be").decode(bytes);
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch {
    return new TextDecoder("windows-1252").decode(bytes);
  }
}

/**
 * Read a table.
 * @param {string} text its content
 * @param {string} name its file name, whose ending tells JSON lines from the rest
 * @returns {{columns: string[], rows: {number: number, values: object, problem: string}[], delimiter: string}}
 *   `number` counts from 1 as a spreadsheet would without the header; `problem` says why a row cannot be used, or is "".
 */
export function readTable(text, name) {
  const content = text.startsWith(BYTE_ORDER_MARK) ? text.slice(1) : text;
  return /\.(jsonl|ndjson)$/i.test(name) ? readJsonLines(content) : readDelimited(content);
}

function readDelimited(text) {
  const named = /^sep=(.)\r?\n/.exec(text); // as Excel writes it for itself
  const content = named ? text.slice(named[0].length) : text;
  const delimiter = named ? named[1] : guessDelimiter(content);
  const [header, ...records] = parse(content, delimiter);
  if (!header) throw new TableError("is empty");
  const columns = uniqueNames(header);
  const rows = records.map((cells, at) => ({
    number: at + 1,
    values: Object.fromEntries(columns.map((column, place) => [column, cells[place] ?? ""])),
    problem: cells.length === columns.length ? "" : `the row has ${cells.length} cells, but the header has ${columns.length}`,
  }));
  return { columns, rows, delimiter };
}

/** Find the delimiter that occurs most often in the first record, outside of quotes. */
export function guessDelimiter(text) {
  const counts = new Map(DELIMITERS.map((delimiter) => [delimiter, 0]));
  let quoted = false;
  for (const character of text) {
    if (character === '"') quoted = !quoted;
    else if (!quoted && (character === "\n" || character === "\r")) break;
    else if (!quoted && counts.has(character)) counts.set(character, counts.get(character) + 1);
  }
  return DELIMITERS.reduce((best, delimiter) => (counts.get(delimiter) > counts.get(best) ? delimiter : best));
}

/**
 * Split text into records of cells (RFC 4180): a cell in quotes may hold delimiters, line ends and doubled quotes.
 * Lines without any content are left out.
 */
export function parse(text, delimiter) {
  const records = [];
  let record = [];
  let at = 0;
  while (at < text.length) {
    let cell = "";
    if (text[at] === '"') {
      at += 1;
      for (;;) {
        const end = text.indexOf('"', at);
        if (end < 0) throw new TableError(`has a quote that is opened in record ${records.length + 1} and never closed`);
        cell += text.slice(at, end);
        at = end + 1;
        if (text[at] !== '"') break;
        cell += '"';
        at += 1;
      }
    }
    const start = at; // what follows a closing quote belongs to the cell too, as spreadsheets take it
    while (at < text.length && text[at] !== delimiter && text[at] !== "\n" && text[at] !== "\r") at += 1;
    record.push(cell + text.slice(start, at));
    const last = text[at];
    if (last === "\r" && text[at + 1] === "\n") at += 1;
    at += 1;
    if (last === delimiter && at < text.length) continue;
    if (last === delimiter) record.push("");
    if (record.some((value) => value.trim())) records.push(record);
    record = [];
  }
  return records;
}

function readJsonLines(text) {
  const columns = new Set();
  const rows = [];
  for (const line of text.split(/\r?\n/)) {
    if (!line.trim()) continue;
    const row = { number: rows.length + 1, values: {}, problem: "" };
    try {
      const values = JSON.parse(line);
      if (typeof values !== "object" || values === null || Array.isArray(values)) throw new TypeError("no object");
      row.values = values;
      for (const name of Object.keys(values)) columns.add(name);
    } catch {
      row.problem = "the line is not a JSON object";
    }
    rows.push(row);
  }
  if (!rows.length) throw new TableError("is empty");
  return { columns: [...columns], rows, delimiter: "," };
}

function uniqueNames(header) {
  const seen = new Set();
  return header.map((cell, at) => {
    const plain = cell.trim() || `column ${at + 1}`;
    let name = plain;
    for (let number = 2; seen.has(name); number += 1) name = `${plain} (${number})`;
    seen.add(name);
    return name;
  });
}

/**
 * Write a table as CSV that spreadsheets open without running anything in it.
 * @param {string[]} columns
 * @param {object[]} rows values by column
 */
export function writeCsv(columns, rows, delimiter = ",") {
  const line = (cells) => cells.map((cell) => quoted(cell, delimiter)).join(delimiter);
  // The mark tells Excel that this is UTF-8.
  return `${BYTE_ORDER_MARK}${[line(columns), ...rows.map((row) => line(columns.map((column) => row[column])))].join("\r\n")}\r\n`;
}

function quoted(value, delimiter) {
  const text = value === null || value === undefined ? "" : typeof value === "object" ? JSON.stringify(value) : String(value);
  const safe = withoutFormula(text);
  return /["\r\n]/.test(safe) || safe.includes(delimiter) || safe !== safe.trim() ? `"${safe.replaceAll('"', '""')}"` : safe;
}

/** Put an apostrophe before what a spreadsheet would take for a formula; numbers stay as they are. */
export function withoutFormula(text) {
  return /^\s*[=+\-@\t\r]/.test(text) && !PLAIN_NUMBER.test(text) ? `'${text}` : text;
}
