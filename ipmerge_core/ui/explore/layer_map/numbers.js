// @ts-check
// The rows of a matrix's table of numbers.

import { fixed, percent, scientific } from "../../web/format.js";
import { DEFAULT_PLAN, MEASURES } from "../../web/plan.js";
import { cellChange } from "../../web/preview.js";
import { findQuantity } from "../../web/quantities.js";
import { MEASURE_LABELS } from "../../web/words.js";

/** @import { Cell, LayerRecord, Plan, QuantityKey, Ranks } from "../../web/types.d.ts" */
/** @typedef {{ cell: Cell, record: LayerRecord }} Shown */
/** @typedef {string | ((plan: Plan) => string)} Words A text, or one that follows the plan. */
/** @typedef {{ label: string, value: (shown: Shown) => Words, hint?: string }} NumberRow */

/**
 * @param {Cell[]} cells The one or two matrices of the table.
 * @returns {NumberRow[]}
 */
export function numberRows(cells) {
  return [
    ...MEASURES.map((measure) => (
      { label: MEASURE_LABELS[measure], value: (/** @type {Shown} */ { record }) => fixed(record.similarity[measure]) })),
    { label: "best angle at rank", value: ({ record }) => orDash(record.best_index) },
    ...principalRows(cells),
    { label: "change if merged", hint: "‖λP‖ / ‖W‖ at the current λ",
      value: ({ cell, record }) => (plan) => percent(cellChange(cell, [record.expert], plan)) },
    quantityRow("mllm_change", percent),
    quantityRow("math_change", percent),
    quantityRow("cosine", fixed),
    quantityRow("norm_ratio", fixed),
    { label: "rescaling ρ", hint: "ratio of nuclear norms, MLLM over math", value: ({ record }) => fixed(record.rho, 2) },
    { label: "gap (σ₁ − σ₂) / σ₁", hint: "of the MLLM's task vector", value: ({ record }) => percent(record.gap) },
    { label: "directions above rounding, MLLM | math",
      hint: `of ${Math.min(...cells[0].shape)}: only these are used; the others may be rounding errors of the stored weights`,
      value: ({ record: r }) => `${orDash(r.mllm_directions)} | ${orDash(r.math_directions)}` },
    rankRow("stable rank, MLLM | math", (ranks) => fixed(ranks?.stable, 1)),
    rankRow("effective rank, MLLM | math", (ranks) => fixed(ranks?.effective, 1)),
    rankRow("ranks for 90 % energy, MLLM | math", (ranks) => orDash(ranks?.energy)),
    ...sumRows(cells),
    { label: "shape", value: ({ cell }) => cell.shape.join(" × ") },
  ];
}

/**
 * Sums that an analysis computes from the exact values, where the packs have them.
 *
 * @param {Cell[]} cells
 * @returns {NumberRow[]}
 */
function sumRows(cells) {
  if (!cells.every((cell) => cell.experts[0].spectra)) return [];
  /** @type {[string, "total" | "squares"][]} */
  const sums = [["sum of σ, MLLM | math", "total"], ["sum of σ², MLLM | math", "squares"]];
  return sums.map(([label, key]) => ({ label, hint: "exact, of all computed singular values",
    value: ({ record: { spectra } }) => `${scientific(spectra?.mllm[key])} | ${scientific(spectra?.math[key])}` }));
}

/** @param {number | null | undefined} value */
function orDash(value) {
  return String(value ?? "–");
}

/**
 * A number that the map can show as well; none of them depends on the plan.
 *
 * @param {QuantityKey} key
 * @param {(value: number | null | undefined) => string} words
 * @returns {NumberRow}
 */
function quantityRow(key, words) {
  const quantity = findQuantity(key);
  return { label: quantity?.label ?? key, hint: quantity?.unit, value: ({ cell, record }) => words(quantity?.of(record, cell, DEFAULT_PLAN)) };
}

/**
 * @param {string} label
 * @param {(ranks: Ranks | null | undefined) => string} words
 * @returns {NumberRow}
 */
function rankRow(label, words) {
  return { label, value: ({ record }) => `${words(record.mllm_ranks)} | ${words(record.math_ranks)}` };
}

/**
 * @param {Cell[]} cells
 * @returns {NumberRow[]}
 */
function principalRows(cells) {
  if (!cells.every((cell) => cell.experts[0].principal)) return [];
  return Object.keys(cells[0].experts[0].principal ?? {}).map((top) => ({
    label: `subspaces of the first ${top}`, hint: "mean cosine of the principal angles between the leading right directions",
    value: ({ record }) => fixed(record.principal?.[top]) }));
}
