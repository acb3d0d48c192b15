// @ts-check
// The two sides: a plan with its pack and all that can be chosen for it. Pure but for what the browser
// has kept.

import { keptPlans } from "../web/memory.js";
import { cleanPlan, samePlan } from "../web/plan.js";
import { indexPack, previewOf } from "../web/preview.js";

/** @import { Content, Plan } from "../web/types.d.ts" */
/** @import { Compared, Side, Sides } from "./types.d.ts" */

/**
 * A is the chosen merge; B starts as the first preset that differs from A or, of another pair, with A's
 * values, and keeps what was chosen for it while the tab is away.
 *
 * @param {Compared} content
 * @param {Sides | null} before
 * @returns {Sides}
 */
export function makeSides({ a, b }, before) {
  const content = b || a, isSame = content.id === a.id;
  const name = a.label ?? "Plan in Explore";
  const sideA = newSide(a, name, a.plan);
  const sideB = isSame ? newSide(content, name, content.plan) : newSide(content, "Values of A", { ...a.plan, overrides: {} });
  const kept = before?.b.id === content.id ? before.b.plan : null;
  const start = isSame ? sideB.presets.find(({ plan }) => !samePlan(plan, sideA.plan)) : undefined;
  return { a: sideA, b: withPlan(sideB, kept ?? start?.plan ?? sideB.plan) };
}

/**
 * @param {Content} content
 * @param {string} label Of the first entry, which is the plan to start from.
 * @param {Plan} plan
 * @returns {Side}
 */
function newSide(content, label, plan) {
  const index = indexPack(content.pack);
  const given = [{ label, source: "", plan }, ...content.presets].map((entry) => ({ ...entry, plan: cleanPlan(entry.plan, index) }));
  const first = given[0].plan;
  return withKept({ id: content.id, index, given, presets: given, plan: first, result: previewOf(index, first) });
}

/**
 * With the plans that the visitor has kept for the pair.
 *
 * @param {Side} side
 * @returns {Side}
 */
export function withKept(side) {
  const kept = keptPlans(side.id, side.index).map((entry) => ({ ...entry, label: `Kept ${entry.label}` }));
  return { ...side, presets: [...side.given, ...kept] };
}

/**
 * @param {Side} side
 * @param {Plan} plan
 * @returns {Side}
 */
export function withPlan(side, plan) {
  return { ...side, plan, result: previewOf(side.index, plan) };
}
