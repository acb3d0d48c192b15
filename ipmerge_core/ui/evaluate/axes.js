// @ts-check
// The axes of a sweep's plot. Pure, no DOM.

import { lambdaPosition, LAMBDA_STEPS } from "../web/scales.js";
import { isNumeric, valueWords } from "./scores.js";

/** @import { Axis, Scale } from "./types.d.ts" */

/**
 * Where the values of an axis are, from 0 to 1: lambda as on its slider, a share from 0 to 1 as it is,
 * other numbers between the lowest and the highest, and names at even distances.
 *
 * @param {Axis} axis
 * @returns {Scale}
 */
export function scaleOf(axis) {
  const at = places(axis), low = Math.min(...at), high = Math.max(...at), span = high - low;
  const spread = at.map((value) => (span > 0 ? (value - low) / span : 0.5));
  return { at: spread, ticks: spread.map((place, i) => ({ at: place, text: valueWords(axis.values[i]) })) };
}

/** @param {Axis} axis */
function places(axis) {
  if (!isNumeric(axis)) return axis.values.map((_, i) => i);
  const values = axis.values.map(Number);
  return axis.parameter === "lambda_" ? values.map((value) => lambdaPosition(value) / LAMBDA_STEPS) : values;
}

/**
 * The ticks that fit next to each other: the ends, and others where there is room.
 *
 * @param {Scale} scale
 * @param {number} width Of the plot, in pixels.
 */
export function shownTicks({ ticks }, width) {
  const order = [...ticks.keys()].sort((i, j) => ticks[i].at - ticks[j].at);
  /** @type {typeof ticks} */
  const kept = [];
  for (const i of order) {
    const tick = ticks[i], last = kept.at(-1);
    const room = last ? (tick.at - last.at) * width - 3.6 * (tick.text.length + last.text.length) : Infinity;
    if (room > 4) kept.push(tick);
  }
  return kept;
}
