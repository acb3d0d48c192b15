// @ts-check
// What an evaluation has measured, for the map in Explore: points for its dials, and the changes of a
// knock-out. The browser keeps them by pair.

import { keepMeasured, MEASURED_EVENT } from "../web/memory.js";
import { dropOf, orderedTasks, share } from "./scores.js";

/** @import { Measured } from "../web/types.d.ts" */
/** @import { Content, Point } from "./types.d.ts" */

/**
 * Keep what a result has measured, and let the map draw it.
 *
 * @param {Content} content
 */
export function publish(content) {
  const points = content.points.flatMap((point) => measuredOf(content, point));
  const knockout = knockoutOf(content);
  if (!points.length && !knockout) return;
  keepMeasured(content.pack, points, knockout);
  window.dispatchEvent(new Event(MEASURED_EVENT));
}

/**
 * A point whose plan the map can draw; nothing for others.
 *
 * @param {Content} content
 * @param {Point} point
 * @returns {Measured[]}
 */
export function measuredOf({ tasks, created }, { choice, scores, plan }) {
  if (!choice || !plan) return [];
  const found = orderedTasks(tasks).flatMap(({ name, label, group }) => {
    const score = scores[name];
    return score?.n ? [{ label, group, share: share(score), low: score.low, high: score.high, n: score.n }] : [];
  });
  return found.length ? [{ plan: choice, hash: plan, created, scores: found }] : [];
}

/**
 * The change of the score without a module, by model and group, then by layer and module.
 *
 * @param {Content} content
 * @returns {Record<string, Record<string, number>> | null}
 */
export function knockoutOf({ cuts, tasks }) {
  if (!cuts.length) return null;
  /** @type {Record<string, Record<string, number>>} */
  const found = {};
  for (const cut of cuts) {
    for (const { name, group } of tasks) {
      const change = dropOf(cut, name);
      if (change !== null) (found[`${cut.model} ${group}`] ??= {})[`${cut.layer}.${cut.module}`] = change;
    }
  }
  return found;
}
