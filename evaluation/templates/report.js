for (const [column, head] of document.querySelectorAll("thead th").entries()) {
  head.firstChild.onclick = () => {
    const upward = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", upward ? "ascending" : "descending");
    const body = document.querySelector("tbody");
    const value = (row) => row.children[column].dataset.value;
    const compare = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b, "en", { numeric: true }) : a - b);
    const filled = [...body.children].filter((row) => value(row) !== "");
    const empty = [...body.children].filter((row) => value(row) === "");
    filled.sort((a, b) => (upward ? 1 : -1) * compare(value(a), value(b)));
    body.append(...filled, ...empty);
  };
}
