// @ts-check
// The tables under the map: all matrices, the change per layer, and the curves over lambda.

import { count, fixed, lambdaText, percent } from "../../web/format.js";
import { angles, cellChange, root } from "../../web/preview.js";
import { quantityRow } from "../../web/quantities.js";
import { LAMBDA_TICKS } from "../../web/scales.js";
import { singularValues } from "../../web/spectrum.js";
import { dataTable } from "../../web/tables.js";
import { fileStem } from "./takeaway.js";

/** @import { Angles, Cell, Column, Index, Plan, Preview, Row } from "../../web/types.d.ts" */
/** @import { LayerMap } from "./map.js" */
/** @typedef {{ index: Index, plan: Plan, result: Preview }} Shown */

/** @type {Column[]} */
const MATRIX_COLUMNS = [
  ["layer", String], ["module", String], ["expert", String], ["similarity", (v) => fixed(v)],
  ["merges", (v) => (v ? "merges" : "kept")], ["override", (v) => (v ? `always ${v}` : "")], ["change", percent],
  ["cosine", (v) => (v === "" ? "–" : fixed(v))], ["norm_ratio", (v) => (v === "" ? "–" : fixed(v, 2))], ["parameters", count],
];

/**
 * @param {Shown} shown
 * @returns {Row[]}
 */
export function matrixRows({ index, plan, result }) {
  return index.cells.flatMap((cell) => cell.experts.map((record, expert) => {
    const update = record.updates[plan.variant];
    return {
      layer: cell.layer, module: cell.module, expert, similarity: record.similarity[plan.similarity],
      merges: result.masks[cell.position].includes(expert), override: plan.overrides[cell.name] || "",
      change: cellChange(cell, [expert], plan), parameters: cell.numel, ...quantityRow(record, cell, plan),
      first: record.similarity.first, max: record.similarity.max, weighted: record.similarity.weighted,
      rho: record.rho, weight_norm2: record.weight_norm2, mllm_norm2: record.mllm_norm2,
      math_norm2: record.math_norm2, inner: record.inner, update_norm2: update?.norm2, update_inner: update?.inner,
      name: cell.name,
    };
  }));
}

/**
 * @param {Shown} shown
 * @returns {Row[]}
 */
export function layerRows({ index, result }) {
  return index.layers.map((layer) => {
    const cells = index.cells.filter((cell) => cell.layer === layer);
    const merging = cells.filter((cell) => result.masks[cell.position].length).length;
    return { layer, matrices: cells.length, merging, change: result.layer_change[layer] };
  });
}

/**
 * @param {Shown} shown
 * @returns {Row[]}
 */
export function lambdaRows({ index, result: { sums } }) {
  return LAMBDA_TICKS.map(([lambda]) => cosineRow(lambda, angles(sums, lambda), lambda * root(sums.xx, index.weight2)));
}

/**
 * @param {number} lambda
 * @param {Angles} cosines Of the merged task vector.
 * @param {number} change
 * @returns {Row}
 */
function cosineRow(lambda, { keep, absorb }, change) {
  return { lambda, "cosine to vision": keep, "cosine to math": absorb, change };
}

/**
 * The singular values of some matrices, all or the samples that the pack has, which `values` and
 * `possible` count; angles are sampled.
 *
 * @param {Cell[]} cells
 * @returns {Row[]}
 */
export function spectrumRows(cells) {
  return cells.flatMap((cell) => cell.experts.flatMap((record) => {
    const [mllm, math, base] = /** @type {const} */ (["mllm", "math", "base"]).map((side) => singularValues(record, side));
    const sampled = new Map(record.index.map((rank, at) => [rank, record.angles[at]]));
    return (mllm?.ranks ?? []).map((rank, at) => ({
      name: cell.name, expert: record.expert, rank, mllm_sigma: mllm?.values[at] ?? "", math_sigma: math?.values[at] ?? "",
      base_sigma: base?.values[at] ?? "", angle: sampled.get(rank) ?? "", values: mllm?.values.length, possible: mllm?.possible }));
  }));
}

/** @param {LayerMap} map */
export function buildTables(map) {
  const { pack, index } = map.state, stem = fileStem(pack);
  const columns = MATRIX_COLUMNS.filter(([key]) => key !== "expert" || index.nExperts > 1);
  map.dom.twins.replaceChildren(
    dataTable({ title: "Table of all matrices", stem, rows: () => matrixRows(map.state), columns }),
    dataTable({ title: "Table of layers", stem: `${stem}-layers`, rows: () => layerRows(map.state),
      columns: [["layer", String], ["matrices", String], ["merging", String], ["change", percent]] }),
    dataTable({ title: "Table over λ", stem: `${stem}-lambda`, rows: () => lambdaRows(map.state),
      columns: [["lambda", lambdaText], ["cosine to vision", (v) => fixed(v)], ["cosine to math", (v) => fixed(v)], ["change", percent]] }));
}
