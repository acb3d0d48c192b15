// @ts-check
// A plan: its defaults, its limits, and what is believed of one that comes from elsewhere.

/** @import { Complement, Index, Measure, Override, Plan, RawPlan, Truncation, Variant } from "./types.d.ts" */

/** @type {readonly Measure[]} */
export const MEASURES = ["first", "max", "weighted"];
/** @type {readonly Variant[]} */
const PLAIN = ["sum", "max", "rescale_only", "select_only", "protect"];
/** @type {readonly Variant[]} */
export const VARIANTS = [...PLAIN, ...complements(), ...complements().slice(0, -1).map((_, i) => truncationAt(5 * (i + 1)))];
export const SHARE_STEP = 5; // percent of the energy, between which a complement snaps
export const USUAL_SHARE = 80;
export const USUAL_KEPT = 90;
export const LAMBDA_MAX = 32;
/** @type {Plan} */
export const DEFAULT_PLAN = Object.freeze({
  s: 0.4, lambda: 1, similarity: "first", variant: "sum", overrides: Object.freeze({}), budget: 0,
});

/** @returns {Complement[]} */
function complements() {
  return Array.from({ length: 20 }, (_, i) => complementAt(5 * (i + 1)));
}

/**
 * The update without the MLLM's leading directions, by the share of the energy that they hold.
 *
 * @param {number} share In percent, a multiple of 5.
 * @returns {Complement}
 */
export function complementAt(share) {
  return `complement_${share}`;
}

/**
 * The share of the energy that a complement leaves out, in percent; null for other updates.
 *
 * @param {Variant} variant
 */
export function shareOf(variant) {
  return variant.startsWith("complement_") ? Number(variant.slice("complement_".length)) : null;
}

/**
 * The math change truncated to its own leading directions, by the share of the energy that they hold.
 *
 * @param {number} share In percent, a multiple of 5 below 100.
 * @returns {Truncation}
 */
export function truncationAt(share) {
  return `truncated_${share}`;
}

/**
 * The share of the energy that a truncation keeps, in percent; null for other updates.
 *
 * @param {Variant} variant
 */
export function keptOf(variant) {
  return variant.startsWith("truncated_") ? Number(variant.slice("truncated_".length)) : null;
}

/**
 * Whether every record of a pair has an update: older packs lack those off the MLLM's directions.
 *
 * @param {Index} index
 * @param {Variant} variant
 */
export function hasUpdate(index, variant) {
  return index.cells.every((cell) => cell.experts.every((record) => record.updates[variant]));
}

/**
 * Whatever a URL, a file or a button holds, as a plan that is safe to draw.
 *
 * @param {RawPlan} raw
 * @param {Index} index Of the pair; overrides name its matrices.
 * @param {string[]} [problems] Gets a sentence for every value that took its default.
 * @returns {Plan}
 */
export function cleanPlan(raw, index, problems = []) {
  return {
    s: numberOr(raw, "s", 1, problems),
    lambda: numberOr(raw, "lambda", LAMBDA_MAX, problems),
    similarity: choiceOr(raw, "similarity", MEASURES, problems),
    variant: variantOr(raw, index, problems),
    overrides: cleanOverrides(raw.overrides, index, problems),
    budget: numberOr(raw, "budget", 1, problems),
  };
}

/**
 * @param {RawPlan} raw
 * @param {Index} index
 * @param {string[]} problems
 */
function variantOr(raw, index, problems) {
  if (raw.variant === undefined) return DEFAULT_PLAN.variant;
  const variant = VARIANTS.find((known) => known === raw.variant);
  if (variant && hasUpdate(index, variant)) return variant;
  problems.push(!variant ? `variant must be one of ${PLAIN.join(", ")}, complement_5 to complement_100, truncated_5 to truncated_95` : `the analysis does not contain the update ${variant}; analyse the pair again for it`);
  return DEFAULT_PLAN.variant;
}

/**
 * @param {RawPlan} raw
 * @param {"s" | "lambda" | "budget"} key
 * @param {number} high
 * @param {string[]} problems
 */
function numberOr(raw, key, high, problems) {
  const given = raw[key];
  if (given === undefined || given === null || given === "") return DEFAULT_PLAN[key];
  const value = Number(given);
  if (Number.isFinite(value) && value >= 0 && value <= high) return value;
  problems.push(`${key} must be a number from 0 to ${high}`);
  return DEFAULT_PLAN[key];
}

/**
 * @param {RawPlan} raw
 * @param {"similarity"} key
 * @param {readonly Measure[]} options
 * @param {string[]} problems
 */
function choiceOr(raw, key, options, problems) {
  if (raw[key] === undefined) return DEFAULT_PLAN[key];
  const found = options.find((option) => option === raw[key]);
  if (found === undefined) problems.push(`${key} must be one of ${options.join(", ")}`);
  return found ?? DEFAULT_PLAN[key];
}

/**
 * @param {unknown} raw
 * @param {Index} index
 * @param {string[]} problems
 */
function cleanOverrides(raw, index, problems) {
  /** @type {Record<string, Override>} */
  const overrides = {};
  for (const [name, value] of Object.entries(raw || {})) {
    if (index.byName.has(name) && (value === "merge" || value === "keep")) overrides[name] = value;
    else problems.push("an override does not match a matrix of this pair");
  }
  return overrides;
}

/**
 * @param {Plan} a
 * @param {Plan} b
 */
export function samePlan(a, b) {
  return inOrder(a) === inOrder(b);
}

/** @param {Plan} plan */
function inOrder({ s, lambda, similarity, variant, overrides, budget }) {
  return JSON.stringify([s, lambda, similarity, variant, budget, Object.entries(overrides).sort()]);
}

/**
 * @param {Plan} plan
 * @returns {Plan}
 */
export function copyOf(plan) {
  return { ...plan, overrides: { ...plan.overrides } };
}

/**
 * The keyword arguments of `ipmerge_core.make_plan` for a plan.
 *
 * @param {Plan} plan
 */
export function planArguments({ s, lambda, similarity, variant, overrides, budget }) {
  const share = shareOf(variant), kept = keptOf(variant);
  /** @type {Partial<Record<Variant, object>>} */
  const update = {
    sum: {},
    max: { gamma_norm: "max" },
    rescale_only: { ablation: "rescale_only" },
    select_only: { ablation: "select_only" },
    protect: { projector: "protect" },
  };
  const projector = kept !== null ? { ablation: "select_only", math_energy: kept / 100 }
    : share === null ? update[variant] : { projector: "complement", energy: share / 100 };
  return { similarity_threshold: s, lambda_: lambda, similarity, overrides, ...projector, ...(budget ? { budget } : {}) };
}
