// What was dropped or chosen, as files with their paths; and from these the rows to score.
import { mayBePicture } from "../pictures.js";
import * as texts from "./many_texts.js";

const MOST_FILES = 50_000; // of a folder
const TEXT_NAMES = ["text", "sentence", "statement", "question", "caption", "claim", "prompt", "description"];
const PICTURE_NAMES = ["image", "images", "file_name", "file_names", "filename", "file", "picture", "photo", "path"];
const ID_NAMES = ["id"];

export const isTable = ({ name }) => /\.(csv|tsv|jsonl|ndjson)$/i.test(name);
export const isSpreadsheet = ({ name }) => /\.(xlsx?|xlsm|xlsb|ods|numbers)$/i.test(name);

/**
 * List what a drop carries, folders walked through.
 * @param {DataTransfer} transfer read at once, since browsers empty it when the event is over
 * @returns {Promise<{files: {file: File, path: string}[], folder: string}>} `folder` is the name of the first folder, or ""
 */
export async function droppedFiles(transfer) {
  const entries = [...transfer.items].filter(({ kind }) => kind === "file").map((item) => item.webkitGetAsEntry?.() ?? item.getAsFile());
  const files = [];
  for (const entry of entries.filter(Boolean)) {
    if (entry instanceof File) files.push({ file: entry, path: entry.name });
    else await walk(entry, "", files);
  }
  return inOrder(files, entries.find((entry) => entry?.isDirectory)?.name ?? "");
}

/** The same of files that were chosen; those of a folder bring their paths. */
export function chosenFiles(list) {
  const files = [...list].map((file) => ({ file, path: file.webkitRelativePath || file.name })).filter(({ path }) => !isHidden(path));
  const [first] = files;
  return inOrder(files, first?.file.webkitRelativePath ? first.path.split("/")[0] : "");
}

async function walk(entry, above, files) {
  const path = above + entry.name;
  if (isHidden(path) || files.length >= MOST_FILES) return;
  if (entry.isFile) {
    const file = await new Promise((resolve) => { entry.file(resolve, () => resolve(null)); });
    if (file) files.push({ file, path });
    return;
  }
  const reader = entry.createReader();
  for (;;) { // it gives some at a time
    const some = await new Promise((resolve) => { reader.readEntries(resolve, () => resolve([])); });
    if (!some.length) return;
    for (const one of some) await walk(one, `${path}/`, files);
  }
}

const isHidden = (path) => path.split("/").some((part) => part.startsWith(".") || part === "__MACOSX");

/** Those of a folder by name, numbers by their size; others as they were given, since the order of pictures counts. */
function inOrder(files, folder) {
  if (folder) files.sort((one, other) => one.path.localeCompare(other.path, "en", { numeric: true }));
  return { files, folder };
}

/** A picture by its ending where the system knows no type: folders hold other files too. */
export const isPicture = ({ file, path }) => mayBePicture(file) && (file.type || /\.(jpe?g|png|webp)$/i.test(path));

/** Choose columns by their names. */
export function guessColumns(columns) {
  const find = (names) => names.map((name) => columns.find((column) => column.trim().toLowerCase() === name)).find(Boolean) ?? "";
  return { text: find(TEXT_NAMES), image: find(PICTURE_NAMES), id: find(ID_NAMES) };
}

/** Pictures that rows name, by their paths. */
export class Pictures {
  #byPath = new Map();
  #byEnding = new Map(); // null where several have it

  /** @param {{file: File, path: string}[]} files */
  add(files) {
    for (const { file, path } of files) {
      this.#byPath.set(path, file);
      for (const ending of endingsOf(path)) {
        this.#byEnding.set(ending, (this.#byEnding.get(ending) ?? file) === file ? file : null);
      }
    }
  }

  /**
   * Find the picture of a path in a table, whichever of the two begins at a folder further up: never a picture of the
   * same name in another folder.
   * @returns {{file: File, shortened: boolean} | null} `shortened` where folders of the table are not known here
   */
  find(path) {
    const known = this.#byPath.get(path) ?? this.#byEnding.get(path);
    if (known) return { file: known, shortened: false };
    for (const ending of endingsOf(path)) {
      if (this.#byPath.has(ending)) return { file: this.#byPath.get(ending), shortened: true };
    }
    return null;
  }
}

function endingsOf(path) {
  const parts = path.split("/");
  return parts.map((_, at) => parts.slice(at).join("/"));
}

const pathOf = (cell) => String(cell).trim().replaceAll("\\", "/").replace(/^(\.\/)+/, "");

/**
 * Make rows of a table ready to be scored.
 * @param {{rows: object[]}} table as `readTable` gives it
 * @param {{text: string, image: string, id: string}} columns those that are used; without one for texts, `sameText` is every row's
 * @param {Pictures} pictures
 */
export function tableRows(table, columns, sameText, pictures) {
  const found = new Map(); // by path in the table
  const paths = new Map(); // by file: those that led to it
  for (const { values } of columns.image ? table.rows : []) {
    for (const path of listOf(values[columns.image]).map(pathOf)) {
      if (found.has(path)) continue;
      const one = pictures.find(path);
      found.set(path, one);
      if (one) paths.set(one.file, [...(paths.get(one.file) ?? []), path]);
    }
  }
  return table.rows.map(({ number, values, problem }) => {
    const row = { number, values, files: [], pictures: [], text: sameText, id: "", problem, missing: false };
    if (columns.text) row.text = wordsOf(values[columns.text]);
    if (columns.id) row.id = wordsOf(values[columns.id]);
    if (columns.image) row.files = listOf(values[columns.image]).map(String);
    for (const name of row.files) {
      const one = found.get(pathOf(name));
      if (one && (!one.shortened || paths.get(one.file).length === 1)) {
        row.pictures.push(one.file);
      } else if (!row.problem) {
        row.problem = one ? texts.rows.ambiguous(name) : texts.rows.missing(name);
        row.missing = !one;
      }
    }
    if (!row.problem && !row.text.trim()) row.problem = texts.rows.blank;
    return row;
  });
}

/** One row for each picture, all with the same text. */
export function pictureRows(files, sameText) {
  return files.map(({ file, path }, at) => ({
    number: at + 1, values: { image: path }, files: [path], pictures: [file], text: sameText, id: path,
    problem: sameText.trim() ? "" : texts.rows.blank, missing: false,
  }));
}

const wordsOf = (value) => (value === null || value === undefined ? "" : typeof value === "object" ? JSON.stringify(value) : String(value));

function listOf(value) {
  if (value === null || value === undefined || value === "") return [];
  return Array.isArray(value) ? value : [value];
}
