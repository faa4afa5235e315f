
/* Sort by a column, find by a word, show one kind. No requests, nothing kept. */
(function () {
  "use strict";

  const body = document.querySelector("#slides tbody");
  const rows = [...body.rows];
  const kinds = [...document.querySelectorAll("[data-show]")];
  const find = document.getElementById("find");
  const words = new Intl.Collator("en", { numeric: true, sensitivity: "base" });
  let kind = "";

  /* What is not known comes last, whichever way the column is sorted. */
  function compare(one, other, key, turn) {
    const [a, b] = [one.dataset[key], other.dataset[key]];
    if (a === "" || b === "") return (a === "") - (b === "");
    return turn * (key === "name" ? words.compare(a, b) : Number(a) - Number(b));
  }

  function sort(button) {
    const head = button.closest("th");
    const isDown = head.getAttribute("aria-sort") === "ascending";
    for (const each of head.parentElement.querySelectorAll("[aria-sort]")) each.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", isDown ? "descending" : "ascending");
    rows.sort((one, other) => compare(one, other, button.dataset.key, isDown ? -1 : 1));
    body.append(...rows);
  }

  function filter() {
    const wanted = find.value.trim().toLowerCase();
    let count = 0;
    for (const row of rows) {
      const isKind = kind === "" || row.dataset.is.split(" ").includes(kind);
      row.hidden = !(isKind && row.textContent.toLowerCase().includes(wanted));
      count += row.hidden ? 0 : 1;
    }
    document.getElementById("seen").textContent = count === rows.length ? "" : `${count} of ${rows.length} shown`;
  }

  for (const button of document.querySelectorAll("[data-key]")) button.addEventListener("click", () => sort(button));
  for (const button of kinds) {
    button.addEventListener("click", () => {
      kind = button.dataset.show;
      for (const each of kinds) each.setAttribute("aria-pressed", String(each === button));
      filter();
    });
  }
  find.addEventListener("input", filter);
  filter(); // a browser may restore the word when the page is loaded again
})();
