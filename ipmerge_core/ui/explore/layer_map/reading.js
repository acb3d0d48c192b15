// @ts-check
// The line under the map: what the pointer or the focus is on, always of the plan on show.

import { setText } from "../../web/dom.js";
import { fixed, percent } from "../../web/format.js";
import { cellChange, countMerging, expertInView, merges, shownSimilarity } from "../../web/preview.js";
import { similarityWords } from "../../web/quantities.js";
import { cellsOf } from "../../web/targets.js";
import { title } from "../../web/words.js";

/** @import { Target } from "../../web/types.d.ts" */
/** @import { LayerMap } from "./map.js" */
/** @import { State } from "./types.d.ts" */

/**
 * Read out what the pointer or the focus is on.
 *
 * @param {LayerMap} map
 * @param {Target} target
 */
export function readOut(map, target) {
  if (target.kind === "cell") map.tour.tick("read", target.cell);
  map.set({ reading: target });
  paintReading(map);
}

/** @param {LayerMap} map */
export function paintReading({ dom, state }) {
  setText(dom.read, (state.reading && targetWords(state, state.reading)) || "\u00a0");
}

/**
 * @param {State} state
 * @param {Target} target
 */
function targetWords(state, target) {
  const { index, result, plan } = state;
  if (target.kind === "cell") {
    const { cell } = target;
    if (cell.members.length > 1) {
      const { merging, total } = countMerging(state, result, cell);
      return `${title(cell)}: ${total} experts, ${similarityWords(state, cell)}, ${merging} merge`;
    }
    const change = cellChange(cell, [expertInView(state, cell)], plan);
    return `${title(cell)}: similarity ${fixed(shownSimilarity(state, cell))}, ${merges(state, result, cell) ? "merges" : "kept"}, ` +
      `change if merged ${percent(change)}`;
  }
  if (!cellsOf(index, target).length) return "Not analysed yet";
  if (target.kind === "layer") return `Layer ${target.layer}: predicted change ${percent(result.layer_change[target.layer])}`;
  return target.kind === "module" ? `All ${target.module} matrices` : "";
}
