// Layer map, numbers: every figure has a twin, a table behind one click that can be sorted and saved
// as CSV with full precision. A table is built when it is opened, and again when its numbers change.

function csvText(rows) {
  const quote = (value) => (/[",\n]/.test(String(value)) ? `"${String(value).replace(/"/g, '""')}"` : String(value));
  const heads = Object.keys(rows[0]);
  return [heads, ...rows.map((row) => heads.map((head) => row[head]))].map((row) => row.map(quote).join(",")).join("\n") + "\n";
}

function saveText(name, text, type) {
  saveBlob(name, new Blob([text], { type }));
}

function saveBlob(name, blob) {
  const link = node("a", { download: name, href: URL.createObjectURL(blob) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// spec: { title, label, stem, rows() -> [{key: value}], columns: [[key, value -> words], ...], sort }
function twin(spec) {
  const holder = node("div", { class: "lm-table-holder", tabindex: "0", role: "region", "aria-label": spec.label || spec.title });
  const made = node("details", { class: "lm-more" }, node("summary", {}, spec.title), holder);
  made.twin = { sort: { key: spec.columns[0][0], down: false }, ...spec, holder };
  return made;
}

function fillTwin(details) {
  const { title, label, rows, columns, sort, holder } = details.twin;
  if (!details.open) return;
  const found = sortRows(rows(), sort);
  const shown = columns.filter(([key]) => !found.length || found[0][key] !== undefined);
  holder.replaceChildren(...(!found.length ? [node("p", {}, "Nothing to list.")] : [
    node("p", { class: "lm-acts" }, node("button", { type: "button", class: "lm-quiet", "data-act": "twin-csv" }, "Save as CSV")),
    node("table", { class: "lm-numbers lm-table" },
      node("caption", {}, `${label || title}, ${found.length} rows`),
      sortHeads(shown.map(([key]) => key), sort),
      node("tbody", {}, ...found.map((row) => node("tr", {}, ...shown.map(([key, words]) => node("td", {}, words(row[key]))))))),
  ]));
}

function refreshTwins() {
  for (const details of element.querySelectorAll("details.lm-more[open]")) fillTwin(details);
}

// The buttons of a table. Returns true when the button was one of them.
function twinAction(button) {
  const details = button.closest("details.lm-more");
  if (!details?.twin) return false;
  const { twin: table } = details, { key } = button.dataset;
  if (key) {
    const words = typeof table.rows()[0]?.[key] === "string";
    table.sort = { key, down: table.sort.key === key ? !table.sort.down : !words && key !== table.columns[0][0] };
    fillTwin(details);
    [...table.holder.querySelectorAll("[data-key]")].find((head) => head.dataset.key === key).focus();
  } else if (button.dataset.act === "twin-csv") saveText(`${table.stem}.csv`, csvText(table.rows()), "text/csv");
  else return false;
  return true;
}

// A drawing with its caption and its twin. `summary` is what the drawing says, in a sentence.
function figure({ heading, extra, drawing, summary, wide, ...numbers }) {
  if (summary) fill(drawing, { role: "img", "aria-label": summary }, []);
  return node("figure", { class: wide ? "lm-figure lm-figure-wide" : "lm-figure" }, node("figcaption", {}, heading, extra),
    drawing, twin({ title: "Numbers", label: `Numbers: ${heading}`, ...numbers }));
}

element.addEventListener("toggle", ({ target }) => { if (target.twin) fillTwin(target); }, true);
