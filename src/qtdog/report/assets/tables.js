"use strict";
// Tables that sort and filter, and the switch between ways to choose a checkpoint. Names from files reach the page as
// text only (textContent), never as markup.

function sortTable(table, column) {
  const head = table.tHead.rows[0].cells[column];
  const numeric = head.classList.contains("number");
  const was = head.getAttribute("aria-sort");
  // numbers begin with the largest, words with the first
  const down = was ? was === "ascending" : numeric;
  for (const cell of table.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const keyed = [...table.tBodies[0].rows].map((row) => [row, row.cells[column].dataset.v]);
  keyed.sort(([, a], [, b]) => {
    if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
    const order = numeric ? a - b : a.localeCompare(b, "en", { numeric: true });
    return down ? -order : order;
  });
  table.tBodies[0].append(...keyed.map(([row]) => row));
}

function filterTable(table, text, count) {
  const parts = text.toLowerCase().split(",").map((part) => part.trim()).filter(Boolean);
  let shown = 0;
  for (const row of table.tBodies[0].rows) {
    const content = row.textContent.toLowerCase();
    row.hidden = !parts.every((part) => content.includes(part));
    shown += !row.hidden;
  }
  const all = table.tBodies[0].rows.length;
  count.textContent = parts.length ? `${shown} of ${all} rows` : `${all} rows`;
}

function wireTables(root) {
  for (const button of root.querySelectorAll("[data-sort]")) {
    button.addEventListener("click", () => sortTable(button.closest("table"), Number(button.dataset.sort)));
  }
  for (const input of root.querySelectorAll("[data-filter]")) {
    const count = document.querySelector(`[data-count="${input.dataset.filter}"]`);
    input.addEventListener("input", () => filterTable(document.getElementById(input.dataset.filter), input.value, count));
  }
}

function wireSwitch(onChange) {
  const box = document.getElementById("switch");
  const there = new Set([...document.querySelectorAll(".panel")].map((panel) => panel.dataset.selection));
  for (const input of box.querySelectorAll("input")) {
    if (!there.has(input.value)) input.parentElement.remove();
    else input.addEventListener("change", () => show(input.value));
  }
  function show(selection) {
    for (const panel of document.querySelectorAll(".panel")) panel.classList.toggle("off", panel.dataset.selection !== selection);
    onChange(selection);
  }
  const first = box.querySelector("input");
  if (!first) return;
  box.hidden = false;
  first.checked = true;
  show(first.value);
}

// The page follows the reader's scheme until they choose the other one; it is not remembered, a file has no place for that.
function wireScheme() {
  const button = document.getElementById("scheme"), root = document.documentElement;
  const isDark = () => (root.dataset.scheme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const name = () => { button.textContent = isDark() ? "Light page" : "Dark page"; };
  button.addEventListener("click", () => { root.dataset.scheme = isDark() ? "light" : "dark"; name(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", name);
  name();
  button.hidden = false;
}
