// Filters and order of the replies; without it the page shows all, worst first.
"use strict";
(() => {
  const form = document.querySelector("form"), main = document.querySelector("main");
  const rows = [...main.children], output = form.querySelector("output");
  const chosen = (id) => document.getElementById(id)?.value ?? "";
  const ofRow = ["differs", "judge-split", "judge-none"];  // not of one model's reply
  const texts = new Map();
  const textOf = (row) => {
    if (!texts.has(row)) texts.set(row, row.textContent.toLowerCase());
    return texts.get(row);
  };
  const holds = (element, kind) => element.dataset.kinds.split(" ").includes(kind);
  const isShown = (row, kind, model, script, text) => {
    if (script && row.dataset.script !== script) return false;
    if (kind && (model === "" || ofRow.includes(kind)) && !holds(row, kind)) return false;
    if (model !== "" && !ofRow.includes(kind)) {
      const reply = row.querySelector(`[data-model="${model}"]`);
      if (!reply || (kind && !holds(reply, kind))) return false;
    }
    return !text || textOf(row).includes(text);
  };
  const show = () => {
    const kind = chosen("kind"), model = chosen("model"), script = chosen("script"), text = chosen("text").toLowerCase();
    let count = 0;
    for (const row of rows) {
      row.hidden = !isShown(row, kind, model, script, text);
      count += !row.hidden;
    }
    output.textContent = `${count} of ${rows.length}`;
  };
  document.getElementById("order").addEventListener("change", () => {
    const isByData = chosen("order") === "data";
    main.append(...(isByData ? [...rows].sort((a, b) => a.dataset.place - b.dataset.place) : rows));
  });
  let timer = 0;
  form.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(show, 120); });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  show();
})();
