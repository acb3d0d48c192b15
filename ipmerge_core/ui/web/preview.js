// @ts-check
// The arithmetic: pack + plan -> what a merge would change. Pure, no DOM.
// Exact, because the update is affine in lambda: with U = lambda * sum of the selected P_k,
//   ||U||^2 = lambda^2 (sum ||P_k||^2 + 2 sum_{j<k} <P_j, P_k>),   <dV, U> = lambda * sum <dV, P_k>.
// Python does the same sums (`MergePlan.preview`); a test holds the two together.

import { complementAt } from "./plan.js";

/** @import { Angles, Cell, Flip, Index, LayerRecord, Pack, Place, Plan, Preview } from "./types.d.ts" */
/** @import { Sums, UpdateProducts, Variant, View } from "./types.d.ts" */

// As `is_projection` in Python: what a plan selects by similarity by default.
const PROJECTION = /^(?!(?:.*\.)?router\b)(?:q|k|v|o|gate|up|down|(?:.+\.)?(?:[qkvo]|gate|up|down|gate_up)_proj)$/;
const MODULE_ORDER = ["q", "k", "v", "o", "gate", "up", "down"];

/** @type {Pack} */
const NO_PACK = {
  name: "", engine: "", created: "", parameters: {}, records: [],
  sources: { mllm: { id: "" }, base: { id: "" }, math: [] },
  totals: { model_parameters: 1, llm_parameters: 1, model_bytes: 1 },
};

/** What a map holds before a pair is opened. */
export function emptyIndex() {
  return indexPack(NO_PACK);
}

/**
 * One cell per matrix, with one record per expert, and the sums that no plan changes. A pack that is
 * incomplete lists the matrices to come; those without records have no cells yet.
 *
 * @param {Pack} pack
 * @returns {Index}
 */
export function indexPack(pack) {
  /** @type {Place[]} */
  const places = pack.growing?.places || pack.records;
  const found = new Set(places.map((place) => place.module));
  const layers = [...new Set(places.map((place) => place.layer))].sort((a, b) => a - b);
  const index = {
    expected: new Set(places.map(({ layer, module }) => `${layer}.${module}`)),
    pack, layers, modules: [...MODULE_ORDER.filter((m) => found.delete(m)), ...found],
    cells: [], byName: new Map(), at: new Map(), layerWeight2: new Map(layers.map((layer) => [layer, 0])),
    weight2: 0, mllm2: 0, numel: 0, nExperts: 0,
  };
  addRecords(index, pack.records);
  return index;
}

/**
 * The matrix of a layer and a module; of several, the first.
 *
 * @param {Index} index
 * @param {number} layer
 * @param {string} module
 */
export function cellAt(index, layer, module) {
  return index.at.get(`${layer}.${module}`);
}

/**
 * Take in records and return the cells that are new. All records of a matrix come together.
 *
 * @param {Index} index
 * @param {LayerRecord[]} records
 * @returns {Cell[]}
 */
export function addRecords(index, records) {
  const known = index.cells.length;
  for (const record of records) cellOf(index, record).experts[record.expert] = record;
  const added = index.cells.slice(known);
  for (const cell of added) countCell(index, cell);
  return added;
}

/**
 * @param {Index} index
 * @param {LayerRecord} record
 * @returns {Cell}
 */
function cellOf(index, { name, layer, module, shape }) {
  const known = index.byName.get(name);
  if (known) return known;
  const position = index.cells.length;
  /** @type {Cell} */
  const cell = { name, layer, module, shape, numel: shape[0] * shape[1], experts: [], position,
    usual: PROJECTION.test(module), members: [] };
  const first = index.at.get(`${layer}.${module}`);
  if (first) cell.members = first.members;
  else index.at.set(`${layer}.${module}`, cell);
  cell.members.push(cell);
  index.cells.push(cell);
  index.byName.set(name, cell);
  return cell;
}

/**
 * @param {Index} index
 * @param {Cell} cell
 */
function countCell(index, cell) {
  const [record] = cell.experts.filter(Boolean);
  index.weight2 += record.weight_norm2;
  index.mllm2 += record.mllm_norm2;
  index.numel += cell.numel;
  index.nExperts = Math.max(index.nExperts, cell.experts.length);
  index.layerWeight2.set(cell.layer, (index.layerWeight2.get(cell.layer) ?? 0) + record.weight_norm2);
}

