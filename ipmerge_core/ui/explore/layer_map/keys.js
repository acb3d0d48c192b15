// @ts-check
// The keyboard.

import { targetOf } from "../../web/grid.js";
import { cellsOf, coversLayer } from "../../web/targets.js";
import { choose, stretch } from "./choosing.js";
import { numberDone } from "./inputs.js";
import { flipBack, flipOn, numberKey, setOverride } from "./moves.js";
import { commit, redo, setPlan, undo } from "./session.js";

/** @import { Override, Target } from "../../web/types.d.ts" */
/** @import { LayerMap } from "./map.js" */

/** @type {Record<string, Override | null>} */
const OVERRIDE_KEYS = { f: "merge", k: "keep", a: null };
const COARSE = 0.01; // of the threshold, by Shift and an arrow

/**
 * Returns true when the key was used.
 *
 * @param {LayerMap} map
 * @param {KeyboardEvent} event
 */
export function onKey(map, event) {
  const { key, target } = event;
  if (!(target instanceof HTMLElement)) return false;
  const isTyping = target.matches("input[type=number], select, textarea"), own = targetOf(target);
  if (event.ctrlKey || event.metaKey) return isTyping ? false : commandKey(map, event, own);
  if (key === "Escape" && (map.state.target || map.state.pinned)) {
    map.set({ pinned: null });
    choose(map, null);
    return true;
  }
  if (isTyping) return typingKey(map, key, target);
  return mapKey(map, key) || sliderKey(map, event, target) || (own !== null && gridKey(map, event, own));
}

/**
 * @param {LayerMap} map
 * @param {KeyboardEvent} event
 * @param {Target | null} own
 */
function commandKey(map, event, own) {
  const letter = event.key.toLowerCase();
  if (letter === "y" || (letter === "z" && event.shiftKey)) redo(map);
  else if (letter === "z") undo(map);
  else return own !== null && (event.key === "Home" || event.key === "End") && map.grid.key(event);
  return true;
}

/**
 * Enter ends typing; no change event comes where the field held this value before.
 *
 * @param {LayerMap} map
 * @param {string} key
 * @param {HTMLElement} target
 */
function typingKey(map, key, target) {
  if (key === "Enter" && target instanceof HTMLInputElement && target.dataset.number) numberDone(map, target);
  return false;
}

/**
 * Keys that mean the same everywhere in the map.
 *
 * @param {LayerMap} map
 * @param {string} key
 */
function mapKey(map, key) {
  if (/^[1-9]$/.test(key)) return numberKey(map, Number(key));
  if (key === "[") flipBack(map);
  else if (key === "]") flipOn(map);
  else return false;
  return true;
}

/**
 * @param {LayerMap} map
 * @param {KeyboardEvent} event
 * @param {HTMLElement} target
 */
function sliderKey(map, { key, shiftKey }, target) {
  if (target.dataset.range !== "s" || !shiftKey || !key.startsWith("Arrow")) return false;
  const isUp = key === "ArrowRight" || key === "ArrowUp";
  setPlan(map, { s: Number((map.state.plan.s + (isUp ? COARSE : -COARSE)).toFixed(10)) }); // no rounding error
  commit(map);
  return true;
}

/**
 * @param {LayerMap} map
 * @param {KeyboardEvent} event
 * @param {Target} own The target of the focused button.
 */
function gridKey(map, event, own) {
  const override = OVERRIDE_KEYS[event.key.toLowerCase()];
  if (override !== undefined) {
    setOverride(map, cellsOf(map.state.index, inBrush(map.state.target, own)), override);
    return true;
  }
  const isMoved = map.grid.key(event);
  if (event.shiftKey && own.kind === "layer") stretchTo(map, own, targetOf(document.activeElement));
  return isMoved;
}

/**
 * A header inside the brushed range represents the range.
 *
 * @param {Target | null} chosen
 * @param {Target} own
 */
function inBrush(chosen, own) {
  return own.kind === "layer" && chosen?.kind === "range" && coversLayer(chosen, own.layer) ? chosen : own;
}

/**
 * Stretch what is chosen, or start a range here, to the layer that the focus has reached.
 *
 * @param {LayerMap} map
 * @param {Target} own
 * @param {Target | null} reached
 */
function stretchTo(map, own, reached) {
  if (reached?.kind !== "layer") return;
  const { target } = map.state;
  if (target?.kind !== "layer" && target?.kind !== "range") map.set({ target: own });
  stretch(map, reached.layer);
}
