// @ts-check
// What the layer map can show of a matrix: its similarity, or another number of its record.

import { fixed } from "./format.js";
import { shareOf, USUAL_SHARE } from "./plan.js";
import { cellChange, expertInView, root, shareInside, shownSimilarity } from "./preview.js";
import { quantile } from "./scales.js";

/** @import { Cell, KnockoutMap, LayerRecord, Plan, Quantity, QuantityKey, QuantityView, Ranks, View } from "./types.d.ts" */

/**
 * @param {QuantityKey} key
 * @param {string} label
 * @param {string} unit
 * @param {(value: number) => string} words
 * @param {(record: LayerRecord, cell: Cell, plan: Plan) => number | null | undefined} of
 * @returns {Quantity}
 */
function quantity(key, label, unit, words, of) {
  return { key, label, unit, words: (value) => (value === null ? "–" : words(value)), of };
}

/** @param {number} value */
const short = (value) => fixed(value, 2).replace(/^(-?)0\./, "$1.");
/** @param {number} value */
const percent = (value) => `${Number((100 * value).toPrecision(2))} %`;
/** @param {number} value */
const ranks = (value) => fixed(value, value < 10 ? 1 : 0);

/**
 * @param {"mllm_ranks" | "math_ranks"} side
 * @param {keyof Ranks} kind
 * @returns {(record: LayerRecord) => number | undefined}
 */
const rankOf = (side, kind) => (record) => record[side]?.[kind];

/** @type {readonly Quantity[]} */
export const QUANTITIES = [
  quantity("similarity", "similarity", "cosine, 0 to 1", short, (record, _, plan) => record.similarity[plan.similarity]),
  quantity("change", "change if merged", "‖λP‖ / ‖W‖", percent, (record, cell, plan) => cellChange(cell, [record.expert], plan)),
  quantity("cosine", "cosine of the task vectors", "−1 to 1", short, ({ inner, mllm_norm2, math_norm2 }) => (
    mllm_norm2 > 0 && math_norm2 > 0 ? inner / Math.sqrt(mllm_norm2 * math_norm2) : null)),
  quantity("norm_ratio", "norm ratio, math / MLLM", "‖ΔW_math‖ / ‖ΔW_mllm‖", (value) => fixed(value, 2),
    ({ mllm_norm2, math_norm2 }) => (mllm_norm2 > 0 ? Math.sqrt(math_norm2 / mllm_norm2) : null)),
  quantity("inside", "math change inside MLLM directions", "of ‖ΔW_math‖², in the MLLM's leading directions", percent,
    (record, _, plan) => shareInside(record, shareOf(plan.variant) ?? USUAL_SHARE)),
  quantity("mllm_change", "relative change, MLLM", "‖ΔW_mllm‖ / ‖W₀‖", percent, (r) => root(r.mllm_norm2, r.base_norm2)),
  quantity("math_change", "relative change, math", "‖ΔW_math‖ / ‖W₀‖", percent, (r) => root(r.math_norm2, r.base_norm2)),
  quantity("gap", "gap (σ₁ − σ₂) / σ₁, MLLM", "of the task vector", percent, ({ gap }) => gap),
  quantity("mllm_effective", "effective rank, MLLM", "directions", ranks, rankOf("mllm_ranks", "effective")),
  quantity("math_effective", "effective rank, math", "directions", ranks, rankOf("math_ranks", "effective")),
  quantity("mllm_stable", "stable rank, MLLM", "directions", ranks, rankOf("mllm_ranks", "stable")),
  quantity("math_stable", "stable rank, math", "directions", ranks, rankOf("math_ranks", "stable")),
  quantity("mllm_energy", "ranks for 90 % energy, MLLM", "directions", ranks, rankOf("mllm_ranks", "energy")),
  quantity("math_energy", "ranks for 90 % energy, math", "directions", ranks, rankOf("math_ranks", "energy")),
];

/** @param {number} value */
const points = (value) => `${value < 0 ? "−" : "+"}${fixed(Math.abs(100 * value), 0)}`;

