// @ts-check
// What the two dials share: a plot aligned with a slider, and the ticks under it.

import { node, shape } from "../../web/dom.js";

/** @import { LayerMap } from "./map.js" */

export const INSET = 10; // half a slider thumb, so that a line is aligned with the thumb

/**
 * @param {LayerMap} map
 * @param {SVGSVGElement} svg
 */
export function plotWidth(map, svg) {
  return Math.max(160, svg.clientWidth || map.dom.root.clientWidth || 320) - 2 * INSET;
}

/**
 * The line over a slider's thumb, with its arrow.
 *
 * @param {number} height
 */
export function thumbLine(height) {
  return shape("g", { class: "lm-line" },
    shape("line", { x1: 0, x2: 0, y1: 4, y2: height }), shape("path", { d: "M-5 0H5L0 7Z" }));
}

/**
 * Tick labels under a slider, at the same inset as its thumb.
 *
 * @param {HTMLElement} holder
 * @param {{ at: number, text: string, strong?: boolean }[]} ticks At a share of the slider.
 */
export function buildTicks(holder, ticks) {
  holder.replaceChildren(...ticks.map(({ at, text, strong }) => {
    const tick = node("span", { class: strong ? "lm-tick strong" : "lm-tick" }, text);
    tick.style.left = `calc(${INSET}px + (100% - ${2 * INSET}px) * ${at})`;
    return tick;
  }));
}
