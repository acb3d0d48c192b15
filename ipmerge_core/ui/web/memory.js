// @ts-check
// What the browser remembers from one visit to the next: the layout, which hints were seen, and the
// plans kept for each pair. Where storage is closed it lasts as long as the page, and what comes out
// of storage is believed no more than a link is.

import { cleanPlan } from "./plan.js";
import { planWords } from "./words.js";

/** @import { Index, KeptPlan, Plan } from "./types.d.ts" */

export const MEMORY = "ipmerge.map.v1";
export const MOST_KEPT = 9; // one a number key
export const KEPT_EVENT = "ipmerge-kept"; // notifies other components of the page

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

/** @returns {Record<string, unknown>} */
function allKept() {
  return Object(recall("kept", {}));
}
