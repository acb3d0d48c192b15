// @ts-check
// The dial of lambda: the cosines of the merged task vector to both others, as curves over the slider.

import { setText, shape } from "../../web/dom.js";
import { fixed, lambdaText } from "../../web/format.js";
import { LAMBDA_MAX } from "../../web/plan.js";
import { angles, previewOf } from "../../web/preview.js";
import { LAMBDA_STEPS, lambdaAt, lambdaPosition } from "../../web/scales.js";
import { INSET, plotWidth, thumbLine } from "./dials.js";

/** @import { Angles, Index, Plan } from "../../web/types.d.ts" */
/** @import { LayerMap } from "./map.js" */

// Where the curves are drawn, worked out once: a frame then only has two cosines a point.
const CURVE_POINTS = Array.from({ length: LAMBDA_STEPS / 2 + 1 }, (_, i) => (
  { position: 2 * i, lambda: lambdaAt(2 * i) }));
/** @type {(keyof Angles)[]} */
const NAMES = ["keep", "absorb"];

/**
 * The lower end of the curves' axis: the lowest value that they reach over thresholds and lambda.
 *
 * @param {Index} index
 * @param {Plan} plan
 */
export function lowestCosine(index, plan) {
  let low = 0;
  for (const s of [0, 0.25, plan.s]) {
    const { sums } = previewOf(index, { ...plan, s });
    const ends = [angles(sums, 0), angles(sums, LAMBDA_MAX)];
    low = Math.min(low, ...ends.flatMap(({ keep, absorb }) => [keep ?? 0, absorb ?? 0]));
  }
  if (low < -0.5) return -1;
  if (low < -0.25) return -0.5;
  return low < 0 ? -0.25 : 0;
}

export class Curve {
  #width = 0;
  #height = 0;
  #paths = { keep: shape("path", { class: "lm-keep" }), absorb: shape("path", { class: "lm-absorb" }) };
  #dots = {
    keep: shape("circle", { r: 4, class: "lm-keep-dot" }), absorb: shape("circle", { r: 4, class: "lm-absorb-dot" }),
  };
  #line = shape("g");

  /** @param {LayerMap} map */
  constructor(map) {
    this.map = map;
  }

  /** @param {number} position Of the slider. */
  #x(position) {
    return INSET + (position / LAMBDA_STEPS) * this.#width;
  }

  /** @param {number} value A cosine. */
  #y(value) {
    const low = this.map.state.curveLow;
    return this.#height - 4 - ((Math.max(low, value) - low) / (1 - low)) * (this.#height - 12);
  }

  /** Draw the axes again: after a change of the width or of the lower end. */
  build() {
    const { dom, state: { curveLow } } = this.map, svg = dom.curve;
    this.#width = plotWidth(this.map, svg);
    this.#height = svg.clientHeight || 92;
    this.#line = thumbLine(this.#height);
    const right = INSET + this.#width, paper = this.#x(lambdaPosition(1));
    const rules = [...new Set([curveLow, 0, 0.5, 1])].map((value) => shape("line", {
      x1: INSET, x2: right, y1: this.#y(value), y2: this.#y(value), class: value === 0 ? "lm-zero" : "lm-rule" }));
    svg.setAttribute("viewBox", `0 0 ${this.#width + 2 * INSET} ${this.#height}`);
    svg.replaceChildren(...rules,
      shape("line", { x1: paper, x2: paper, y1: 4, y2: this.#height, class: "lm-paper" },
        shape("title", {}, "λ = 1, the update as in the paper")),
      this.#paths.keep, this.#paths.absorb, this.#line, ...this.#labels(right), this.#dots.keep, this.#dots.absorb);
  }

  /** @param {number} right */
  #labels(right) {
    const { curveLow } = this.map.state;
    return [
      shape("text", { x: right, y: this.#y(1) + 11, class: "lm-note", "text-anchor": "end" }, "1"),
      shape("text", { x: right, y: this.#y(curveLow) - 3, class: "lm-note", "text-anchor": "end" }, fixed(curveLow, curveLow ? 2 : 0)),
      shape("text", { x: INSET, y: this.#y(0.5) - 4, class: "lm-note" }, "cosines: geometry, not accuracy"),
    ];
  }

  /** Draw the curves of the plan and move lambda. */
  paint() {
    const { plan, result } = this.map.state;
    const paths = { keep: "", absorb: "" };
    for (const { position, lambda } of CURVE_POINTS) {
      const point = angles(result.sums, lambda), at = this.#x(position).toFixed(1);
      for (const name of NAMES) {
        const value = point[name];
        if (value !== null) paths[name] += `${paths[name] ? "L" : "M"}${at} ${this.#y(value).toFixed(1)}`;
      }
    }
    const here = this.#x(lambdaPosition(plan.lambda));
    this.#line.setAttribute("transform", `translate(${here} 0)`);
    for (const name of NAMES) {
      this.#paths[name].setAttribute("d", paths[name]);
      this.#paintDot(name, here, result[name]);
    }
  }

  /**
   * @param {keyof Angles} name
   * @param {number} here
   * @param {number | null} value
   */
  #paintDot(name, here, value) {
    const dot = this.#dots[name];
    dot.style.display = value === null ? "none" : "";
    if (value !== null) dot.setAttribute("transform", `translate(${here} ${this.#y(value)})`);
    setText(this.map.dom[name], fixed(value, 2));
  }

  /** Describe the plot in a sentence, for those who do not see it; between drags only. */
  describe() {
    const { dom, state: { plan, result } } = this.map, end = angles(result.sums, LAMBDA_MAX);
    dom.curve.setAttribute("aria-label", `Cosines of the merged task vector over lambda, not accuracies. At ${lambdaText(plan.lambda)}: ` +
      `${fixed(result.keep, 2)} to the vision task vector, ${fixed(result.absorb, 2)} to the math update. ` +
      `At ${LAMBDA_MAX}: ${fixed(end.keep, 2)} and ${fixed(end.absorb, 2)}.`);
  }
}
