// @ts-check
// A plan: its defaults, its limits, and what is believed of one that comes from elsewhere.

/** @import { Index, Measure, Override, Plan, RawPlan, Variant } from "./types.d.ts" */

/** @type {readonly Measure[]} */
export const MEASURES = ["first", "max", "weighted"];
/** @type {readonly Variant[]} */
export const VARIANTS = ["sum", "max", "rescale_only", "select_only"];
export const LAMBDA_MAX = 32;
/** @type {Plan} */
export const DEFAULT_PLAN = Object.freeze({
  s: 0.4, lambda: 1, similarity: "first", variant: "sum", overrides: Object.freeze({}),
});

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
    variant: choiceOr(raw, "variant", VARIANTS, problems),
    overrides: cleanOverrides(raw.overrides, index, problems),
  };
}

/**
 * @param {RawPlan} raw
 * @param {"s" | "lambda"} key
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
 * @template {"similarity" | "variant"} Key
 * @param {RawPlan} raw
 * @param {Key} key
 * @param {readonly Plan[Key][]} options
 * @param {string[]} problems
 * @returns {Plan[Key]}
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
function inOrder({ s, lambda, similarity, variant, overrides }) {
  return JSON.stringify([s, lambda, similarity, variant, Object.entries(overrides).sort()]);
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
export function planArguments({ s, lambda, similarity, variant, overrides }) {
  const update = {
    sum: {},
    max: { gamma_norm: "max" },
    rescale_only: { ablation: "rescale_only" },
    select_only: { ablation: "select_only" },
  };
  return { similarity_threshold: s, lambda_: lambda, similarity, overrides, ...update[variant] };
}
