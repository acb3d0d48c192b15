// @ts-check
// A sweep over two parameters: a table of scores, coloured, with the numbers in its cells.

import { node } from "../web/dom.js";
import { readableOn, rgb } from "../web/scales.js";
import { orderedTasks, pointWords, percentPoints, share, valueWords } from "./scores.js";
import { sweptPoints } from "./sweep_plot.js";

/** @import { Content, State } from "./types.d.ts" */

/**
 * @param {Content} content
 * @param {State} state
 */
export function heatPlot(content, state) {
  const { axes: [first, second], tasks } = content;
  const task = tasks.find(({ name }) => name === state.task) ?? orderedTasks(tasks)[0];
  const head = node("tr", {}, node("th", { scope: "col" }, `${first.label} \\ ${second.label}`),
    ...second.values.map((value) => node("th", { scope: "col" }, valueWords(value))));
  const rows = first.values.map((value) => node("tr", {}, node("th", { scope: "row" }, valueWords(value)),
    ...second.values.map((other) => cell(content, task.name, [value, other]))));
  return node("figure", { class: "lm-figure lm-figure-wide" },
    node("figcaption", {}, `${content.title}: ${task.label}, share of right answers in %, n ${task.n}`, taskPicker(content, task.name)),
    node("div", { class: "ev-scroll", tabindex: 0, role: "region", "aria-label": `${content.title}, table` },
      node("table", { class: "ev-heat" }, node("thead", {}, head), node("tbody", {}, ...rows))));
}

/**
 * @param {Content} content
 * @param {string} task
 * @param {[unknown, unknown]} values
 */
function cell(content, task, values) {
  const point = sweptPoints(content).find((each) => each.values.every((value, k) => value === values[k]));
  const score = point?.scores[task];
  if (!point || !score?.n) return node("td", {}, "–");
  const t = share(score);
  const button = node("button", { type: "button", class: "ev-cell", "data-point": content.points.indexOf(point),
    "aria-label": pointWords(content, point) }, percentPoints(t),
  node("small", {}, `${percentPoints(score.low)}–${percentPoints(score.high)}`));
  button.style.background = rgb(t);
  button.style.color = readableOn(t);
  return node("td", {}, button);
}

/**
 * @param {Content} content
 * @param {string} chosen
 */
function taskPicker({ tasks }, chosen) {
  if (tasks.length < 2) return null;
  return node("span", { class: "lm-seg", role: "group", "aria-label": "Task" }, ...orderedTasks(tasks).map(({ name, label }) => (
    node("button", { type: "button", "data-task": name, "aria-pressed": String(name === chosen) }, label))));
}
