// @ts-check
// The result of a search: scores on unseen items, and all evaluations in a table that can be sorted, with
// a button that takes the plan of each.

import { node } from "../web/dom.js";
import { percentPoints } from "./scores.js";

/** @import { Sorting } from "../web/types.d.ts" */
/** @import { Content, Searched, SearchRow, State, UnseenRow } from "./types.d.ts" */

const GROUPS = ["math", "perception", "other"];

/**
 * @param {Content} content
 * @param {State} state
 */
export function searchTables(content, { sort, served }) {
  const { searched } = content;
  if (!searched) return [];
  return [
    ...(searched.unseen.length ? [unseenTable(searched.unseen)] : []),
    evaluationTable(content, searched, sort, served),
  ];
}

/** @param {UnseenRow[]} unseen */
function unseenTable(unseen) {
  const heads = ["Model", "Task", "Items", "Score", "95 % interval", "n"];
  const rows = unseen.map(({ model, task, part, right, n, low, high }) => node("tr", {},
    node("th", { scope: "row" }, model), node("td", {}, task), node("td", {}, part), node("td", {}, n ? `${percentPoints(right / n)} %` : "–"),
    node("td", {}, `${percentPoints(low)}–${percentPoints(high)}`), node("td", {}, String(n))));
  return scrolled("Scores on items that the search has not seen", [node("thead", {}, node("tr", {}, ...heads.map((head) => node("th", { scope: "col" }, head)))),
    node("tbody", {}, ...rows)]);
}

/**
 * @param {Content} content
 * @param {Searched} searched
 * @param {Sorting} sort
 * @param {boolean} served
 */
function evaluationTable(content, searched, sort, served) {
  const groups = GROUPS.filter((name) => searched.rows.some(({ scores }) => name in scores));
  const columns = searchColumns(searched, groups);
  const heads = columns.map(({ key }) => sortHead(key, sort));
  const rows = sortedRows(searched.rows, sort, columns).map((row) => node("tr", { class: row.best ? "ev-is-best" : null },
    ...columns.map(({ words }, i) => (i ? node("td", {}, ...words(row)) : node("th", { scope: "row" }, ...words(row)))),
    node("td", {}, ...takeButton(content, searched.rows.indexOf(row), served))));
  return scrolled(`Evaluations on validation items, ${rows.length} rows`, [
    node("thead", {}, node("tr", {}, ...heads, node("th", { scope: "col" }, "Plan"))), node("tbody", {}, ...rows)]);
}

/** @typedef {{ key: string, value: (row: SearchRow) => number | string | null, words: (row: SearchRow) => (Node | string)[] }} Column */

/**
 * @param {Searched} searched
 * @param {string[]} groups
 * @returns {Column[]}
 */
export function searchColumns({ parameters, rows }, groups) {
  const hasPath = rows.some(({ disagreement }) => disagreement !== null);
  return [
    { key: "evaluation", value: ({ number }) => number, words: ({ number, best, front }) => [
      String(number), ...(best ? [badge("best")] : []), ...(front ? [badge("front")] : [])] },
    ...parameters.map((key, i) => ({ key, value: (/** @type {SearchRow} */ row) => row.values[i],
      words: (/** @type {SearchRow} */ row) => [short(row.values[i])] })),
    { key: "score", value: ({ score }) => score, words: ({ score, error }) => [score === null ? "–" : `${score.toFixed(1)} ± ${error.toFixed(1)}`] },
    ...groups.map((key) => ({ key, value: (/** @type {SearchRow} */ { scores }) => scores[key] ?? null,
      words: (/** @type {SearchRow} */ { scores }) => [key in scores ? scores[key].toFixed(1) : "–"] })),
    ...(hasPath ? [{ key: "disagreement", value: (/** @type {SearchRow} */ { disagreement }) => disagreement,
      words: (/** @type {SearchRow} */ { disagreement }) => [disagreement === null ? "–" : String(disagreement)] }] : []),
    { key: "items", value: ({ items }) => items, words: ({ items }) => [String(items)] },
    { key: "state", value: ({ state }) => state, words: ({ state, reason }) => [
      state, ...(reason ? [node("small", {}, reason)] : [])] },
  ];
}

/**
 * Rows in the selected order; those without a value are always last.
 *
 * @param {SearchRow[]} rows
 * @param {Sorting} sort
 * @param {Column[]} columns
 */
export function sortedRows(rows, { key, down }, columns) {
  const { value } = columns.find((column) => column.key === key) ?? columns[0], sign = down ? -1 : 1;
  return [...rows].sort((first, second) => {
    const [x, y] = [value(first), value(second)];
    if (x === null || y === null) return Number(x === null) - Number(y === null);
    return x === y ? first.number - second.number : sign * (x < y ? -1 : 1);
  });
}

/**
 * @param {string} key
 * @param {Sorting} sort
 */
function sortHead(key, { key: sorted, down }) {
  const isSorted = key === sorted, [order, arrow] = down ? ["descending", " ↓"] : ["ascending", " ↑"];
  return node("th", { scope: "col", "aria-sort": isSorted ? order : "none" },
    node("button", { type: "button", class: "lm-quiet", "data-sort": key }, key, isSorted ? node("span", { "aria-hidden": "true" }, arrow) : null));
}

/**
 * @param {Content} content
 * @param {number} i
 * @param {boolean} served
 */
function takeButton(content, i, served) {
  const { takes, plan, label } = content.points[i];
  if (!takes) return [];
  const name = served ? node("button", { type: "button", class: "lm-quiet", "data-point": i, "aria-label": `Use the plan of ${label}` }, "Use plan") : null;
  return [...(name ? [name] : []), node("small", {}, plan)];
}

/** @param {string} words */
function badge(words) {
  return node("span", { class: "ev-best" }, words);
}

/** @param {number} value */
function short(value) {
  return String(Number(value.toPrecision(4)));
}

/**
 * @param {string} caption
 * @param {Node[]} parts
 */
function scrolled(caption, parts) {
  return node("div", { class: "ev-scroll ev-search", tabindex: 0, role: "region", "aria-label": caption },
    node("table", { class: "ev-scores" }, node("caption", {}, caption), ...parts));
}
