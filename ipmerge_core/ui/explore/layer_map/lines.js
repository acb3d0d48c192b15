// @ts-check
// A small line chart over ranks on a logarithmic axis; values on a linear or a log one.

import { shape } from "../../web/dom.js";
import { niceTop } from "../../web/scales.js";

/** @import { ChartDot, ChartMark, ChartSpec, Series } from "../../web/types.d.ts" */

const HEIGHT = 150, LEFT = 38, RIGHT = 6, TOP = 8, BOTTOM = 18;

/** @typedef {{ width: number, log: boolean, last: number, low: number, high: number }} Axes */

/**
 * @param {ChartSpec} spec
 * @returns {SVGSVGElement}
 */
export function lineChart({ width, series, log, top, marks = [], dots = [] }) {
  const axes = chartAxes(width, series, log, top);
  const levels = marks.filter(({ value }) => isDrawn(axes, value));
  return shape("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, class: "lm-chart" },
    ...valueTicks(axes), ...rankTicks(axes),
    ...levels.map(({ value }) => level(axes, Number(value), "lm-mark")),
    ...series.map((s) => shape("path", { class: s.style,
      d: polyline(s.index.map((rank) => xOf(axes, rank)), s.values.map((v) => yOf(axes, v))) })),
    ...dots.flatMap((dot) => diamond(axes, dot)),
    ...levelNames(axes, levels));
}

/**
 * @param {number} width
 * @param {Series[]} series
 * @param {boolean} log
 * @param {number | undefined} top
 * @returns {Axes}
 */
function chartAxes(width, series, log, top) {
  const last = Math.log(Math.max(...series.flatMap((s) => s.index), 2));
  const values = series.flatMap((s) => s.values).filter((v) => !log || v > 0);
  const highest = Math.max(...values);
  if (!log) return { width, log, last, low: 0, high: top || niceTop(highest) };
  const low = Math.floor(Math.log10(Math.max(Math.min(...values), highest * 1e-5)));
  return { width, log, last, low, high: Math.log10(highest) };
}

/**
 * @param {Axes} axes
 * @param {number} rank
 */
function xOf({ width, last }, rank) {
  return LEFT + (Math.log(rank) / last) * (width - LEFT - RIGHT);
}

/**
 * @param {Axes} axes
 * @param {number} value
 */
function yOf({ log, low, high }, value) {
  const shown = log ? Math.log10(Math.max(value, 1e-300)) : value;
  return HEIGHT - BOTTOM - ((Math.max(shown, low) - low) / (high - low || 1)) * (HEIGHT - TOP - BOTTOM);
}

/**
 * @param {Axes} axes
 * @param {number | null | undefined} value
 */
function isDrawn(axes, value) {
  if (!value || !(value > 0) || (axes.log && Math.log10(value) < axes.low)) return false;
  return yOf(axes, value) >= TOP;
}

/**
 * @param {Axes} axes
 * @param {number} value
 * @param {string} style
 */
function level(axes, value, style) {
  const y = yOf(axes, value);
  return shape("line", { x1: LEFT, x2: axes.width - RIGHT, y1: y, y2: y, class: style });
}

/** @param {Axes} axes */
function valueTicks(axes) {
  const { log, low, high } = axes;
  const powers = log ? Array.from({ length: Math.floor(high) - low + 1 }, (_, i) => low + i) : [];
  const ticks = log
    ? powers.map((power) => ({ value: 10 ** power, text: `1e${power}` }))
    : [0, high / 2, high].map((value) => ({ value, text: String(Number(value.toPrecision(2))) }));
  return ticks.flatMap(({ value, text }) => [
    level(axes, value, "lm-rule"),
    shape("text", { x: LEFT - 5, y: yOf(axes, value) + 4, class: "lm-note", "text-anchor": "end" }, text)]);
}

/** @param {Axes} axes */
function rankTicks(axes) {
  const made = [];
  for (let rank = 1; Math.log(rank) <= axes.last; rank *= 10) {
    made.push(shape("text", { x: xOf(axes, rank), y: HEIGHT - 4, class: "lm-note", "text-anchor": rank === 1 ? "start" : "middle" },
      rank === 1 ? "rank 1" : String(rank)));
  }
  return made;
}

/**
 * @param {Axes} axes
 * @param {ChartDot} dot
 */
function diamond(axes, { at, value, style, text }) {
  if (at === null || !(at >= 1) || !Number.isFinite(value)) return [];
  return [shape("path", { class: style, d: "M0-4.5L4.5 0 0 4.5-4.5 0Z",
    transform: `translate(${xOf(axes, at).toFixed(1)} ${yOf(axes, value).toFixed(1)})` }, shape("title", {}, text))];
}

/**
 * Names of levels, where there is room for them.
 *
 * @param {Axes} axes
 * @param {ChartMark[]} levels
 */
function levelNames(axes, levels) {
  const heights = levels.map(({ value }) => yOf(axes, Number(value)));
  return levels.flatMap(({ text }, i) => (
    heights.slice(0, i).some((other) => Math.abs(other - heights[i]) < 13) ? []
      : [shape("text", { x: axes.width - RIGHT, y: heights[i] - 4, "text-anchor": "end", class: "lm-note" }, text)]));
}

/**
 * @param {number[]} xs
 * @param {number[]} ys
 */
export function polyline(xs, ys) {
  return xs.map((x, i) => `${i ? "L" : "M"}${x.toFixed(1)} ${ys[i].toFixed(1)}`).join("");
}
