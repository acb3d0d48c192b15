// @ts-check
// A sweep over one parameter: the scores with their intervals, and below them, on an axis of their own,
// how many matrices merge.

import { node, shape } from "../web/dom.js";
import { scaleOf, shownTicks } from "./axes.js";
import { orderedTasks, pointWords, share } from "./scores.js";

/** @import { Content, Point, Scale, State, TaskInfo } from "./types.d.ts" */

const LEFT = 40, RIGHT = 14, TOP = 10, HEIGHT = 230, STRIP = 54, FOOT = 40, GAP = 20;
const STYLES = { math: "ev-math", perception: "ev-perception", other: "ev-other" };

/**
 * @param {Content} content
 * @param {State} state
 */
export function sweepPlot(content, state) {
  const swept = sweptPoints(content), scale = scaleOf(content.axes[0]);
  const width = Math.max(280, state.width), inner = width - LEFT - RIGHT;
  /** @param {number} i */
  const x = (i) => LEFT + 8 + scale.at[i] * (inner - 16);
  const height = TOP + HEIGHT + GAP + STRIP + FOOT;
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, class: "ev-sweep", role: "group", "aria-label": plotWords(content) },
    ...shareAxis(width), ...paperMark(content, scale, inner),
    ...orderedTasks(content.tasks).flatMap((task) => taskLines(content, swept, task, x, width)),
    ...strip(content, swept, x, width),
    ...shownTicks(scale, inner - 16).map(({ at, text }) => label(LEFT + 8 + at * (inner - 16), height - FOOT + 16, text)),
    label(LEFT + inner / 2, height - 4, content.axes[0].label, "ev-axis"),
    ...swept.map((point, i) => column(content, point, { x: x(i), width: columnWidth(scale, i, inner), height })));
  return node("figure", { class: "lm-figure lm-figure-wide" }, legend(content), svg);
}

/**
 * The points with a value on every axis: all but the unmerged model.
 *
 * @param {Content} content
 */
export function sweptPoints({ points, axes }) {
  return points.filter(({ values }) => values.length === axes.length);
}

/**
 * @param {number} x
 * @param {number} y
 * @param {string} words
 * @param {string} [style]
 */
function label(x, y, words, style = "lm-note") {
  return shape("text", { x, y, class: style, "text-anchor": "middle" }, words);
}

/** @param {number} value A share. */
function heightOf(value) {
  return TOP + (1 - value) * HEIGHT;
}

/** @param {number} width */
function shareAxis(width) {
  return [0, 0.25, 0.5, 0.75, 1].flatMap((value) => [
    shape("line", { x1: LEFT, x2: width - RIGHT, y1: heightOf(value), y2: heightOf(value), class: "lm-rule" }),
    shape("text", { x: LEFT - 6, y: heightOf(value) + 4, class: "lm-note", "text-anchor": "end" }, `${100 * value} %`),
  ]);
}

/**
 * The value of the paper, or of its public code.
 *
 * @param {Content} content
 * @param {Scale} scale
 * @param {number} inner
 */
function paperMark({ axes: [axis] }, scale, inner) {
  const paper = { lambda_: 1, similarity_threshold: 0.4 }[axis.parameter];
  const i = axis.values.findIndex((value) => value === paper);
  if (i < 0) return [];
  const x = LEFT + 8 + scale.at[i] * (inner - 16);
  return [shape("line", { x1: x, x2: x, y1: TOP, y2: TOP + HEIGHT, class: "lm-paper" },
    shape("title", {}, axis.parameter === "lambda_" ? "λ = 1, the update as in the paper" : "0.4, the default of the public code"))];
}

/**
 * A task's band, line and dots, and its score without a merge as a dotted line.
 *
 * @param {Content} content
 * @param {Point[]} swept
 * @param {TaskInfo} task
 * @param {(i: number) => number} x
 * @param {number} width
 */
