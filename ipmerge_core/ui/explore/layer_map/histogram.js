// @ts-check
// The dial of the threshold: a histogram of similarities over the slider.

import { fill, shape } from "../../web/dom.js";
import { fixed } from "../../web/format.js";
import { shownSimilarity } from "../../web/preview.js";
import { quantile, rgb } from "../../web/scales.js";
import { cellsOf } from "../../web/targets.js";
import { thresholdText } from "../../web/thresholds.js";
import { INSET, plotWidth, thumbLine } from "./dials.js";

/** @import { Cell } from "../../web/types.d.ts" */
/** @import { LayerMap } from "./map.js" */

const BINS = 50;

export class Histogram {
  #width = 0;
  #kept = shape("rect");
  #taken = shape("rect");
  #line = shape("g");

  /** @param {LayerMap} map */
  constructor(map) {
    this.map = map;
  }

  /** Draw it again: after a change of the pair, the width, the measure, the expert or the range. */
  build() {
    const { dom, id, state } = this.map, svg = dom.hist;
    const width = plotWidth(this.map, svg), height = svg.clientHeight || 92;
    const inRange = state.target?.kind === "range";
    const cells = inRange ? cellsOf(state.index, state.target) : state.index.cells;
    const bins = this.#count(cells);
    this.#width = width;
    this.#kept = shape("rect", { x: 0, y: 0, height, width: 0 });
    this.#taken = shape("rect", { x: 0, y: 0, height, width: 0 });
    this.#line = thumbLine(height);
    svg.setAttribute("viewBox", `0 0 ${width + 2 * INSET} ${height}`);
    svg.replaceChildren(
      shape("defs", {}, shape("clipPath", { id: `${id}k` }, this.#kept), shape("clipPath", { id: `${id}t` }, this.#taken), hatch(`${id}h`)),
      shape("g", { "clip-path": `url(#${id}k)` },
        shape("g", { class: "lm-dim" }, ...this.#bars(bins, width, height)),
        shape("g", { class: "lm-hatch" }, ...this.#bars(bins, width, height).map((bar) => fill(bar, { fill: `url(#${id}h)` })))),
      shape("g", { "clip-path": `url(#${id}t)`, class: "lm-lit" }, ...this.#bars(bins, width, height)),
      ...this.#chanceMark(width, height),
      shape("text", { x: INSET + width, y: 12, class: "lm-note", "text-anchor": "end" },
        `similarity of ${cells.length} matrices${inRange ? " in range" : ""}`),
      this.#line);
  }

  /** @param {Cell[]} cells */
  #count(cells) {
    const { expert, plan } = this.map.state;
    const bins = new Array(BINS).fill(0);
    for (const cell of cells) {
      for (const record of expert >= 0 ? [cell.experts[expert]] : cell.experts) {
        bins[Math.min(BINS - 1, Math.floor(record.similarity[plan.similarity] * BINS))] += 1;
      }
    }
    return bins;
  }

  /**
   * @param {number[]} bins
   * @param {number} width
   * @param {number} height
   */
  #bars(bins, width, height) {
    const top = Math.max(...bins), [low, high] = this.map.state.domain, step = width / BINS;
    return bins.flatMap((n, i) => (n ? [shape("rect", {
      x: (INSET + i * step + 0.5).toFixed(2), width: Math.max(1, step - 1).toFixed(2),
      y: (height - 3 - (n / top) * (height - 22)).toFixed(2), height: (3 + (n / top) * (height - 22)).toFixed(2),
      rx: 1.5, fill: rgb(((i + 0.5) / BINS - low) / (high - low)),
    })] : []));
  }

  /**
   * Where unrelated matrices would fall: it differs with the matrix size, so it is a band.
   *
   * @param {number} width
   * @param {number} height
   */
  #chanceMark(width, height) {
    const { index, plan } = this.map.state;
    const levels = index.cells.flatMap((cell) => {
      const level = cell.experts[0].chance?.[plan.similarity];
      return level !== undefined && Number.isFinite(level) ? [level] : [];
    });
    if (!levels.length) return [];
    const lowest = Math.min(...levels), highest = Math.max(...levels);
    const low = INSET + lowest * width, high = INSET + highest * width;
    return [
      shape("rect", { x: low - 0.75, width: high - low + 1.5, y: 4, height: height - 4, class: "lm-chance" },
        shape("title", {}, `Unrelated matrices reach about ${fixed(lowest, 2)} to ${fixed(highest, 2)} by chance`)),
      shape("text", { x: high + 4, y: 12, class: "lm-note" }, "chance"),
    ];
  }

  /** Move the threshold. */
  paint() {
    const x = INSET + this.map.state.plan.s * this.#width;
    this.#kept.setAttribute("width", String(x));
    this.#taken.setAttribute("x", String(x));
    this.#taken.setAttribute("width", String(this.#width + 2 * INSET - x));
    this.#line.setAttribute("transform", `translate(${x} 0)`);
  }

  /** Describe the plot in a sentence, for those who do not see it; between drags only. */
  describe() {
    const { dom, state } = this.map;
    const values = state.index.cells.map((cell) => shownSimilarity(state, cell)).sort((a, b) => a - b);
    dom.hist.setAttribute("aria-label", `Histogram of the similarities of ${values.length} matrices: ${fixed(values[0], 2)} to ` +
      `${fixed(values[values.length - 1], 2)}, median ${fixed(quantile(values, 0.5), 2)}; ` +
      `${state.result.selected.length} merge at S alpha ${thresholdText(state.plan.s)}.`);
  }
}

/** @param {string} id */
function hatch(id) {
  return shape("pattern", { id, width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
    shape("line", { x1: 0, x2: 0, y1: 0, y2: 5, class: "lm-hatch-line" }));
}
