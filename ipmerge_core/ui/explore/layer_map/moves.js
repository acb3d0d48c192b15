// @ts-check
// Moves between plans: the next flip; merging or keeping by hand; presets; keeping a plan for later.

import { setText } from "../../web/dom.js";
import { keepPlans, MOST_KEPT } from "../../web/memory.js";
import { cleanPlan, copyOf } from "../../web/plan.js";
import { shownSimilarity } from "../../web/preview.js";
import { above, atMost } from "../../web/thresholds.js";
import { expertName, title } from "../../web/words.js";
import { buildPresets, entriesOf, keptHere, paintPreset, planOf } from "./choices.js";
import { budgetFor } from "./sentence.js";
import { commit, setPlan, startDrag } from "./session.js";
import { announce } from "./status.js";

/** @import { Cell, Flip, Override, Plan, Preset, RawPlan } from "../../web/types.d.ts" */
/** @import { LayerMap } from "./map.js" */

const FLIP_MILLISECONDS = 2400;
const DIGITS = 4; // of a threshold that is set by a key

/**
 * Raise the threshold to where the next matrix leaves.
 *
 * @param {LayerMap} map
 */
export function flipOn(map) {
  const { flips, plan: { s } } = map.state;
  const ahead = flips.findLast(({ value }) => value >= s && value < 1);
  if (!ahead) setText(map.dom.status, "No matrix is removed at a higher threshold.");
  else flipTo(map, ahead, Math.min(1, above(ahead.value, DIGITS)), "leaves");
}

/**
 * Lower the threshold to where the next matrix joins.
 *
 * @param {LayerMap} map
 */
export function flipBack(map) {
  const { flips, plan: { s } } = map.state;
  const ahead = flips.find(({ value }) => value < s);
  if (!ahead) setText(map.dom.status, "No matrix is added at a lower threshold.");
  else flipTo(map, ahead, atMost(ahead.value, DIGITS), "joins");
}

/**
 * @param {LayerMap} map
 * @param {Flip} ahead
 * @param {number} s
 * @param {string} what
 */
function flipTo(map, { cell, expert }, s, what) {
  const { index, pack } = map.state;
  setPlan(map, { s });
  commit(map, `${title(cell)}${index.nExperts > 1 ? ` of ${expertName(pack, expert)}` : ""} ${what}.`);
}

/**
 * Move the threshold to where this matrix flips and back, so that the eye can follow.
 *
 * @param {LayerMap} map
 * @param {Cell} cell
 */
export function showFlip(map, cell) {
  const home = map.state.plan.s, value = shownSimilarity(map.state, cell);
  const away = Math.min(1, value + (value >= home ? 0.001 : 0));
  const still = window.matchMedia("(prefers-reduced-motion: reduce)").matches, start = performance.now();
  startDrag(map);
  /** @param {number} now */
  const step = (now) => {
    if (!map.state.dragging) return;
    const t = Math.min(1, (now - start) / FLIP_MILLISECONDS);
    if (t >= 1) {
      setPlan(map, { s: home });
      commit(map);
      return;
    }
    setPlan(map, { s: home + (away - home) * (still ? 1 : Math.sin(Math.PI * t) ** 0.5) });
    requestAnimationFrame(step);
  };
  requestAnimationFrame(step);
}

/**
 * Override the threshold for some matrices, or remove their overrides.
 *
 * @param {LayerMap} map
 * @param {Cell[]} cells
 * @param {Override | null} value
 */
export function setOverride(map, cells, value) {
  /** @type {Record<string, Override>} */
  const overrides = { ...map.state.plan.overrides };
  for (const cell of cells) {
    if (value) overrides[cell.name] = value;
    else delete overrides[cell.name];
  }
  setPlan(map, { overrides });
  commit(map);
}

/**
 * Give every matrix the relative change that the advice names, at lambda 1.
 *
 * @param {LayerMap} map
 */
export function takeBudget(map) {
  setPlan(map, { budget: budgetFor(map.state.result), lambda: 1 });
  commit(map);
}

// --- presets and kept plans ---

/**
 * @param {LayerMap} map
 * @param {Preset | undefined} preset
 */
export function takePreset(map, preset) {
  if (!preset) return;
  map.set({ plan: planOf(map.state, preset) });
  commit(map, `${preset.label}.`);
}

/**
 * Take a plan that another tab offers.
 *
 * @param {LayerMap} map
 * @param {RawPlan} plan
 * @param {string} words
 */
export function takePlan(map, plan, words) {
  map.set({ plan: cleanPlan(plan, map.state.index) });
  commit(map, words);
}

/** @param {LayerMap} map */
export function reset(map) {
  takePreset(map, map.state.presets[0] || { label: "Reset", source: "", plan: {} });
}

/**
 * Take one number from the preset that the plan started from.
 *
 * @param {LayerMap} map
 * @param {"s" | "lambda"} name
 */
export function resetNumber(map, name) {
  const preset = entriesOf(map.state)[map.state.preset || 0] || { plan: {} };
  setPlan(map, { [name]: planOf(map.state, preset)[name] });
  commit(map);
}

/**
 * Keep the plan on show, or forget it where it is kept already.
 *
 * @param {LayerMap} map
 */
export function keepPlan(map) {
  const at = keptHere(map.state);
  /** @type {Plan[]} */
  const plans = map.state.kept.map(({ plan }) => plan);
  if (at >= 0) plans.splice(at, 1);
  else plans.push(copyOf(map.state.plan));
  keepPlans(map.state.packId, plans.slice(-MOST_KEPT));
  buildPresets(map);
  paintPreset(map);
  const number = map.state.kept.length;
  announce(map, at >= 0 ? "Plan removed." : `Kept as plan ${number}: select it under Preset, with the key ${number}, or in Compare.`);
}

/**
 * The number keys: kept plans; on a stage the presets, where none is kept.
 *
 * @param {LayerMap} map
 * @param {number} digit
 */
export function numberKey(map, digit) {
  const { kept, onStage, presets } = map.state;
  const found = (kept.length || !onStage ? kept : presets)[digit - 1];
  takePreset(map, found);
  return Boolean(found);
}
