"use strict";

const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const byId = (id) => document.getElementById(id);

// controls do nothing without this script: styles hide them until it runs
document.documentElement.classList.add("scripted");

// a link to a closed section opens it
const openTarget = () => {
  const target = location.hash && byId(decodeURIComponent(location.hash.slice(1)));
  if (target && target.matches("details")) target.open = true;
};
addEventListener("hashchange", openTarget);
openTarget();

const fold = byId("fold");
fold.hidden = false;
fold.addEventListener("click", () => {
  const open = fold.textContent === "Open all";
  all("details.section").forEach((part) => (part.open = open));
  fold.textContent = open ? "Close all" : "Open all";
});

// names as people count (blur2 before blur10), figures by their value, what is missing last
const byName = (a, b) => a.localeCompare(b, undefined, { numeric: true });
const byFigure = (a, b) => (a === "") - (b === "") || b - a;

// a click on a head sorts a table by it, a second one the other way; the total stays last
all("table.sortable thead button").forEach((button) => {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const body = head.closest("table").tBodies[0];
    const column = head.cellIndex;
    const first = column ? "descending" : "ascending";
    const other = column ? "ascending" : "descending";
    const now = head.getAttribute("aria-sort") === first ? other : first;
    all("th", head.parentNode).forEach((each) => each.setAttribute("aria-sort", each === head ? now : "none"));
    const key = (row) => row.cells[column].dataset.sort;
    const rows = all("tr:not(.total)", body).sort((a, b) => (column ? byFigure : byName)(key(a), key(b)));
    if (now === other) rows.reverse();
    body.prepend(...rows);
  });
});

all("input[data-only]").forEach((box) => {
  box.addEventListener("change", () => byId(box.dataset.only).classList.toggle("only-differences", box.checked));
});

// cards: by run and group, in an order
const choice = (id) => (byId(id) ? byId(id).value : "");
const orders = {
  change: (a, b) => Math.abs(b.dataset.change) - Math.abs(a.dataset.change),
  confidence: (a, b) => b.dataset.confidence - a.dataset.confidence,
  path: (a, b) => byName(a.dataset.path, b.dataset.path),
};
const choose = () => {
  const [run, group, order] = ["card-run", "card-group", "card-order"].map(choice);
  all(".cards").forEach((list) => {
    const cards = all(".card", list).sort(orders[order]);
    cards.forEach((card) => {
      card.hidden = Boolean((run && card.dataset.run !== run) || (group && card.dataset.group !== group));
    });
    list.append(...cards);
    const shown = cards.filter((card) => !card.hidden).length;
    list.previousElementSibling.querySelector(".count").textContent = shown;
    list.nextElementSibling.hidden = shown > 0;
  });
};
all("#card-controls select").forEach((select) => select.addEventListener("change", choose));
