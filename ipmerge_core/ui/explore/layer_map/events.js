// @ts-check
// What a hand does. One listener of each kind sits on the element, so that a rebuilt part needs none
// of its own.

import { closest } from "../../web/dom.js";
import { targetOf } from "../../web/grid.js";
import { findQuantity, QUANTITIES } from "../../web/quantities.js";
import { tableAction } from "../../web/tables.js";
import { act } from "./actions.js";
import { entriesOf, variantOf } from "./choices.js";
import { choose, pin, stretch } from "./choosing.js";
import { numberDone, onInput, onRangeChange } from "./inputs.js";
import { onKey } from "./keys.js";
import { rememberLink } from "./link.js";
import { resetNumber, takePreset } from "./moves.js";
import { paintQuantity, rebuildColours, showChosen } from "./painting.js";
import { readOut } from "./reading.js";
import { commit, setPlan } from "./session.js";
import { cellOfPanel } from "./spectra.js";

/** @import { Measure, Target } from "../../web/types.d.ts" */
/** @import { LayerMap } from "./map.js" */

/** @param {LayerMap} map */
export function listen(map) {
  const { element } = map;
  element.addEventListener("input", ({ target }) => {
    if (target instanceof HTMLInputElement) onInput(map, target);
  });
  element.addEventListener("change", ({ target }) => {
    if (target instanceof HTMLSelectElement) onPick(map, target);
    else if (target instanceof HTMLInputElement && (target.dataset.range || target.dataset.energy !== undefined)) onRangeChange(map, target);
    else if (target instanceof HTMLInputElement && target.dataset.number) numberDone(map, target);
  });
  element.addEventListener("dblclick", (event) => {
    const dial = closest(event, ".lm-range, .lm-hist, .lm-curve")?.closest("[data-dial]");
    if (dial instanceof HTMLElement) resetNumber(map, dial.dataset.dial === "s" ? "s" : "lambda");
  });
  element.addEventListener("click", (event) => onClick(map, event));
  element.addEventListener("pointerover", (event) => {
    const target = targetOf(closest(event, "button"));
    if (target) readOut(map, target);
  });
  element.addEventListener("focusin", (event) => {
    const target = targetOf(event.target);
    if (target) readOut(map, target);
  });
  element.addEventListener("keydown", (event) => {
    if (!map.state.isOpen || !onKey(map, event)) return;
    event.preventDefault();
    event.stopPropagation();
  });
}

/**
 * @param {LayerMap} map
 * @param {MouseEvent} event
 */
function onClick(map, event) {
  const cell = cellOfPanel(closest(event, ".lm-panel"));
  if (cell) {
    choose(map, { kind: "cell", cell });
    return;
  }
  const button = closest(event, "button");
  if (!button || !map.element.contains(button) || tableAction(button) || act(map, button)) return;
  const target = targetOf(button);
  if (!target) return;
  map.grid.moveToButton(button);
  if (!event.shiftKey || !extend(map, target)) choose(map, target);
}

/**
 * What Shift and a click do: stretch a range of layers, or pin a second matrix.
 *
 * @param {LayerMap} map
 * @param {Target} target
 */
function extend(map, target) {
  const { target: chosen } = map.state;
  if (target.kind === "layer") return stretch(map, target.layer);
  if (target.kind !== "cell" || chosen?.kind !== "cell" || chosen.cell === target.cell) return false;
  pin(map, target.cell);
  return true;
}

/**
 * @param {LayerMap} map
 * @param {HTMLSelectElement} select
 */
function onPick(map, { dataset: { pick }, value }) {
  if (pick === "expert") {
    map.set({ expert: Number(value) });
    rebuildColours(map);
    showChosen(map);
    map.grid.paintGhost(map.state, map.state.ghost);
    rememberLink(map.state);
  } else if (pick === "quantity") {
    map.set({ quantity: findQuantity(value) ?? QUANTITIES[0] });
    paintQuantity(map);
    map.painter.now();
    rememberLink(map.state);
  } else if (pick === "preset") takePreset(map, entriesOf(map.state)[Number(value)]);
  else if (pick) {
    setPlan(map, pick === "variant" ? { variant: variantOf(value) } : { similarity: /** @type {Measure} */ (value) });
    commit(map);
    showChosen(map);
  }
}
