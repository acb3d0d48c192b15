// @ts-check
// The point in view: its scores, its tests and which matrices merge, as a small picture.

import { actionButton, node, shape } from "../web/dom.js";
import { percent } from "../web/format.js";
import { gainWords, orderedTasks, scoreWords, testWords } from "./scores.js";

/** @import { Content, Point, State } from "./types.d.ts" */

const SQUARE = 7;

/**
 * @param {Content} content
 * @param {State} state
 */
export function pointPanel(content, { point: i, taken, served }) {
  const point = content.points[i];
  if (!point) return [node("p", { class: "lm-source" }, "Select a point to show its numbers.")];
  const lines = orderedTasks(content.tasks).map(({ name, label }) => {
    const score = point.scores[name], gain = gainWords(score), test = testWords(score);
    return node("li", {}, node("b", {}, `${label}: `), scoreWords(score), ...(gain && point.plan ? [` · ${gain} points, ${test}`] : []));
  });
  return [
    thumbnail(content, point),
    node("div", { class: "ev-point-words" },
      node("h3", {}, point.label, ...(point.plan && !point.label.includes(point.plan) ? [node("code", {}, ` plan ${point.plan}`)] : [])),
      node("p", {}, planWords(content, point)), node("ul", {}, ...lines)),
    ...(served ? [node("span", { class: "ev-take" }, ...takeButtons(point, i === taken), ...itemsButton(i))] : []),
  ];
}

/**
 * The evaluation of a search whose plan was taken, with Undo; nothing before one is.
 *
 * @param {Content} content
 * @param {State} state
 */
export function takenPanel({ points }, { taken }) {
  const point = points[taken];
  if (!point) return [];
  return [
    node("div", { class: "ev-point-words" }, node("h3", {}, `Chosen: ${point.label}`, node("code", {}, ` plan ${point.plan}`))),
    node("span", { class: "ev-take" }, actionButton("edit", point.choice ? "Open in Explore" : "Open in Merge"), actionButton("untake", "Undo")),
  ];
}

/**
 * @param {Content} content
 * @param {Point} point
 */
function planWords({ layers, modules }, point) {
  if (!point.plan) return "The vision-language model without a merge.";
  const change = point.change === null ? "" : `; decoder weights change by ${percent(point.change)}`;
  return `${point.matrices} of ${layers.length * modules.length} matrices merge${change}.`;
}

/**
 * @param {Point} point
 * @param {boolean} isTaken
 */
function takeButtons(point, isTaken) {
  if (!point.takes) return [];
  const name = isTaken ? "Plan is chosen" : "Use this plan";
  return [actionButton("take", name, { "aria-pressed": String(isTaken) }), ...(isTaken ? [actionButton("untake", "Undo")] : [])];
}

/** @param {number} i The first point is the one that others are compared with. */
function itemsButton(i) {
  return i > 0 ? [actionButton("items", "List items that differ")] : [];
}

/**
 * The matrices as squares, a column for each layer.
 *
 * @param {Content} content
 * @param {Point} point
 */
function thumbnail({ layers, modules }, { mask, matrices }) {
  const width = layers.length * SQUARE, height = modules.length * SQUARE;
  return shape("svg", { class: "ev-mask", viewBox: `0 0 ${width} ${height}`, style: `width:${Math.min(width * 1.6, 320)}px`,
    role: "img", "aria-label": `${matrices} of ${layers.length * modules.length} matrices merge` },
  ...[...mask].map((mark, i) => shape("rect", {
    x: Math.floor(i / modules.length) * SQUARE + 0.5, y: (i % modules.length) * SQUARE + 0.5,
    width: SQUARE - 1, height: SQUARE - 1, class: mark === "1" ? "ev-on" : "ev-off" })));
}
