// @ts-check
// The two status lines: a visible one, and one for screen readers.

import { setText } from "../../web/dom.js";

/** @import { LayerMap } from "./map.js" */

/**
 * Show a message in both.
 *
 * @param {LayerMap} map
 * @param {string} words
 */
export function announce({ dom }, words) {
  setText(dom.note, words);
  setText(dom.status, words);
}
