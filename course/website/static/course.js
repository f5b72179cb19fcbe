/* Tables that sort, questions that are chosen, pictures that open, folds that open for paper, and boxes that scroll by key. */
"use strict";

// a page that was opened from a disk may not read its neighbours: the search shows no excerpts of them then
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;

/** Make every head of `table` a button that sorts by its column: numbers as numbers, and what is empty last. */
function sortable(table) {
  const value = (row, column) => {
    const cell = row.cells[column];
    const marked = cell.dataset.value ?? cell.querySelector("[data-value]")?.dataset.value ?? cell.textContent.trim();
    return marked === "" || Number.isNaN(Number(marked)) ? marked : Number(marked);
  };
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    head.scope = "col";
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows].map((row) => [value(row, column), row]);
      rows.sort(([a], [b]) => (a === "") - (b === "") || (down ? compare(b, a) : compare(a, b)));
      table.tBodies[0].append(...rows.map(([, row]) => row));
    });
  });
}

/** Show the questions that `form` asks for, and say how many they are. */
function choosing(form) {
  const marks = [...document.querySelectorAll("[data-question]")];
  const show = () => {
    const wanted = [...form.elements].filter((field) => field.name && field.value);
    let shown = 0;
    for (const mark of marks) {
      const fits = wanted.every((field) => mark.dataset[field.name].split(" ").includes(field.value));
      (mark.closest("tr") ?? mark.closest("section")).hidden = !fits;
      shown += fits;
    }
    form.querySelector("output").textContent = `${shown} of ${marks.length}`;
  };
  form.addEventListener("change", show);
  show();
}

/** What is wider than its place can be reached, and moved, with the keyboard. */
function reachable() {
  for (const box of document.querySelectorAll(".scroll, div.math, .highlight pre, .cell_output pre, .pst-scrollable-table-container")) {
    if (box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
}

/** A picture that is larger than its place opens by itself at a click. */
function larger() {
  for (const picture of document.querySelectorAll(".bd-article img[src]")) {
    if (picture.closest("a")) continue;
    const link = document.createElement("a");
    link.className = "larger";
    link.href = picture.src;
    link.title = "Open this picture by itself";
    picture.replaceWith(link);
    link.append(picture);
  }
}

/** One line that a cell printed is a sentence and may go on in the next; several are a table. */
function sentences() {
  for (const printed of document.querySelectorAll(".cell_output pre")) {
    printed.classList.toggle("sentence", !printed.textContent.trim().includes("\n"));
  }
}

/** The arrows of the sidebar say aloud what they unfold. */
function named() {
  for (const arrow of document.querySelectorAll(".bd-links summary")) {
    arrow.ariaLabel = `Pages under ${arrow.closest("li").querySelector("a").textContent.trim()}`;
  }
}

document.addEventListener("DOMContentLoaded", () => {
  named();
  larger();
  sentences();
  document.querySelectorAll("table.sortable").forEach(sortable);
  document.querySelectorAll("form.filters").forEach(choosing);
  reachable();
});
addEventListener("resize", reachable);

let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  for (const fold of opened) fold.open = true;
});
addEventListener("afterprint", () => {
  for (const fold of opened) fold.open = false;
});