/**
 * @param {QuantityKey} key
 * @param {string} label
 * @param {string} measured The model and the group of items, see `KnockoutMap`.
 */
const knockedOut = (key, label, measured) => (
  quantity(key, `knock-out, ${label}`, "points of the score, without attention or MLP of the layer", points, ({ knockout }) => knockout?.[measured]));

/**
 * Measured, where a knock-out of the pair is known: the change of the score without the module that a
 * matrix belongs to.
 *
 * @type {readonly Quantity[]}
 */
export const KNOCKOUT_QUANTITIES = [
  knockedOut("knockout_before_math", "unmerged, math", "unmerged math"),
  knockedOut("knockout_before_perception", "unmerged, perception", "unmerged perception"),
  knockedOut("knockout_after_math", "merged, math", "merged math"),
  knockedOut("knockout_after_perception", "merged, perception", "merged perception"),
];

/**
 * What can be shown of a pair.
 *
 * @param {{ knockout?: object }[]} records
 */
export function quantitiesOf(records) {
  return records.some(({ knockout }) => knockout) ? [...QUANTITIES, ...KNOCKOUT_QUANTITIES] : QUANTITIES;
}

/**
 * Records with the changes of a knock-out, each with those of its block's module, or of its own.
 *
 * @param {LayerRecord[]} records
 * @param {KnockoutMap | null | undefined} map
 * @returns {LayerRecord[]}
 */
export function withKnockout(records, map) {
  if (!map) return records.map(({ knockout, ...record }) => record);
  return records.map((record) => {
    const block = /^[qkvo]$|^[^.]*att/.test(record.module) ? "attention" : "mlp";
    const places = [`${record.layer}.${record.module}`, `${record.layer}.${block}`];
    const found = Object.entries(map).flatMap(([measured, changes]) => {
      const place = places.find((each) => changes[each] !== undefined);
      return place === undefined ? [] : [/** @type {[string, number]} */ ([measured, changes[place]])];
    });
    return { ...record, ...(found.length ? { knockout: Object.fromEntries(found) } : {}) };
  });
}

/**
 * The quantity of that name, if there is one.
 *
 * @param {string | null | undefined} key
 */
export function findQuantity(key) {
  return [...QUANTITIES, ...KNOCKOUT_QUANTITIES].find((each) => each.key === key);
}

/**
 * The value that a cell shows, of the expert in view; null where the pack has none.
 *
 * @param {QuantityView} view
 * @param {Cell} cell
 * @param {Quantity} shown
 */
export function shownValue(view, cell, shown) {
  if (shown.key === "similarity") return shownSimilarity(view, cell);
  const value = shown.of(cell.experts[expertInView(view, cell)], cell, view.plan);
  return value !== null && value !== undefined && Number.isFinite(value) ? value : null;
}

/**
 * The median of what the matrices of one place show; null where the pack has none.
 *
 * @param {QuantityView} view
 * @param {Cell} cell
 * @param {Quantity} shown
 */
export function medianValue(view, cell, shown) {
  const values = cell.members.flatMap((each) => shownValue(view, each, shown) ?? []).sort((a, b) => a - b);
  return values.length ? quantile(values, 0.5) : null;
}

/**
 * The similarity that a place shows: of several matrices, the median and the range.
 *
 * @param {View} view
 * @param {Cell} cell
 * @param {number} [digits]
 */
export function similarityWords(view, cell, digits = 2) {
  const values = cell.members.map((each) => shownSimilarity(view, each)).sort((a, b) => a - b);
  const middle = fixed(quantile(values, 0.5), digits);
  if (values.length === 1) return `similarity ${middle}`;
  return `median similarity ${middle} (${fixed(values[0], digits)} to ${fixed(values[values.length - 1], digits)})`;
}

/**
 * All quantities of a record under a plan, by name, as a table has them.
 *
 * @param {LayerRecord} record
 * @param {Cell} cell
 * @param {Plan} plan
 */
export function quantityRow(record, cell, plan) {
  return Object.fromEntries(quantitiesOf([record]).map(({ key, of }) => [key, of(record, cell, plan) ?? ""]));
}
