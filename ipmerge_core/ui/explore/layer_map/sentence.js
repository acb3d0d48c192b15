// @ts-check
// The summary of a plan: the sentence, the matrices close to the threshold, and those added and
// removed. The lines keep their height while something is being dragged.

import { node, part, setText } from "../../web/dom.js";
import { bytes, count, percent } from "../../web/format.js";
import { merges } from "../../web/preview.js";
import { cellsOf } from "../../web/targets.js";
import { atLeast, thresholdText } from "../../web/thresholds.js";

/** @import { Pack, Preview } from "../../web/types.d.ts" */
/** @import { LayerMap } from "./map.js" */
/** @import { State } from "./types.d.ts" */
/** @typedef {string | { strong: string } | "·"} Piece Text, or emphasized text, or a dot. */

const STEP = 0.01;
const SMALL_SHARE = 0.25; // of the math model's own change
const SAME = "The merged model equals the multimodal model.";

/** @type {WeakMap<Element, string>} What was written last, so that a frame writes only what is new. */
const written = new WeakMap();

/** @param {LayerMap} map */
export function paintSentence(map) {
  const { dom, state: { pack, result } } = map;
  setText(dom.count, `${result.selected.length} of ${result.n_matrices}`);
  const pieces = result.selected.length ? mergingPieces(map.state) : nothingPieces(map.state);
  const chip = pack.growing ? growingText(pack) : "", key = JSON.stringify([chip, pieces]);
  if (written.get(dom.sum) === key) return;
  written.set(dom.sum, key);
  dom.sum.replaceChildren(...(chip ? [node("span", { class: "lm-chip" }, chip), " "] : []), ...pieces.map(drawn));
}

/**
 * What the sizes suggest, where an update is probably too small to matter; as in Python. It appears
 * between drags, so that nothing moves during one, and not while an analysis runs.
 *
 * @param {LayerMap} map
 */
export function paintAdvice({ dom: { advice }, state: { pack, plan, result } }) {
  const { update_share: share, expert_change: change, relative_change: whole } = result;
  const isKnown = !pack.growing && share !== null && change > 0 && plan.lambda > 0;
  const isZero = isKnown && whole === 0, isSmall = isKnown && !isZero && share < SMALL_SHARE && !plan.budget;
  advice.hidden = !isSmall && !isZero;
  part(advice, "[data-act=budget]").hidden = isZero;
  if (isZero) setText(part(advice, "[data-out=advice]"), "The update is zero: the merged model would equal the multimodal model.");
  if (!isSmall) return;
  setText(part(advice, "[data-out=advice]"), `In half of the merged matrices the update has less than ${percent(share)} of the size of `
    + `the math model's own change, which is probably too small to matter. A budget of ${percent(budgetFor(result))} at λ 1 gives every matrix `
    + "the relative change that the math model has on average.");
}

/**
 * The budget that the advice names.
 *
 * @param {Pick<Preview, "expert_change">} result
 */
export function budgetFor({ expert_change: change }) {
  return Math.min(1, Number(change.toPrecision(2)));
}

/** @param {Piece} piece */
function drawn(piece) {
  if (piece === "·") return node("span", { class: "lm-dot", "aria-hidden": "true" }, " · ");
  return typeof piece === "string" ? piece : node("strong", {}, piece.strong);
}

/**
 * @param {State} state
 * @returns {Piece[]}
 */
function mergingPieces({ pack: { growing, totals }, index, plan, result }) {
  const all = growing ? index.numel : totals.llm_parameters;
  return [
    { strong: `${result.selected.length} of ${result.n_matrices}` },
    growing ? ` analysed (${growing.total} in all) merge` : " matrices merge", "·",
    { strong: count(result.parameters_touched) }, ` of ${count(all)} ${growing ? "analysed" : "language-model"} parameters (`,
    { strong: percent(result.parameters_touched / all) }, ")", "·",
    "change ", { strong: percent(result.relative_change) }, " of ‖W‖", "·",
    ...closingPieces(plan.lambda, Boolean(growing), result),
  ];
}

/**
 * @param {number} lambda
 * @param {boolean} isGrowing
 * @param {Preview} result
 * @returns {Piece[]}
 */
function closingPieces(lambda, isGrowing, result) {
  if (lambda === 0) return ["λ is 0, so the merged model equals the multimodal model."];
  if (result.selected.length === result.n_matrices) {
    return [`Every ${isGrowing ? "analysed " : ""}matrix merges: no selection step is left.`];
  }
  return [`${bytes(result.bytes_rewritten)} rewritten`, "·", "vision tower unchanged"];
}

/**
 * @param {State} state
 * @returns {Piece[]}
 */
export function nothingPieces({ pack, index, plan }) {
  const similarities = index.cells.flatMap((cell) => cell.experts.map((record) => record.similarity[plan.similarity]));
  const best = similarities.reduce((highest, each) => Math.max(highest, each), -Infinity);
  return [{ strong: "Nothing merges" }, best < plan.s
    ? ` above ${thresholdText(atLeast(best))}, the highest similarity of this pair${pack.growing ? " so far" : ""}. ${SAME}`
    : `: every matrix is set to keep. ${SAME}`];
}

/**
 * The label in front of the sentence while the analysis is incomplete.
 *
 * @param {Pack} pack
 */
function growingText({ growing }) {
  const done = `${Math.floor(100 * (growing?.done ?? 0))} %`;
  return growing?.running ? `analysis running, ${done}` : `analysis stopped at ${done}`;
}

/**
 * How steep the edge is, and what of a brushed range merges.
 *
 * @param {LayerMap} map
 */
export function paintSense({ dom, state }) {
  const { joins, leaves } = edgeCounts(state);
  const near = `Lowering Sα by ${STEP} adds ${joins}, raising it by ${STEP} removes ${leaves}.`;
  setText(dom.sense, state.target?.kind === "range" ? `${rangeText(state)} ${near}` : near);
}

/**
 * How many matrices join and leave within a step of the threshold.
 *
 * @param {Pick<State, "index" | "plan">} state
 */
export function edgeCounts({ index, plan: { s, similarity, overrides } }) {
  let joins = 0, leaves = 0;
  const [lower, higher] = [s - STEP, s + STEP].map((value) => Number(value.toFixed(9))); // as they are typed
  for (const cell of index.cells) {
    if (overrides[cell.name]) continue;
    let best = 0;
    for (const record of cell.experts) best = Math.max(best, record.similarity[similarity]);
    if (best < s && best >= lower) joins += 1;
    else if (best >= s && best < higher) leaves += 1;
  }
  return { joins, leaves };
}

/** @param {State} state */
function rangeText(state) {
  const { target, index, result } = state, cells = cellsOf(index, target);
  if (target?.kind !== "range") return "";
  const n = cells.filter((cell) => merges(state, result, cell)).length;
  return `In range, layers ${target.from} to ${target.to}: ${n} of ${cells.length} merge.`;
}

/**
 * What has joined and left since the plan that the corner marks show.
 *
 * @param {LayerMap} map
 */
export function paintDrift({ dom, state: { ghost, result } }) {
  let joined = 0, left = 0;
  ghost.masks.forEach((before, position) => {
    const was = before.length > 0, is = result.masks[position].length > 0;
    if (is && !was) joined += 1;
    else if (was && !is) left += 1;
  });
  const words = joined || left ? `+${joined} −${left}` : "";
  setText(dom.drift, words);
  dom.drift.title = words && "matrices added and removed since the previous plan";
}
