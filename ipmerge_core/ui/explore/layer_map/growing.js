// @ts-check
// A pair that is still being analysed: asks now and then for the matrices that have come since, and
// puts them where they belong. Plan, choice and history stay; nothing moves while a hand drags; what
// has the focus keeps it.

import { addRecords, flipValues, previewOf } from "../../web/preview.js";
import { refreshTables } from "../../web/tables.js";
import { coversLayer } from "../../web/targets.js";
import { buildPicks } from "./choices.js";
import { describeDials, rebuildColours, rescale, showChosen } from "./painting.js";
import { announce } from "./status.js";

/** @import { Cell, Growing, News } from "../../web/types.d.ts" */
/** @import { LayerMap } from "./map.js" */

const ASK_AGAIN = 2000;

/** @type {WeakMap<LayerMap, number>} The timer of the next question. */
const timers = new WeakMap();

/** @param {LayerMap} map */
export function growLater(map) {
  const { pack } = map.state;
  clearTimeout(timers.get(map));
  if (!pack.growing) return;
  map.dom.root.dataset.growing = "true";
  if (map.host.server?.grown) timers.set(map, window.setTimeout(() => askForMore(map), ASK_AGAIN));
}

/** @param {LayerMap} map */
async function askForMore(map) {
  const { packId, index, dragging } = map.state;
  if (map.element.offsetParent && !document.hidden && !dragging) {
    try {
      const news = await map.host.server?.grown?.(packId, index.cells.length);
      if (news && map.state.index === index && !map.state.dragging) takeNews(map, news);
    } catch { /* no answer: the same question next time */ }
  }
  growLater(map);
}

/**
 * @param {LayerMap} map
 * @param {News} news
 */
function takeNews(map, news) {
  const { pack, packId, index } = map.state;
  if (news.again) {
    map.host.trigger("packselect", { pack: packId });
    return;
  }
  if (news.gone) {
    map.set({ pack: { ...pack, growing: null } });
    announce(map, news.gone);
    return;
  }
  const known = index.cells.length;
  const growing = news.growing ? /** @type {Growing} */ ({ ...pack.growing, ...news.growing }) : null;
  index.pack = { ...pack, ...news.pack, records: [...pack.records, ...news.records], growing };
  map.set({ pack: index.pack });
  const added = addRecords(index, news.records);
  if (added.length) takeCells(map, added, known);
  if (!growing) { // the sentence keeps the height that it had: nothing jumps at the end
    map.set({ presets: news.presets });
    buildPicks(map);
    announce(map, `The analysis is complete: all ${index.cells.length} matrices are there.`);
  }
  map.painter.now();
}

/**
 * @param {LayerMap} map
 * @param {Cell[]} added
 * @param {number} known How many cells there were before.
 */
function takeCells(map, added, known) {
  const { index, plan, ghost, target, pinned } = map.state, result = previewOf(index, plan);
  map.grid.fillHoles(added);
  // The plan before is known by its mask alone; a matrix that has just come has neither joined nor left.
  const masks = [...ghost.masks.slice(0, known), ...result.masks.slice(known)];
  map.set({ flips: flipValues(index, plan), result, before: result, ghost: { masks } });
  rebuildColours(map);
  rescale(map);
  map.grid.mark(target, pinned);
  if (concernsChoice(map, added)) showChosen(map);
  map.grid.paintGhost(map.state, map.state.ghost);
  describeDials(map);
  refreshTables(map.element);
}

/**
 * Whether what is chosen speaks of matrices that have just come, and nobody stands in its texts.
 *
 * @param {LayerMap} map
 * @param {Cell[]} added
 */
function concernsChoice({ dom, state: { target } }, added) {
  const isBusy = [dom.detail, dom.spectra].some((each) => each.contains(document.activeElement));
  if (!target || isBusy) return false;
  if (target.kind === "layer" || target.kind === "range") return added.some((cell) => coversLayer(target, cell.layer));
  const module = target.kind === "cell" ? target.cell.module : target.module;
  return added.some((cell) => cell.module === module);
}
