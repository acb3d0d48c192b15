// @ts-check
// What the list of runs says in short: on its button, and to a screen reader when a state changes.

/** @import { Run } from "./types.d.ts" */

/**
 * The words on the button.
 *
 * @param {Run[]} runs
 */
export function summaryOf(runs) {
  const running = runs.filter((run) => run.running);
  if (!running.length) return runs.length ? `Runs (${runs.length})` : "Runs";
  const noun = running.length === 1 ? "run" : "runs";
  return `${running.length} ${noun}: ${Math.floor(100 * shareOf(running))} %`;
}

/**
 * How much of the runs in progress is done, from 0 to 1.
 *
 * @param {Run[]} runs
 */
export function shareOf(runs) {
  const running = runs.filter((run) => run.running);
  return running.reduce((sum, run) => sum + run.share, 0) / Math.max(running.length, 1);
}

/**
 * What has happened between two answers: only new states, never progress. A run that was not known
 * before is mentioned while it is in progress.
 *
 * @param {Run[]} before
 * @param {Run[]} after
 * @returns {string[]}
 */
export function changesBetween(before, after) {
  const states = new Map(before.map((run) => [run.id, run.state]));
  const isNews = (/** @type {Run} */ run) => (states.has(run.id) ? states.get(run.id) !== run.state : run.running);
  return after.filter(isNews).map((run) => `${run.kind} ${run.name}: ${run.label}.`);
}
