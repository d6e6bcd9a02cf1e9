// The cards of a page: filter, sort, show more, enlarge, export. Nothing is loaded, and texts stay texts.
"use strict";
(() => {
  const element = (id) => document.getElementById(id);
  const list = element("cards");
  if (!list) return;
  const STEP = 24;
  const cards = [...list.children, ...element("more").content.children];
  const items = JSON.parse(element("rows").textContent).map((row, number) => ({
    ...row,
    card: cards[number],
    words: [...cards[number].querySelectorAll(".text, .named")].map((part) => part.textContent).join(" ").toLowerCase(),
  }));
  const filters = [...document.querySelectorAll("[data-filter]")];
  const [search, sort, viewer, stage] = ["search", "sort", "viewer", "stage"].map(element);
  const first = Number(list.dataset.first);
  let found = [];
  let most = first;
  let open = 0;

  const draw = () => {
    list.replaceChildren(...found.slice(0, most).map((item) => item.card));
    const hidden = found.length - most;
    element("show-more").hidden = hidden <= 0;
    element("show-more").textContent = hidden > STEP ? `Show ${STEP} more of ${hidden.toLocaleString("en")}` : `Show ${hidden} more`;
  };

  const choose = () => {
    const wanted = filters.map((filter) => filter.value).filter(Boolean);
    const words = search.value.trim().toLowerCase();
    const key = sort.value.replace("-", "");
    const sign = sort.value.startsWith("-") ? -1 : 1;
    found = items
      .filter((item) => wanted.every((tag) => item.tags.includes(tag)) && item.words.includes(words))
      .sort((a, b) => sign * (a[key] - b[key])); // rows that are equal stay as they were
    most = first;
    const rows = `${found.length.toLocaleString("en")} ${found.length === 1 ? "row" : "rows"}`;
    element("found").textContent = found.length ? rows : "No row matches.";
    element("export").disabled = !found.length;
    draw();
  };

  const show = (number) => {
    open = (number + found.length) % found.length;
    stage.replaceChildren(...[...found[open].card.children].map((part) => part.cloneNode(true)));
    for (const button of stage.querySelectorAll("button")) button.replaceWith(...button.childNodes);
    viewer.setAttribute("aria-label", `Row ${found[open].row}, ${open + 1} of ${found.length}`);
  };

  const save = () => {
    const lines = found.map((item) => `${JSON.stringify(item.export)}\n`);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(lines, { type: "application/jsonl" }));
    link.download = "rows.jsonl";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  };

  for (const item of items) {
    const pictures = item.card.querySelector(".pictures");
    if (!pictures) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "pictures";
    button.setAttribute("aria-label", `Enlarge row ${item.row}`);
    button.append(...pictures.childNodes);
    button.addEventListener("click", () => { show(found.indexOf(item)); viewer.showModal(); });
    pictures.replaceWith(button);
  }
  for (const control of [...filters, sort]) control.addEventListener("change", choose);
  search.addEventListener("input", choose);
  element("export").addEventListener("click", save);
  element("show-more").addEventListener("click", () => {
    const next = found[most];
    most += STEP;
    draw();
    (next.card.querySelector("button") ?? element("show-more")).focus();
  });
  element("previous").addEventListener("click", () => show(open - 1));
  element("next").addEventListener("click", () => show(open + 1));
  element("close").addEventListener("click", () => viewer.close());
  viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
  viewer.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) show(open + step);
  });
  element("filters").hidden = false;
  choose();
})();
