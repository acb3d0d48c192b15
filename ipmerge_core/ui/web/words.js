// @ts-check
// The names of things: measures, updates, modules, matrices, plans.

import { budgetText, lambdaText } from "./format.js";
import { DEFAULT_PLAN, keptOf, shareOf } from "./plan.js";
import { thresholdText } from "./thresholds.js";

/** @import { Pack, Plan, Variant } from "./types.d.ts" */

/** @type {Partial<Record<Variant, string>>} */
const VARIANT_LABELS = {
  sum: "γ sums to 1 (paper)",
  max: "γ divided by its maximum",
  rescale_only: "rescale only, no projection",
  select_only: "select only",
  protect: "protect: held back where the MLLM changed",
};
export const MEASURE_LABELS = {
  first: "first angle s₁",
  max: "best angle max sᵢ",
  weighted: "all angles, weighted",
};
export const MEASURE_MEANING = {
  first: "the cosine between the first right singular vectors of the two task vectors, s₁ = |⟨v₁, v₁′⟩|",
  max: "the largest cosine between right singular vectors of equal rank, max |⟨vᵢ, vᵢ′⟩|",
  weighted: "the cosines of all right singular vectors of equal rank, weighted by both singular values",
};
/** @type {Record<string, string>} */
export const MODULE_MEANING = {
  q: "Attention queries: what a token attends to.",
  k: "Attention keys: what queries are matched against.",
  v: "Attention values: what attended tokens contribute.",
  o: "Attention output: projection of the attended values.",
  gate: "MLP gate: which hidden features are active.",
  up: "MLP input: projection to the hidden features.",
  down: "MLP output: projection of the hidden features.",
};

/**
 * The name of an update.
 *
 * @param {Variant} variant
 */
export function variantLabel(variant) {
  const kept = keptOf(variant);
  if (kept !== null) return `truncated to ${kept} % of the math change's energy`;
  return VARIANT_LABELS[variant] ?? `off ${shareOf(variant)} % of the MLLM's energy`;
}

/**
 * A short description of a plan; in full, it names every choice.
 *
 * @param {Plan} plan
 * @param {boolean} [full]
 */
export function planWords({ s, lambda, variant, similarity, overrides, budget }, full = false) {
  const byHand = Object.keys(overrides).length;
  const parts = [`Sα ${thresholdText(s)}${full ? ` on ${MEASURE_LABELS[similarity]}` : ""}`, `λ ${lambdaText(lambda)}`];
  if (!full && similarity !== DEFAULT_PLAN.similarity) parts.push(MEASURE_LABELS[similarity]);
  if (full || variant !== DEFAULT_PLAN.variant) parts.push(variantLabel(variant));
  if (budget) parts.push(`budget ${budgetText(budget)} %`);
  if (byHand) parts.push(`${byHand} set by hand`);
  return parts.join(", ");
}

/** @param {{ layer: number, module: string }} cell */
export function title(cell) {
  return `Layer ${cell.layer}, ${cell.module}`;
}

/**
 * A module in few letters: its path without the block that all layers have.
 *
 * @param {string} module
 */
export function shortModule(module) {
  return module.replace(/^(?:mlp|self_attn)\./, "").replace(/\b([qkvo]|gate|up|down)_proj$/, "$1");
}

/**
 * The last part of a path or a hub id.
 *
 * @param {string | undefined} id
 * @param {number} [k] Which expert it is, for one without a name.
 */
export function shortId(id, k = 0) {
  return (id && String(id).split("/").filter(Boolean).pop()) || `expert ${k + 1}`;
}

/**
 * @param {Pack} pack
 * @param {number} k
 */
export function expertName(pack, k) {
  return shortId((pack.sources?.math || [])[k]?.id, k);
}
