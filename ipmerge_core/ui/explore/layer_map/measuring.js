// @ts-check
// A result has been opened in Evaluate: its points go to the dials, its knock-out to the colours.

import { measuredKnockout } from "../../web/memory.js";
import { indexPack } from "../../web/preview.js";
import { withKnockout } from "../../web/quantities.js";
import { buildPicks } from "./choices.js";
import { buildLanes } from "./measured_lanes.js";
import { layOut } from "./painting.js";

/** @import { LayerMap } from "./map.js" */

/**
 * Draw what has been measured of the pair on show.
 *
 * @param {LayerMap} map
 */
export function measureAgain(map) {
  const { isOpen, pack, packId, index } = map.state, knockout = measuredKnockout(packId);
  if (!isOpen) return;
  if (knockout && !pack.growing) {
    const next = { ...pack, records: withKnockout(pack.records, knockout) };
    const found = indexPack(next);
    for (const cell of found.cells) cell.position = index.byName.get(cell.name)?.position ?? cell.position;
    map.set({ pack: next, index: found, target: null, pinned: null });
    buildPicks(map);
    layOut(map);
  }
  buildLanes(map);
}