/**
 * The rule: an expert merges into a projection iff its similarity reaches S_alpha, unless
 * overridden; other matrices merge only by hand.
 *
 * @param {Cell} cell
 * @param {number} expert
 * @param {Plan} plan
 */
function selects(cell, expert, plan) {
  const override = plan.overrides[cell.name];
  if (override) return override === "merge";
  return cell.usual && cell.experts[expert].similarity[plan.similarity] >= plan.s;
}

/**
 * @param {Cell} cell
 * @param {Plan} plan
 */
function selectedExperts(cell, plan) {
  const chosen = [];
  for (let k = 0; k < cell.experts.length; k++) if (selects(cell, k, plan)) chosen.push(k);
  return chosen;
}

/** @type {UpdateProducts} Of a matrix whose record lacks an update, which no plan then chooses. */
const UNKNOWN = { norm2: NaN, inner: NaN, cross: [] };

/**
 * <dV, X> and ||X||^2 of one matrix for X = sum of the chosen experts' P_k; with a budget X is
 * rescaled to that relative change.
 *
 * @param {Cell} cell
 * @param {number[]} experts
 * @param {Pick<Plan, "variant" | "budget">} plan
 */
function direction(cell, experts, { variant, budget }) {
  const sums = products(cell, experts, variant);
  if (!budget) return sums;
  const factor = sums.norm2 > 0 ? budget * Math.sqrt(cell.experts[0].weight_norm2 / sums.norm2) : 0;
  return { inner: sums.inner * factor, norm2: sums.norm2 * (factor * factor) };
}

/**
 * @param {Cell} cell
 * @param {number[]} experts
 * @param {Variant} variant
 */
function products(cell, experts, variant) {
  let inner = 0, norm2 = 0;
  for (const k of experts) {
    const update = cell.experts[k].updates[variant] ?? UNKNOWN;
    let crossed = 0;
    for (const j of experts) if (j < k) crossed += update.cross[j];
    inner += update.inner;
    norm2 += update.norm2 + 2 * crossed; // in Python's order, so that both round alike
  }
  return { inner, norm2 };
}

/**
 * @param {number} product
 * @param {number} a2
 * @param {number} b2
 */
function cosine(product, a2, b2) {
  if (!(a2 > 0) || !(b2 > 0)) return null;
  return Math.max(-1, Math.min(1, product / Math.sqrt(a2 * b2)));
}

/**
 * Cosines of the merged task vector to the MLLM's own (keep) and to the math update (absorb).
 *
 * @param {Sums} sums
 * @param {number} lambda
 * @returns {Angles}
 */
export function angles(sums, lambda) {
  const merged2 = sums.vv + 2 * lambda * sums.vx + lambda * lambda * sums.xx;
  return {
    keep: cosine(sums.vv + lambda * sums.vx, sums.vv, merged2),
    absorb: cosine(sums.vx + lambda * sums.xx, sums.xx, merged2),
  };
}

/**
 * Everything the page shows for a plan; the same names as Python's `Preview`.
 *
 * @param {Index} index
 * @param {Plan} plan
 * @returns {Preview}
 */
export function previewOf(index, plan) {
  const layerXX = new Map(index.layers.map((layer) => [layer, 0]));
  const sums = { vv: index.mllm2, vx: 0, xx: 0 };
  /** @type {string[]} */
  const selected = [];
  /** @type {number[][]} */
  const masks = new Array(index.cells.length);
  /** @type {number[]} */
  const shares = [];
  let touched = 0, own2 = 0, merged2 = 0;
  index.cells.forEach((cell, position) => {
    const experts = selectedExperts(cell, plan);
    masks[position] = experts;
    if (!experts.length) return;
    const { inner, norm2 } = direction(cell, experts, plan), own = products(cell, experts, "select_only").norm2;
    shares.push(own > 0 ? plan.lambda * Math.sqrt(Math.max(norm2, 0) / own) : 0);
    own2 += own;
    merged2 += cell.experts[0].weight_norm2;
    selected.push(cell.name);
    touched += cell.numel;
    sums.vx += inner;
    sums.xx += norm2;
    layerXX.set(cell.layer, (layerXX.get(cell.layer) ?? 0) + norm2);
  });
  const totals = index.pack.totals;
  return {
    selected, masks, sums,
    n_matrices: index.cells.length,
    parameters_touched: touched,
    bytes_rewritten: touched * (totals.decoder_itemsize || totals.model_bytes / totals.model_parameters),
    relative_change: plan.lambda * root(sums.xx, index.weight2),
    update_share: median(shares),
    expert_change: root(own2, merged2),
    layer_change: layerChange(index, layerXX, plan.lambda),
    ...angles(sums, plan.lambda),
  };
}

