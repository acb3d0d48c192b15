// @ts-check
// The two numbers of a plan: sliders, number fields, and the plots, which are handles as well.

import { setText } from "../../web/dom.js";
import { budgetText, lambdaText } from "../../web/format.js";
import { remember } from "../../web/memory.js";
import { isUsable, markUsable, markWrong } from "../../web/number_field.js";
import { complementAt, keptOf, truncationAt } from "../../web/plan.js";
import { LAMBDA_STEPS, lambdaAt } from "../../web/scales.js";
import { thresholdText } from "../../web/thresholds.js";
import { INSET } from "./dials.js";
import { commit, setPlan, startDrag } from "./session.js";

/** @import { Plan } from "../../web/types.d.ts" */
/** @import { LayerMap } from "./map.js" */

/**
 * @param {LayerMap} map
 * @param {HTMLInputElement} input A slider or a number field.
 * @returns {Partial<Plan>}
 */
function patchOf({ state }, { dataset: { range, number, energy }, value }) {
  if (energy !== undefined) return { variant: (keptOf(state.plan.variant) === null ? complementAt : truncationAt)(Number(value)) };
  if (number === "budget") return { budget: Number(value) / 100 };
  if ((range ?? number) === "s") return { s: Number(value) };
  return { lambda: range ? lambdaAt(Number(value)) : Number(value) };
}

/**
 * @param {LayerMap} map
 * @param {HTMLInputElement} input
 */
export function onInput(map, input) {
  const { range, number, energy } = input.dataset;
  if (range || energy !== undefined) {
    startDrag(map);
    if (range) hideHint(map, range);
    setPlan(map, patchOf(map, input));
  } else if (number) {
    map.set({ typing: input });
    if (!isUsable(input)) return; // until the end of typing it may become a number
    markUsable(input, noteOf(map, input));
    startDrag(map);
    setPlan(map, patchOf(map, input));
  }
}

/**
 * The number of a plan that a field holds.
 *
 * @param {DOMStringMap} dataset
 * @returns {"s" | "lambda" | "budget"}
 */
function nameOf({ number }) {
  return number === "s" || number === "budget" ? number : "lambda";
}

/**
 * @param {LayerMap} map
 * @param {HTMLInputElement} input
 */
function noteOf({ dom: { wrong } }, { dataset }) {
  return wrong[nameOf(dataset)];
}

/**
 * @param {LayerMap} map
 * @param {HTMLInputElement} input
 */
export function onRangeChange(map, input) {
  setPlan(map, patchOf(map, input));
  commit(map);
}

/**
 * The end of typing: what cannot be used stays, with a sentence beside it, and changes nothing.
 *
 * @param {LayerMap} map
 * @param {HTMLInputElement} input
 */
export function numberDone(map, input) {
  if (isUsable(input)) {
    commit(map);
    return;
  }
  const { s, lambda, budget } = map.state.plan;
  const [label, text] = {
    s: ["Sα", thresholdText(s)], lambda: ["λ", lambdaText(lambda)], budget: ["Budget", `${budgetText(budget)} %`],
  }[nameOf(input.dataset)];
  commit(map, "", input);
  setText(map.dom.status, markWrong(input, noteOf(map, input), label, text));
}

/**
 * "Drag me" has done its work once the threshold has been moved.
 *
 * @param {LayerMap} map
 * @param {string} name
 */
function hideHint({ dom: { dragMe } }, name) {
  if (name !== "s" || dragMe.hidden) return;
  dragMe.hidden = true;
  remember("dragged", true);
}

/**
 * Press and move anywhere on the two plots.
 *
 * @param {LayerMap} map
 */
export function listenToPlots(map) {
  plotHandle(map, map.dom.hist, "s", (t) => ({ s: Math.round(t * 1000) / 1000 }));
  plotHandle(map, map.dom.curve, "lambda", (t) => ({ lambda: lambdaAt(Math.round(t * LAMBDA_STEPS)) }));
}

/**
 * @param {LayerMap} map
 * @param {SVGSVGElement} svg
 * @param {"s" | "lambda"} name
 * @param {(t: number) => { s: number } | { lambda: number }} patch
 */
function plotHandle(map, svg, name, patch) {
  /** @param {PointerEvent} event */
  const move = (event) => {
    const box = svg.getBoundingClientRect();
    setPlan(map, patch(Math.max(0, Math.min(1, (event.clientX - box.left - INSET) / (box.width - 2 * INSET)))));
  };
  svg.addEventListener("pointerdown", (event) => {
    if (event.button || !map.state.isOpen) return;
    svg.setPointerCapture(event.pointerId);
    startDrag(map);
    hideHint(map, name);
    move(event);
  });
  svg.addEventListener("pointermove", (event) => {
    if (svg.hasPointerCapture(event.pointerId)) move(event);
  });
  for (const end of /** @type {const} */ (["pointerup", "pointercancel"])) {
    svg.addEventListener(end, (event) => {
      if (!svg.hasPointerCapture(event.pointerId)) return;
      svg.releasePointerCapture(event.pointerId);
      commit(map);
    });
  }
}
