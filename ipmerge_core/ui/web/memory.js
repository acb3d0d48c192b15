// @ts-check
// What the browser remembers from one visit to the next: the layout, which hints were seen, and the
// plans kept for each pair. Where storage is closed it lasts as long as the page, and what comes out
// of storage is believed no more than a link is.

import { cleanPlan } from "./plan.js";
import { planWords } from "./words.js";

/** @import { Index, KeptPlan, KnockoutMap, Measured, Plan } from "./types.d.ts" */

export const MEMORY = "ipmerge.map.v1";
export const MOST_KEPT = 9; // one a number key
export const KEPT_EVENT = "ipmerge-kept"; // notifies other components of the page
export const MEASURED_EVENT = "ipmerge-measured"; // as above
const MOST_MEASURED = 60; // points of a pair, the newest first
const MOST_CUTS = 2000;

/** @type {Record<string, unknown>} */
const remembered = {};

/**
 * @param {string} name
 * @param {unknown} otherwise
 */
export function recall(name, otherwise) {
  try {
    const stored = JSON.parse(window.localStorage.getItem(MEMORY) ?? "null");
    if (stored && typeof stored === "object") Object.assign(remembered, stored);
  } catch { /* closed or damaged: this page's own memory holds */ }
  return remembered[name] ?? otherwise;
}

/**
 * @param {string} name
 * @param {unknown} value
 */
export function remember(name, value) {
  recall(name, null);
  remembered[name] = value;
  try {
    window.localStorage.setItem(MEMORY, JSON.stringify(remembered));
  } catch { /* as above */ }
}

/**
 * The plans kept for a pair, as entries like the presets.
 *
 * @param {string} packId
 * @param {Index} index
 * @returns {KeptPlan[]}
 */
export function keptPlans(packId, index) {
  const kept = allKept()[packId];
  return (Array.isArray(kept) ? kept.slice(0, MOST_KEPT) : []).map((raw, i) => {
    const plan = cleanPlan(Object(raw), index);
    return { label: `${i + 1} · ${planWords(plan)}`, source: "Plan stored in this browser only.", plan, kept: true };
  });
}

/**
 * @param {string} packId
 * @param {Plan[]} plans
 */
export function keepPlans(packId, plans) {
  remember("kept", { ...allKept(), [packId]: plans });
  window.dispatchEvent(new Event(KEPT_EVENT));
}

/**
 * Keep the scores of evaluated plans, one per plan, and the changes of a knock-out.
 *
 * @param {string} packId
 * @param {Measured[]} points
 * @param {KnockoutMap | null} knockout
 */
export function keepMeasured(packId, points, knockout) {
  const known = new Set(points.map(({ hash }) => hash));
  const kept = measuredPoints(packId).filter(({ hash }) => !known.has(hash));
  const found = { points: [...points, ...kept].slice(0, MOST_MEASURED), knockout: knockout ?? measuredKnockout(packId) };
  remember("measured", { ...Object(recall("measured", {})), [packId]: found });
}

/**
 * The evaluated plans of a pair.
 *
 * @param {string} packId
 * @returns {Measured[]}
 */
export function measuredPoints(packId) {
  const { points } = Object(Object(recall("measured", {}))[packId]);
  return (Array.isArray(points) ? points.slice(0, MOST_MEASURED) : []).filter(isMeasured);
}

/** @param {unknown} point */
function isMeasured(point) {
  const { hash, scores, plan } = Object(point);
  return typeof hash === "string" && plan !== null && typeof plan === "object" && Array.isArray(scores) && scores.every((score) => (
    ["share", "low", "high", "n"].every((key) => Number.isFinite(Object(score)[key])) && typeof Object(score).label === "string"));
}

/**
 * The last knock-out of a pair; null if there is none.
 *
 * @param {string} packId
 * @returns {KnockoutMap | null}
 */
export function measuredKnockout(packId) {
  const { knockout } = Object(Object(recall("measured", {}))[packId]);
  if (knockout === null || typeof knockout !== "object") return null;
  const parts = Object.values(knockout).map((part) => Object.values(Object(part)));
  return parts.every((values) => values.length <= MOST_CUTS && values.every(Number.isFinite)) ? knockout : null;
}

/** @returns {Record<string, unknown>} */
function allKept() {
  return Object(recall("kept", {}));
}
