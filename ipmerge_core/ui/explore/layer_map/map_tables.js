// @ts-check
// The tables under the map: all matrices, the change per layer, and the curves over lambda.

import { count, fixed, lambdaText, percent } from "../../web/format.js";
import { angles, cellChange, root } from "../../web/preview.js";
import { LAMBDA_TICKS } from "../../web/scales.js";
import { dataTable } from "../../web/tables.js";
import { fileStem } from "./takeaway.js";

/** @import { Angles, Cell, Column, Index, Plan, Preview, Row } from "../../web/types.d.ts" */
/** @import { LayerMap } from "./map.js" */
/** @typedef {{ index: Index, plan: Plan, result: Preview }} Shown */

/** @type {Column[]} */
const MATRIX_COLUMNS = [
  ["layer", String], ["module", String], ["expert", String], ["similarity", (v) => fixed(v)],
  ["merges", (v) => (v ? "merges" : "kept")], ["override", (v) => (v ? `always ${v}` : "")], ["change", percent],
  ["parameters", count],
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
      change: cellChange(cell, [expert], plan), parameters: cell.numel,
      first: record.similarity.first, max: record.similarity.max, weighted: record.similarity.weighted,
      rho: record.rho, gap: record.gap, weight_norm2: record.weight_norm2, mllm_norm2: record.mllm_norm2,
      math_norm2: record.math_norm2, inner: record.inner, update_norm2: update.norm2, update_inner: update.inner,
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
 * The samples of the spectra of some matrices.
 *
 * @param {Cell[]} cells
 * @returns {Row[]}
 */
export function spectrumRows(cells) {
  return cells.flatMap((cell) => cell.experts.flatMap((record) => record.index.map((rank, at) => ({
    name: cell.name, expert: record.expert, rank,
    mllm_sigma: record.mllm_sigma[at], math_sigma: record.math_sigma[at], angle: record.angles[at] }))));
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
