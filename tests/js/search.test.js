// @ts-check
// The evaluations of a search: their order and what their cells show.

import assert from "node:assert/strict";
import { test } from "node:test";
import { evaluationOf } from "../../ipmerge_core/ui/evaluate/figure_points.js";
import { searchColumns, sortedRows } from "../../ipmerge_core/ui/evaluate/search_tables.js";

/** @import { SearchRow } from "../../ipmerge_core/ui/evaluate/types.d.ts" */

/**
 * @param {number} number
 * @param {number | null} score
 * @returns {SearchRow}
 */
function row(number, score) {
  return {
    number, score, values: [number / 10], state: score === null ? "failed" : "complete", error: 1.25, items: 20,
    scores: score === null ? {} : { math: score }, disagreement: number === 2 ? 4 : null, reason: "", best: false, front: false,
  };
}

const rows = [row(0, 10), row(1, null), row(2, 30), row(3, 10), row(4, 20)];
const columns = searchColumns({ parameters: ["λ"], rows, unseen: [] }, ["math"]);

/**
 * @param {string} key
 * @param {boolean} down
 */
function order(key, down) {
  return sortedRows(rows, { key, down }, columns).map(({ number }) => number);
}

test("rows are sorted by any column, equal ones by number and those without a value last", () => {
  assert.deepEqual(order("score", true), [2, 4, 0, 3, 1]);
  assert.deepEqual(order("score", false), [0, 3, 4, 2, 1]);
  assert.deepEqual(order("math", true), [2, 4, 0, 3, 1]);
  assert.deepEqual(order("λ", true), [4, 3, 2, 1, 0]);
  assert.deepEqual(order("state", false), [0, 2, 3, 4, 1]);
});

test("an unknown column sorts by evaluation", () => {
  assert.deepEqual(order("other", false), [0, 1, 2, 3, 4]);
});

test("disagreements with neighbours are a column of a search without labels only", () => {
  const labelled = searchColumns({ parameters: [], rows: [row(0, 10)], unseen: [] }, []);
  assert.ok(!labelled.some(({ key }) => key === "disagreement"));
  const { words } = columns.find(({ key }) => key === "disagreement") ?? columns[0];
  assert.deepEqual(words(rows[2]), ["4"]);
  assert.deepEqual(words(rows[0]), ["–"]);
});

test("a score is shown with its standard error, and a missing one as a dash", () => {
  const { words } = columns[2];
  assert.deepEqual(words(rows[2]), ["30.0 ± 1.3"]);
  assert.deepEqual(words(rows[1]), ["–"]);
  assert.deepEqual(columns.map(({ key }) => key), ["evaluation", "λ", "score", "math", "disagreement", "items", "state"]);
});

test("a click is on an evaluation if one of its points has a number, and not on the surface below", () => {
  assert.equal(evaluationOf([{ customdata: undefined }, { customdata: [7, 54.5] }]), 7);
  assert.equal(evaluationOf([{ customdata: [0] }]), 0);
  assert.equal(evaluationOf([{ customdata: ["7"] }, {}]), null);
  assert.equal(evaluationOf([]), null);
});