/** @param {number[]} values */
function median(values) {
  const ordered = [...values].sort((a, b) => a - b), middle = Math.floor(ordered.length / 2);
  if (!ordered.length) return null;
  return ordered.length % 2 ? ordered[middle] : (ordered[middle - 1] + ordered[middle]) / 2;
}

/**
 * @param {Index} index
 * @param {Map<number, number>} layerXX
 * @param {number} lambda
 */
function layerChange(index, layerXX, lambda) {
  /** @type {Record<number, number>} */
  const changes = {};
  for (const layer of index.layers) {
    changes[layer] = lambda * root(layerXX.get(layer) ?? 0, index.layerWeight2.get(layer) ?? 0);
  }
  return changes;
}

/**
 * The square root of a ratio of squared norms.
 *
 * @param {number} norm2
 * @param {number} of2
 */
export function root(norm2, of2) {
  return of2 > 0 ? Math.sqrt(Math.max(norm2, 0) / of2) : 0;
}

/**
 * The share of dM inside the MLLM's leading directions, those that hold a share of dV's energy; null
 * where the record does not tell.
 *
 * @param {LayerRecord} record
 * @param {number} share In percent.
 */
export function shareInside({ updates }, share) {
  const whole = updates.select_only.norm2, outside = updates[complementAt(share)]?.norm2;
  return outside === undefined || !(whole > 0) ? null : Math.max(0, Math.min(1, 1 - outside / whole));
}

/**
 * Relative change of one matrix under a plan, as if its experts were the given ones.
 *
 * @param {Cell} cell
 * @param {number[]} experts
 * @param {Plan} plan
 */
export function cellChange(cell, experts, plan) {
  const { norm2 } = direction(cell, experts, plan);
  return plan.lambda * root(norm2, cell.experts[0].weight_norm2);
}

/**
 * The thresholds where a matrix joins or leaves, descending; overridden matrices never flip.
 *
 * @param {Index} index
 * @param {Plan} plan
 * @returns {Flip[]}
 */
export function flipValues(index, plan) {
  return index.cells
    .filter((cell) => cell.usual && !plan.overrides[cell.name])
    .flatMap((cell) => cell.experts.map((record) => (
      { cell, expert: record.expert, value: record.similarity[plan.similarity] })))
    .sort((a, b) => b.value - a.value);
}

/**
 * The similarity that a cell shows: of the expert in view, or the highest of all.
 *
 * @param {View} view
 * @param {Cell} cell
 */
export function shownSimilarity({ plan, expert }, cell) {
  const values = cell.experts.map((record) => record.similarity[plan.similarity]);
  return expert >= 0 ? values[expert] : Math.max(...values);
}

/**
 * Whether the expert in view (or any, where all are) merges into a cell.
 *
 * @param {Pick<View, "expert">} view
 * @param {Pick<Preview, "masks">} result
 * @param {Cell} cell
 */
export function merges({ expert }, result, cell) {
  const mask = result.masks[cell.position];
  return expert >= 0 ? mask.includes(expert) : mask.length > 0;
}

/**
 * How many matrices of a place merge; the place itself counts as merging if most of them do.
 *
 * @param {Pick<View, "expert">} view
 * @param {Pick<Preview, "masks">} result
 * @param {Cell} cell
 */
export function countMerging(view, result, { members }) {
  const merging = members.filter((each) => merges(view, result, each)).length;
  return { merging, total: members.length, on: 2 * merging > members.length ? "1" : "0" };
}

/**
 * The expert whose numbers a cell shows: the one in view, or the most similar.
 *
 * @param {View} view
 * @param {Cell} cell
 */
export function expertInView({ plan, expert }, cell) {
  if (expert >= 0) return expert;
  const values = cell.experts.map((record) => record.similarity[plan.similarity]);
  return values.indexOf(Math.max(...values));
}
