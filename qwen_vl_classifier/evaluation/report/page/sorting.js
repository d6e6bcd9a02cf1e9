// The table of labels: sort it, and find labels by name, there and below. Nothing is loaded.
"use strict";
(() => {
  const table = document.getElementById("labels-table");
  if (!table) return;
  const [sort, search, found] = ["sort-labels", "search-labels", "found-labels"].map((id) => document.getElementById(id));
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row, number) => ({
    row,
    number,
    name: row.cells[0].textContent.trim(),
    part: document.getElementById(row.dataset.part),
    values: JSON.parse(row.dataset.values),
  }));

  const draw = () => {
    const words = search.value.trim().toLowerCase();
    const sign = sort.value.startsWith("-") ? -1 : 1;
    const key = sort.value.replace("-", "");
    // What has no value comes last, whichever way the others go.
    const value = (item) => (key in item.values ? (item.values[key] ?? sign * Infinity) : item.number);
    const kept = rows.filter((item) => item.name.toLowerCase().includes(words));
    kept.sort((a, b) => (key === "name" ? a.name.localeCompare(b.name) : sign * (value(a) > value(b) ? 1 : value(a) < value(b) ? -1 : 0)) || a.number - b.number);
    body.replaceChildren(...kept.map((item) => item.row));
    for (const item of rows) item.part.hidden = !kept.includes(item);
    found.textContent = words ? `${kept.length} of ${rows.length}` : "";
  };

  sort.addEventListener("change", draw);
  search.addEventListener("input", draw);
  document.getElementById("label-filters").hidden = false;
  draw();
})();
