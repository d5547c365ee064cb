// Tables that sort by their headings, with as many rows as one reads and the rest on request.

const FIRST_ROWS = 100;

// columns: {name, key, number, of(row) → shown, by(row) → compared}
function table(host, key, caption, columns, rows, memory) {
  const state = (memory[key] = memory[key] || { by: 0, up: false, all: false });
  const scroll = h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption });
  host.replaceChildren(scroll);
  const draw = () => {
    const by = columns[state.by].by, sign = state.up ? 1 : -1;
    const sorted = rows.map((row, index) => [by(row), index, row]).sort(([a, i], [b, j]) => {
      const none = (a === null || a === undefined) - (b === null || b === undefined);
      if (none) return none;  // what is not known comes last, either way
      return (a < b ? -sign : a > b ? sign : 0) || (i - j) * sign;
    });
    const shown = state.all ? sorted : sorted.slice(0, FIRST_ROWS);
    const head = columns.map((column, index) =>
      h("th", { scope: "col", "data-number": column.number, class: column.class === "hint" && "hint", "aria-sort": index === state.by ? (state.up ? "ascending" : "descending") : "none" },
        h("button", { type: "button", "data-key": `${key}-${index}`, onclick: () => {
          if (state.by === index) state.up = !state.up; else { state.by = index; state.up = !column.number; }
          keepingFocus(draw);
        } }, column.name)));
    const lines = shown.map(([, , row]) => h("tr", {}, columns.map((column) => h("td", { "data-number": column.number, "data-tight": column.tight, class: column.class }, column.of(row)))));
    scroll.replaceChildren(h("table", {}, h("caption", {}, caption), h("thead", {}, h("tr", {}, head)), h("tbody", {}, lines)));
    while (scroll.nextSibling) scroll.nextSibling.remove();
    if (sorted.length > shown.length)
      host.append(h("button", { class: "tool more", type: "button", onclick: () => { state.all = true; draw(); } }, `Show all ${count(sorted.length)}`));
  };
  draw();
}

function keepingFocus(work) {
  const key = document.activeElement && document.activeElement.dataset && document.activeElement.dataset.key;
  work();
  const again = key && document.querySelector(`[data-key="${CSS.escape(key)}"]`);
  if (again && again !== document.activeElement) again.focus({ preventScroll: true });
}