function taskLines(content, swept, task, x, width) {
  const order = [...swept.keys()].filter((i) => swept[i].scores[task.name]?.n).sort((i, j) => x(i) - x(j));
  const style = STYLES[task.group], scores = order.map((i) => swept[i].scores[task.name]);
  const before = content.points.find(({ plan }) => !plan)?.scores[task.name];
  const up = scores.map(({ high }, k) => `${x(order[k]).toFixed(1)} ${heightOf(high).toFixed(1)}`);
  const down = scores.map(({ low }, k) => `${x(order[k]).toFixed(1)} ${heightOf(low).toFixed(1)}`).reverse();
  const line = scores.map((score, k) => `${x(order[k]).toFixed(1)} ${heightOf(share(score)).toFixed(1)}`);
  if (!line.length) return [];
  return [
    shape("path", { d: `M${[...up, ...down].join("L")}Z`, class: `ev-band ${style}` }),
    ...(before?.n ? [shape("line", { x1: LEFT, x2: width - RIGHT, y1: heightOf(share(before)), y2: heightOf(share(before)), class: `ev-before ${style}` },
      shape("title", {}, `${task.label} without a merge`))] : []),
    shape("path", { d: `M${line.join("L")}`, class: `ev-line ${style}` }),
    ...scores.flatMap((score, k) => [
      shape("line", { x1: x(order[k]), x2: x(order[k]), y1: heightOf(score.low), y2: heightOf(score.high), class: `ev-whisker ${style}` }),
      dot(task, x(order[k]), heightOf(share(score)), style),
    ]),
  ];
}

/**
 * Tasks differ in the shape of their dots, not only in colour.
 *
 * @param {TaskInfo} task
 * @param {number} x
 * @param {number} at
 * @param {string} style
 */
function dot({ group }, x, at, style) {
  return group === "math"
    ? shape("path", { d: `M${x} ${at - 5.5}L${x + 5.5} ${at}L${x} ${at + 5.5}L${x - 5.5} ${at}Z`, class: `ev-dot ${style}` })
    : shape("circle", { cx: x, cy: at, r: 4.2, class: `ev-dot ${style}` });
}

/**
 * How many matrices merge: bars with their numbers.
 *
 * @param {Content} content
 * @param {Point[]} swept
 * @param {(i: number) => number} x
 * @param {number} width
 */
function strip({ layers, modules }, swept, x, width) {
  const top = Math.max(1, layers.length * modules.length, ...swept.map(({ matrices }) => matrices));
  const foot = TOP + HEIGHT + GAP + STRIP;
  return [
    shape("line", { x1: LEFT, x2: width - RIGHT, y1: foot, y2: foot, class: "lm-zero" }),
    shape("text", { x: LEFT, y: foot - STRIP - 5, class: "lm-note" }, `matrices merged, of ${top}`),
    ...swept.flatMap(({ matrices }, i) => {
      const height = (matrices / top) * (STRIP - 14);
      return [
        shape("rect", { x: x(i) - 5, width: 10, y: foot - height, height: Math.max(height, matrices ? 1 : 0), class: "ev-bar" }),
        label(x(i), foot - height - 3, String(matrices)),
      ];
    }),
  ];
}

/**
 * The width of the area around a point that answers to the pointer.
 *
 * @param {Scale} scale
 * @param {number} i
 * @param {number} inner
 */
function columnWidth({ at }, i, inner) {
  const others = at.filter((_, k) => k !== i).map((place) => Math.abs(place - at[i]) * (inner - 16));
  return Math.max(14, Math.min(64, ...others));
}

/**
 * A point's button: it can be focused, shows its numbers, and its plan can be taken.
 *
 * @param {Content} content
 * @param {Point} point
 * @param {{ x: number, width: number, height: number }} place
 */
function column(content, point, { x, width, height }) {
  return shape("g", { class: "ev-column", role: "button", "data-point": content.points.indexOf(point),
    "aria-label": `${pointWords(content, point)}${point.takes ? "" : "; cannot be taken"}` },
  shape("rect", { x: x - width / 2, width, y: TOP - 6, height: height - TOP - FOOT + 24, class: "ev-hit" }),
  shape("path", { d: `M${x - 6} ${TOP - 8}h12l-6 8Z`, class: "ev-taken" }),
  shape("line", { x1: x, x2: x, y1: TOP, y2: TOP + HEIGHT, class: "ev-shown" }));
}

/** @param {Content} content */
function legend({ tasks, title }) {
  return node("figcaption", {}, `${title}: share of right answers with 95 % intervals`,
    node("span", { class: "ev-key" }, ...orderedTasks(tasks).map(({ label: words, group, n }) => (
      node("span", { class: `ev-key-item ${STYLES[group]}` }, `${group === "math" ? "◆" : "●"} ${words}, n ${n}`))),
    node("span", { class: "ev-key-item" }, "⋯ without a merge")));
}

/** @param {Content} content */
function plotWords({ title, tasks }) {
  return `${title}: scores of ${tasks.map(({ label: words }) => words).join(" and ")} by value. Arrow keys move between points; Enter takes a plan.`;
}
