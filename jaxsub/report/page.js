"use strict";
(function () {
  const table = document.getElementById("layer-table");
  const body = table && table.tBodies[0];
  const cards = Array.from(document.querySelectorAll("details.card"));

  function sortBy(column, header) {
    const ascending = header.getAttribute("aria-sort") !== "ascending";
    table.querySelectorAll("th[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
    header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const keyed = Array.from(body.rows, (row) => {
      const key = row.cells[column].dataset.sort;
      return { row, key: key === undefined ? null : Number(key) };
    });
    // Unknown values stay at the end in either direction.
    keyed.sort((a, b) => {
      if (a.key === null || b.key === null) return (a.key === null) - (b.key === null);
      return ascending ? a.key - b.key : b.key - a.key;
    });
    keyed.forEach((item) => body.appendChild(item.row));
  }

  if (table) {
    Array.from(table.tHead.rows[0].cells).forEach((header, column) => {
      const button = header.querySelector("button");
      if (button) button.addEventListener("click", () => sortBy(column, header));
    });
  }

  const find = document.getElementById("find");
  if (find) {
    const pick = document.getElementById("pick");
    const found = document.getElementById("found");
    const apply = () => {
      const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
      const fits = (item) =>
        (!pick.value || item.dataset.verdict === pick.value) && words.every((word) => item.dataset.text.includes(word));
      let shown = 0;
      Array.from(body.rows).forEach((row) => {
        row.hidden = !fits(row);
        shown += row.hidden ? 0 : 1;
      });
      cards.forEach((card) => { card.hidden = !fits(card); });
      found.textContent = shown + " of " + body.rows.length + " layers";
    };
    find.addEventListener("input", apply);
    pick.addEventListener("change", apply);
    find.closest(".filter").hidden = false;
    apply();
  }

  const fold = document.querySelector(".fold");
  if (fold) {
    fold.hidden = false;
    document.getElementById("open-all").addEventListener("click", () => cards.forEach((card) => { card.open = true; }));
    document.getElementById("close-all").addEventListener("click", () => cards.forEach((card) => { card.open = false; }));
  }

  function openTarget() {
    const card = cards.find((item) => "#" + item.id === location.hash);
    if (!card) return;
    card.hidden = false;
    card.open = true;
    card.scrollIntoView();
  }
  window.addEventListener("hashchange", openTarget);
  openTarget();
})();
