// @ts-check
// A knock-out: for each model and task a small map of how much the score changes without a module.

import { node } from "../web/dom.js";
import { readableOn, rgb } from "../web/scales.js";
import { dropOf, isSignificant, orderedTasks, scoreWords, testWords, uncutWords } from "./scores.js";

/** @import { Content, CutRow } from "./types.d.ts" */

/** @param {Content} content */
export function knockoutMaps(content) {
  const models = [...new Set(content.cuts.map(({ model }) => model))];
  return node("div", { class: "ev-cuts" },
    node("p", { class: "lm-source" }, "Change in points without the module; * p < 0.05."), ...models.flatMap((model) => orderedTasks(content.tasks).map((task) => (
    cutMap(content.cuts.filter((cut) => cut.model === model), `${model}: ${task.label}`, task.name)))));
}

/**
 * @param {CutRow[]} cuts
 * @param {string} heading
 * @param {string} task
 */
function cutMap(cuts, heading, task) {
  const layers = [...new Set(cuts.map(({ layer }) => layer))], modules = [...new Set(cuts.map(({ module }) => module))];
  const head = node("tr", {}, node("th", { scope: "col" }, "layer"), ...layers.map((layer) => node("th", { scope: "col" }, String(layer))));
  const rows = modules.map((module) => node("tr", {}, node("th", { scope: "row" }, module),
    ...layers.map((layer) => cell(cuts.find((cut) => cut.layer === layer && cut.module === module), task))));
  return node("figure", { class: "lm-figure" },
    node("figcaption", {}, `${heading}, ${uncutWords(cuts[0]?.scores[task])} with all modules`),
    node("div", { class: "ev-scroll", tabindex: 0, role: "region", "aria-label": heading },
      node("table", { class: "ev-heat" }, node("thead", {}, head), node("tbody", {}, ...rows))));
}

/**
 * @param {CutRow | undefined} cut
 * @param {string} task
 */
function cell(cut, task) {
  const drop = dropOf(cut, task), score = cut?.scores[task];
  if (drop === null) return node("td", {}, "–");
  const t = 1 - Math.min(1, Math.abs(drop));
  const made = node("td", { class: "ev-cut", title: `${scoreWords(score)}; ${testWords(score)}` },
    `${drop < 0 ? "−" : "+"}${Math.abs(100 * drop).toFixed(1)}${isSignificant(score) ? "*" : ""}`);
  made.style.background = rgb(t);
  made.style.color = readableOn(t);
  return made;
}
