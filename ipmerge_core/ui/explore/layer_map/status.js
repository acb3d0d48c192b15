// @ts-check
// The two lines that say what has happened: one that is seen and one that is heard.

import { setText } from "../../web/dom.js";

/** @import { LayerMap } from "./map.js" */

/**
 * Say something in both.
 *
 * @param {LayerMap} map
 * @param {string} words
 */
export function announce({ dom }, words) {
  setText(dom.note, words);
  setText(dom.status, words);
}
