// The same request from a program. Every value is quoted for the language it stands in; the key is never written out.

/** Quote for a POSIX shell: within single quotes nothing is special but the single quote. */
const shell = (value) => `'${value.replaceAll("'", "'\\''")}'`;

/** Name a file for curl's -F: in double quotes, where only these and the backslash are special. */
const curlFile = (name) => `image=@"${name.replace(/^-/, "./-").replace(/["\\]/g, "\\$&")}"`;

/** Quote for Python: JSON's escapes mean the same there. */
const python = (value) => JSON.stringify(value);

/** Write the request for curl. */
export function asCurl({ address, pictures, text, models, keyVariable }) {
  return [
    `curl ${shell(address)}`,
    ...(keyVariable ? [`-H "Authorization: Bearer $${keyVariable}"`] : []),
    ...pictures.map(({ name }) => `-F ${shell(curlFile(name))}`),
    // Not -F, which would read a file where a text begins with @ or <.
    `--form-string ${shell(`text=${text}`)}`,
    ...models.map((name) => `--form-string ${shell(`model=${name}`)}`),
  ].join(" \\\n  ");
}

/** Write the request for Python with httpx. */
export function asPython({ address, pictures, text, models, keyVariable }) {
  const fields = [`"text": ${python(text)}`];
  if (models.length) fields.push(`"model": ${models.length > 1 ? `[${models.map(python).join(", ")}]` : python(models[0])}`);
  // Without a file httpx sends no multipart form but a plain one, so such a request is written as JSON.
  const plain = [`"input": [{"text": ${python(text)}}]`, ...fields.slice(1)];
  return [
    ...(keyVariable ? ["import os", ""] : []),
    "import httpx",
    "",
    "response = httpx.post(",
    `    ${python(address)},`,
    ...(keyVariable ? [`    headers={"Authorization": f"Bearer {os.environ['${keyVariable}']}"},`] : []),
    ...(pictures.length
      ? [
          "    files=[",
          ...pictures.map(({ name }) => `        ("image", open(${python(name)}, "rb")),`),
          "    ],",
          `    data={${fields.join(", ")}},`,
        ]
      : [`    json={${plain.join(", ")}},`]),
    "    timeout=60,",
    ")",
    "response.raise_for_status()",
    "print(response.json())",
  ].join("\n");
}
