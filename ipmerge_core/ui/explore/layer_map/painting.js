// @ts-check
// Painting: what follows the plan in every frame of a drag, and what is only built between drags.

import { setText } from "../../web/dom.js";
import { budgetText, fixed, lambdaText, percent } from "../../web/format.js";
import { markUsable } from "../../web/number_field.js";
import { previewOf, shownSimilarity } from "../../web/preview.js";
import { shownValue } from "../../web/quantities.js";
import { colourDomain, lambdaPosition, niceTop } from "../../web/scales.js";
import { coversLayer } from "../../web/targets.js";
import { thresholdText } from "../../web/thresholds.js";
import { paintChoices, paintEnergy } from "./choices.js";
import { buildLanes } from "./measured_lanes.js";
import { paintReading } from "./reading.js";
import { lowestCosine } from "./curve.js";
import { paintAdvice, paintDrift, paintSense, paintSentence } from "./sentence.js";
import { buildSpectra } from "./spectra.js";
import { tryTab } from "./try_tab.js";

/** @import { Index, Plan } from "../../web/types.d.ts" */
/** @import { LayerMap } from "./map.js" */

const MOST_TIMINGS = 500;

export class Painter {
  #frame = 0;
  /** @type {number[]} How long the last paintings took, in milliseconds. */
  timings = [];

  /** @param {LayerMap} map */
  constructor(map) {
    this.map = map;
    map.store.subscribe((state, before) => {
      if (state.plan !== before.plan) this.schedule();
    });
  }

  get isWaiting() {
    return this.#frame !== 0;
  }

  /** Paint in the next frame. */
  schedule() {
    this.#frame ||= requestAnimationFrame(() => this.#paint());
  }

  /** Paint at once. */
  now() {
    cancelAnimationFrame(this.#frame);
    this.#paint();
  }

  #paint() {
    const { map } = this;
    this.#frame = 0;
    if (!map.state.isOpen) return;
    const start = performance.now();
    const result = previewOf(map.state.index, map.state.plan);
    map.set({ result });
    map.grid.paint(map.state, result);
    map.histogram.paint();
    map.curve.paint();
    paintBars(map);
    paintSentence(map);
    paintSense(map);
    paintDrift(map);
    paintInputs(map);
    map.detail.paint(result);
    paintReading(map);
    this.timings.push(performance.now() - start);
    if (this.timings.length > MOST_TIMINGS) this.timings.shift();
  }
}

/** @param {LayerMap} map */
function paintBars({ grid, state: { result, barTop, target } }) {
  grid.paintBars((layer) => Math.min(1, result.layer_change[layer] / barTop), (layer) => coversLayer(target, layer));
}

/** @param {LayerMap} map */
function paintInputs(map) {
  const { dom: { range, number, wrong, dragMe }, state: { plan: { s, lambda, budget }, typing, result, dragging } } = map;
  range.s.value = String(s);
  range.lambda.value = String(Math.round(lambdaPosition(lambda)));
  for (const [name, text] of /** @type {const} */ ([["s", thresholdText(s)], ["lambda", lambdaText(lambda)], ["budget", budgetText(budget)]])) {
    if (typing === number[name]) continue;
    number[name].value = text;
    markUsable(number[name], wrong[name]);
  }
  range.s.setAttribute("aria-valuetext", `${thresholdText(s)}, ${result.selected.length} of ${result.n_matrices} matrices merge`);
  range.lambda.setAttribute("aria-valuetext", lambdaText(lambda) + (lambda === 1 ? ", as in the paper" : ""));
  if (!dragMe.hidden) dragMe.style.setProperty("--at", String(s));
  if (!dragging) {
    paintChoices(map);
    paintAdvice(map);
  }
  paintEnergy(map);
}

/**
 * Everything that depends on the width; also after a resize or a turn of the phone.
 *
 * @param {LayerMap} map
 */
export function layOut(map) {
  if (!map.state.isOpen) return;
  const { root } = map.dom, width = root.clientWidth, { index } = map.state;
  map.set({ width, narrow: width > 0 && width < 620 });
  root.dataset.shape = shapeOf(width, index.layers.length);
  root.style.setProperty("--map-width", `${52 + 118 * index.layers.length}px`);
  map.find("[data-act=answer]").hidden = !tryTab();
  map.grid.build(index, map.state.narrow);
  rebuildColours(map);
  rescale(map);
  showChosen(map);
  map.grid.paintGhost(map.state, map.state.ghost);
  describeDials(map);
}

/**
 * @param {number} width
 * @param {number} columns
 */
function shapeOf(width, columns) {
  if (width < 1020) return "stacked";
  if (columns <= 9) return "few";
  return columns <= 36 ? "many" : "banded";
}

/** @param {LayerMap} map */
export function rebuildColours(map) {
  const { state } = map;
  map.set({ domain: colourDomain(state.index.cells.map((cell) => shownSimilarity(state, cell))) });
  paintQuantity(map);
  map.histogram.build();
}

/**
 * The colours of the map and their legend; after a commit, too, if they show the change of a plan.
 *
 * @param {LayerMap} map
 */
export function paintQuantity(map) {
  const { state, dom } = map, { quantity } = state;
  const values = state.index.cells.flatMap((cell) => shownValue(state, cell, quantity) ?? []);
  const domain = quantity.key === "similarity" ? state.domain : colourDomain(values.length ? values : [0]);
  map.set({ quantityDomain: domain });
  map.grid.colour(state, domain, quantity);
  setText(dom.low, quantity.key === "similarity" ? fixed(domain[0], 2) : quantity.words(domain[0]));
  setText(dom.high, quantity.key === "similarity" ? fixed(domain[1], 2) : quantity.words(domain[1]));
  setText(dom.quantity, quantity.key === "similarity" ? quantity.label : `${quantity.label} (${quantity.unit})`);
}

/**
 * Set the axes of bars and curves to the committed plan; between drags only, so that no movement of
 * the threshold rescales them.
 *
 * @param {LayerMap} map
 */
export function rescale(map) {
  const { index, plan } = map.state;
  const barTop = highestChange(index, plan);
  map.set({ barTop, curveLow: lowestCosine(index, plan) });
  map.grid.nameBarsTop(percent(barTop));
  map.curve.build();
  buildLanes(map);
}

/**
 * What a layer changes at most when every matrix merges, as the end of an axis.
 *
 * @param {Index} index
 * @param {Plan} plan
 */
export function highestChange(index, plan) {
  const everything = previewOf(index, { ...plan, s: 0, overrides: {}, lambda: plan.lambda || 1 });
  return niceTop(Math.max(...Object.values(everything.layer_change)));
}

/** @param {LayerMap} map */
export function describeDials(map) {
  map.histogram.describe();
  map.curve.describe();
}

/** @param {LayerMap} map */
export function showChosen(map) {
  const { target, pinned } = map.state;
  map.detail.build();
  buildSpectra(map);
  map.grid.mark(target, pinned);
  map.painter.now();
}

