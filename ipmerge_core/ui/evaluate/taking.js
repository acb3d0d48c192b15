// @ts-check
// Take a plan in Explore: the layer map of the same page applies it as a step that can be undone.

/** @import { RawPlan } from "../web/types.d.ts" */

/** @typedef {{ packId: string, take(plan: RawPlan, words: string): void, undo(): void }} MapHandle */

/**
 * The layer map of this page, if it shows the pair.
 *
 * @param {string} pack
 * @returns {MapHandle | null}
 */
function mapOf(pack) {
  const holder = document.querySelector("#layer-map .lm")?.parentNode;
  const handle = holder && "ipmerge" in holder ? /** @type {MapHandle} */ (holder.ipmerge) : null;
  return handle && handle.packId === pack ? handle : null;
}

/**
 * Apply a plan on the map. False where the map shows another pair, or there is none.
 *
 * @param {string} pack
 * @param {RawPlan} plan
 * @param {string} words What is announced.
 */
export function takeOnMap(pack, plan, words) {
  const map = mapOf(pack);
  map?.take(plan, words);
  return map !== null;
}

/** @param {string} pack */
export function undoOnMap(pack) {
  const map = mapOf(pack);
  map?.undo();
  return map !== null;
}
