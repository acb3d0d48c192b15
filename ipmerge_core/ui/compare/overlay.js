// @ts-check
// Both plans in one grid: which matrices merge in which, or by how much they differ.

import { part, setText } from "../web/dom.js";
import { percent, signed } from "../web/format.js";
import { title } from "../web/words.js";
import { layerPairs, STATE_WORDS } from "./pairs.js";

/** @import { Compare } from "./compare.js" */
/** @import { CellPair, Mode, Sides } from "./types.d.ts" */

const LOW = [90, 167, 214], HIGH = [240, 136, 62]; // colours of the two ends; no difference is white
const DATA_STATES = { both: "both", "only A": "a", "only B": "b", neither: "none" };

/**
 * @param {Compare} compare
 * @param {Sides} sides
 * @param {number} top The end of the bars' axis.
 */
export function paintPairs({ element, grid, state: { mode, pairs, target } }, sides, top) {
  const isMask = mode === "mask", end = Math.max(1e-9, ...pairs.map((pair) => Math.abs(difference(pair, mode))));
  part(element, ".cm-mask-key").hidden = !isMask;
  part(element, ".cm-value-key").hidden = isMask;
  setText(part(element, "[data-out=low]"), differenceWords(-end, mode));
  setText(part(element, "[data-out=high]"), differenceWords(end, mode));
  for (const { dataset } of grid.buttons) dataset.state = "none";
  for (const pair of pairs) {
    const button = grid.buttons[pair.cell.position], value = difference(pair, mode), words = differenceWords(value, mode);
    button.dataset.state = isMask ? DATA_STATES[pair["merges in"]] : "value";
    button.style.setProperty("--d", colourAt(value / end));
    button.setAttribute("aria-label", `${title(pair.cell)}, ${isMask ? STATE_WORDS[pair["merges in"]] : words}`);
    grid.print(pair.cell, isMask ? "" : words.replace(/^(.)0\./, "$1.").replace(" %", ""));
  }
  const changes = new Map(layerPairs(sides).map((pair) => [pair.layer, pair]));
  grid.nameBarsTop(percent(top));
  grid.paintPairs((layer) => {
    const pair = changes.get(layer);
    return pair ? [pair["change A"] / top, pair["change B"] / top] : [0, 0];
  });
  grid.mark(target);
}

/**
 * @param {CellPair} pair
 * @param {Mode} mode
 */
function difference(pair, mode) {
  return mode === "change" ? pair["change B"] - pair["change A"] : pair["B − A"];
}

/**
 * @param {number} value
 * @param {Mode} mode
 */
function differenceWords(value, mode) {
  return mode === "change" ? (value < 0 ? "−" : "+") + percent(Math.abs(value)) : signed(value, 2);
}

/** @param {number} t From -1 to 1. */
function colourAt(t) {
  return `rgb(${(t < 0 ? LOW : HIGH).map((c) => Math.round(255 + Math.abs(t) * (c - 255))).join(",")})`;
}
