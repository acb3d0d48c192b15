// @ts-check
// Every figure has its numbers in a table behind one click, which can be sorted and saved as CSV with
// full precision. A table is built when it is opened, and again when its numbers change.

import { fill, node } from "./dom.js";

/** @import { Attributes, FigureSpec, Row, Sorting, Table, TableSpec, Value } from "./types.d.ts" */

const MOST_ROWS = 2000; // in the page; a CSV has all

/** @type {WeakMap<Element, Table>} */
const tables = new WeakMap();

/** @param {Row[]} rows With the same keys in each. */
export function csvText(rows) {
  const heads = Object.keys(rows[0]);
  return [heads, ...rows.map((row) => heads.map((head) => row[head]))]
    .map((row) => `${row.map(quoted).join(",")}\n`).join("");
}

/** @param {Value} value */
function quoted(value) {
  const text = String(value);
  return /[",\n]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
}

/**
 * @param {string} name
 * @param {string} text
 * @param {string} type
 */
export function saveText(name, text, type) {
  saveBlob(name, new Blob([text], { type }));
}

/**
 * @param {string} name
 * @param {Blob} blob
 */
export function saveBlob(name, blob) {
  const link = node("a", { download: name, href: URL.createObjectURL(blob) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

/**
 * A closed table; `listenToTables` fills it when it is opened.
 *
 * @param {TableSpec} spec
 */
export function dataTable(spec) {
  const holder = node("div", { class: "lm-table-holder", tabindex: "0", role: "region", "aria-label": spec.label || spec.title });
  const made = node("details", { class: "lm-more" }, node("summary", {}, spec.title), holder);
  tables.set(made, { ...spec, sort: { key: spec.columns[0][0], down: false }, holder });
  return made;
}

/**
 * A drawing with its caption and its table. `summary` is what the drawing shows, in a sentence.
 *
 * @param {FigureSpec} spec
 */
export function figure({ heading, extra, drawing, summary, wide, ...numbers }) {
  if (summary) fill(drawing, { role: "img", "aria-label": summary });
  return node("figure", { class: wide ? "lm-figure lm-figure-wide" : "lm-figure" },
    node("figcaption", {}, heading, extra), drawing,
    dataTable({ title: "Numbers", label: `Numbers: ${heading}`, ...numbers }));
}

/** @param {HTMLElement} element The component. */
export function listenToTables(element) {
  element.addEventListener("toggle", ({ target }) => {
    if (target instanceof HTMLDetailsElement) fillTable(target);
  }, true);
}

/** @param {HTMLElement} element The component. */
export function refreshTables(element) {
  for (const details of element.querySelectorAll("details.lm-more")) {
    if (details instanceof HTMLDetailsElement) fillTable(details);
  }
}

/** @param {HTMLDetailsElement} details */
function fillTable(details) {
  const table = tables.get(details);
  if (!table || !details.open) return;
  const rows = sortRows(table.rows(), table.sort);
  table.holder.replaceChildren(...(rows.length ? filled(table, rows) : [node("p", {}, "Nothing to list.")]));
}

/**
 * @param {Table} table
 * @param {Row[]} rows
 */
function filled({ title, label, columns, sort }, rows) {
  const shown = columns.filter(([key]) => rows[0][key] !== undefined);
  const save = node("button", { type: "button", class: "lm-quiet", "data-act": "twin-csv" }, "Save as CSV");
  return [
    node("p", { class: "lm-acts" }, save),
    node("table", { class: "lm-numbers lm-table" },
      node("caption", {}, `${label || title}, ${rows.length} rows${rows.length > MOST_ROWS ? `; here the first ${MOST_ROWS}, in the CSV all` : ""}`),
      sortHeads(shown.map(([key]) => key), sort),
      node("tbody", {}, ...rows.slice(0, MOST_ROWS).map((row) => (
        node("tr", {}, ...shown.map(([key, words]) => node("td", {}, words(row[key])))))))),
  ];
}

/**
 * The head of a table that can be sorted: a button a column, its arrow for the eye only.
 *
 * @param {string[]} names
 * @param {Sorting} sort
 */
function sortHeads(names, { key, down }) {
  return node("thead", {}, node("tr", {}, ...names.map((name) => {
    const isSorted = name === key, [order, arrow] = down ? ["descending", " ↓"] : ["ascending", " ↑"];
    /** @type {Attributes} */
    const attributes = { type: "button", class: "lm-quiet", "data-key": name };
    return node("th", { scope: "col", "aria-sort": isSorted ? order : "none" },
      node("button", attributes, name, isSorted ? node("span", { "aria-hidden": "true" }, arrow) : null));
  })));
}

/**
 * Rows in the selected order, equal ones by layer.
 *
 * @param {Row[]} rows
 * @param {Sorting} sort
 */
export function sortRows(rows, { key, down }) {
  const sign = down ? -1 : 1;
  return [...rows].sort((x, y) => sign * compare(x[key], y[key]) || Number(x.layer) - Number(y.layer));
}

/**
 * @param {any} x
 * @param {any} y
 */
function compare(x, y) {
  if (x > y) return 1;
  return x < y ? -1 : 0;
}

/**
 * What the buttons of a table do. Returns true when the button was one of them.
 *
 * @param {HTMLElement} button
 */
export function tableAction(button) {
  const details = button.closest("details");
  const table = details && tables.get(details);
  if (!table) return false;
  if (button.dataset.key) sortBy(details, table, button.dataset.key);
  else if (button.dataset.act === "twin-csv") saveText(`${table.stem}.csv`, csvText(table.rows()), "text/csv");
  else return false;
  return true;
}

/**
 * A second press on the same head turns the order; numbers start with the largest.
 *
 * @param {HTMLDetailsElement} details
 * @param {Table} table
 * @param {string} key
 */
function sortBy(details, table, key) {
  const isText = typeof table.rows()[0]?.[key] === "string" || key === table.columns[0][0];
  table.sort = { key, down: table.sort.key === key ? !table.sort.down : !isText };
  fillTable(details);
  /** @type {NodeListOf<HTMLElement>} */
  const heads = table.holder.querySelectorAll("[data-key]");
  [...heads].find((head) => head.dataset.key === key)?.focus();
}
