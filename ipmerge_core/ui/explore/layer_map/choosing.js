// @ts-check
// Choosing: a matrix, a layer, a module or a range; a second matrix to compare with; the layout.

import { setText } from "../../web/dom.js";
import { remember } from "../../web/memory.js";
import { expertInView } from "../../web/preview.js";
import { rangeTo } from "../../web/targets.js";
import { rememberLink } from "./link.js";
import { layOut, showChosen } from "./painting.js";
import { buildSpectra } from "./spectra.js";

/** @import { Cell, Target } from "../../web/types.d.ts" */
/** @import { LayerMap } from "./map.js" */
/** @import { State } from "./types.d.ts" */

/**
 * @param {LayerMap} map
 * @param {Target | null} target
 */
export function choose(map, target) {
  const ranged = map.state.target?.kind === "range" || target?.kind === "range";
  map.set({ target });
  if (ranged) map.histogram.build();
  showChosen(map);
  rememberLink(map.state);
  drawLarge(map);
  if (target?.kind === "cell") map.tour.tick("choose");
}

/**
 * Stretch the layer or range that is chosen to another layer. False where neither is.
 *
 * @param {LayerMap} map
 * @param {number} layer
 */
export function stretch(map, layer) {
  const { target } = map.state;
  if (target?.kind === "layer") choose(map, rangeTo(layer, target.layer));
  else if (target?.kind === "range") choose(map, rangeTo(layer, target.anchor ?? target.from));
  else return false;
  return true;
}

/**
 * @param {LayerMap} map
 * @param {Cell | null} cell
 */
export function pin(map, cell) {
  map.set({ pinned: map.state.pinned === cell ? null : cell });
  showChosen(map);
  rememberLink(map.state);
  drawLarge(map);
}

/**
 * The chosen matrix and, where there is one, the pinned one.
 *
 * @param {State} state
 * @returns {Cell[]}
 */
export function chosenCells({ target, pinned }) {
  const cells = [target?.kind === "cell" && target.cell.members.length === 1 ? target.cell : null, pinned];
  return cells.flatMap((cell, i) => (cell && cells.indexOf(cell) === i ? [cell] : []));
}

/**
 * The large figure is drawn by the server, so only where it has been asked for.
 *
 * @param {LayerMap} map
 */
export function drawLarge(map) {
  const { state } = map, isShown = state.large && state.target?.kind === "cell" && state.layout === "full";
  map.dom.root.dataset.large = String(isShown);
  map.find(".lm-large-line").hidden = !isShown;
  if (!isShown) return;
  const cells = chosenCells(state);
  setText(map.find("[data-out=large]"), `Large figure of ${cells.map((one) => `layer ${one.layer} · ${one.module}`).join(" and ")}`);
  const [chosen, pinned] = cells.map((one) => ({ name: one.name, expert: expertInView(state, one) }));
  map.outbox.post("cellselect", { ...chosen, pinned: pinned ?? null,
    dark: document.body.classList.contains("dark"), narrow: state.narrow });
}

/**
 * @param {LayerMap} map
 * @param {string | undefined} layout
 */
export function setLayout(map, layout) {
  const chosen = layout === "simple" ? "simple" : "full";
  map.set({ layout: chosen });
  remember("layout", chosen);
  layOut(map);
  drawLarge(map);
}

/**
 * @param {LayerMap} map
 * @param {string | undefined} scale
 */
export function setSigmaScale(map, scale) {
  map.set({ sigmaScale: scale === "linear" ? "linear" : "log" });
  buildSpectra(map);
  map.find(`[data-scale=${map.state.sigmaScale}]`).focus();
}

/** @param {LayerMap} map */
export function toggleLarge(map) {
  map.set({ large: !map.state.large });
  drawLarge(map);
  buildSpectra(map);
  map.find(".lm-spectra [data-act=large]").focus();
}
