// @ts-check
// The map as one SVG picture: heading, sentence, cells, change bars, legend, plan and sources. Always
// light, and drawn here: it is no picture of the page.

import { shape } from "../../web/dom.js";
import { fixed, percent } from "../../web/format.js";
import { BAND } from "../../web/grid.js";
import { cellAt, merges } from "../../web/preview.js";
import { medianValue } from "../../web/quantities.js";
import { readableOn, rgb } from "../../web/scales.js";
import { MEASURE_LABELS, planWords, shortId, shortModule } from "../../web/words.js";

/** @import { Attributes, Cell, Pack, Source } from "../../web/types.d.ts" */
/** @import { State } from "./types.d.ts" */

const LEFT = 78, TOP = 122, GAP = 2;
const INK = "#1b2330", GREY = "#4a5364", RULE = "#ccd1da", BLUE = "#2b84bb";
const FONT = "system-ui, 'Segoe UI', Arial, sans-serif";

/** @typedef {ReturnType<typeof measures>} Measures */

/**
 * @param {State} state
 * @param {string} sentence
 * @returns {SVGSVGElement}
 */
export function mapPicture(state, sentence) {
  const size = measures(state), { width, height } = size, parts = sentence.split(" · ");
  return shape("svg", { viewBox: `0 0 ${width} ${height}`, width, height, "font-family": FONT, fill: INK },
    hatchPattern(), shape("rect", { width, height, fill: "#ffffff" }),
    text(24, 38, `IPMerge · ${state.pack.name}`, { "font-size": 22, "font-weight": 700 }),
    text(24, 66, parts.slice(0, 2).join(" · "), { "font-size": 15 }),
    text(24, 88, parts.slice(2).join(" · "), { "font-size": 15 }),
    ...state.index.layers.flatMap((layer, i) => layerColumn(state, size, layer, i)),
    ...legend(state, height));
}

/** @param {State} state */
function measures({ index: { layers, modules } }) {
  const bands = Math.ceil(layers.length / BAND), columns = Math.ceil(layers.length / bands);
  const size = columns > 9 ? Math.max(22, Math.floor(1080 / columns)) : Math.floor(646 / columns) - GAP;
  const rowHeight = Math.min(34, size);
  const bandHeight = 22 + modules.length * (rowHeight + GAP) + 66;
  return {
    columns, size, rowHeight, bandHeight, foot: bandHeight - 16,
    width: Math.max(760, LEFT + columns * (size + GAP) + 30), height: TOP + bands * bandHeight + 92,
  };
}

/**
 * @param {number} x
 * @param {number} y
 * @param {string} words
 * @param {Attributes} [extra]
 */
function text(x, y, words, extra = {}) {
  return shape("text", { x, y, "font-size": 13, ...extra }, words);
}

function hatchPattern() {
  return shape("defs", {}, shape("pattern", { id: "hatch", width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
    shape("line", { x1: 0, x2: 0, y1: 0, y2: 6, stroke: INK, "stroke-width": 1.2, opacity: 0.4 })));
}

/**
 * A layer's number, cells and bar; the first of a band also names the rows.
 *
 * @param {State} state
 * @param {Measures} measured
 * @param {number} layer
 * @param {number} i
 */
function layerColumn(state, { columns, size, rowHeight, bandHeight, foot }, layer, i) {
  const { index, quantity, quantityDomain: [low, high], result, barTop } = state;
  const y0 = TOP + Math.floor(i / columns) * bandHeight, x = LEFT + (i % columns) * (size + GAP);
  const cells = index.modules.flatMap((module, j) => {
    const cell = cellAt(index, layer, module), y = y0 + 22 + j * (rowHeight + GAP);
    if (!cell) return [];
    const value = medianValue(state, cell, quantity);
    return pictureCell(state, cell, { x, y, width: size, height: rowHeight }, value, value === null ? null : (value - low) / (high - low));
  });
  const bar = Math.min(1, result.layer_change[layer] / barTop) * 44;
  return [
    text(x + size / 2, y0 + 12, String(layer), { "text-anchor": "middle", "font-size": 11, fill: GREY }),
    ...cells,
    shape("rect", { x: x + size * 0.14, y: y0 + foot - bar, width: size * 0.72, height: bar, fill: BLUE }),
    ...(i % columns === 0 ? rowNames(state, y0, { columns, size, rowHeight, foot }) : []),
  ];
}

/**
 * @param {State} state
 * @param {number} y0
 * @param {Pick<Measures, "columns" | "size" | "rowHeight" | "foot">} measured
 */
function rowNames({ index, barTop }, y0, { columns, size, rowHeight, foot }) {
  const small = { "text-anchor": "end", "font-size": 11, fill: GREY };
  return [
    ...index.modules.map((module, j) => (
      text(LEFT - 10, y0 + 22 + j * (rowHeight + GAP) + rowHeight / 2 + 4, shortModule(module), { "text-anchor": "end", fill: GREY }))),
    shape("line", { x1: LEFT, x2: LEFT + columns * (size + GAP), y1: y0 + foot, y2: y0 + foot, stroke: RULE }),
    text(LEFT - 10, y0 + foot - 2, "change", small),
    text(LEFT - 10, y0 + foot - 36, percent(barTop), small),
  ];
}

/**
 * @param {State} state
 * @param {Cell} cell
 * @param {{ x: number, y: number, width: number, height: number }} box
 * @param {number | null} value Null where the pack has none.
 * @param {number | null} t Its place on the colour scale.
 */
function pictureCell(state, cell, { x, y, width, height }, value, t) {
  /** @param {Attributes} extra */
  const box = (extra) => shape("rect", { x, y, width, height, rx: 4, ...extra });
  const pin = state.plan.overrides[cell.name]
    ? [shape("circle", { cx: x + width - 5, cy: y + 5, r: 3, fill: INK, stroke: "#fff", "stroke-width": 2 })] : [];
  const fill = t === null ? "#ffffff" : rgb(t), words = state.quantity.words(value);
  const size = Math.min(12, width / (0.6 * words.length + 0.6));
  /** @param {Attributes} extra */
  const number = (extra) => text(x + width / 2, y + height / 2 + size / 3, words, { "text-anchor": "middle", "font-size": size, ...extra });
  if (!merges(state, state.result, cell)) {
    const halo = { fill: INK, stroke: "#fff", "stroke-width": 3, "paint-order": "stroke" };
    return [box({ fill, opacity: 0.32 }), box({ fill: "url(#hatch)" }), number(halo), ...pin];
  }
  return [box({ fill: INK }),
    shape("rect", { x: x + 2, y: y + 2, width: width - 4, height: height - 4, rx: 3, fill, stroke: "#fff", "stroke-width": 1.5 }),
    number({ fill: t === null ? INK : readableOn(t) }), ...pin];
}

/**
 * @param {State} state
 * @param {number} height
 */
function legend({ quantity, quantityDomain: [low, high], plan, pack }, height) {
  const y = height - 66, chip = { y: y - 13, width: 24, height: 17, rx: 4 };
  const isSimilarity = quantity.key === "similarity", small = isSimilarity ? {} : { "font-size": 11 };
  return [
    ...Array.from({ length: 60 }, (_, i) => shape("rect", { x: 64 + 2 * i, y: y - 10, width: 2.2, height: 12, fill: rgb(i / 59) })),
    text(24, y, isSimilarity ? fixed(low, 2) : quantity.words(low), small),
    text(190, y, isSimilarity ? `${fixed(high, 2)}  ${MEASURE_LABELS[plan.similarity]}` : `${quantity.words(high)}  ${quantity.label}`, small),
    shape("rect", { x: 360, ...chip, fill: INK }),
    shape("rect", { x: 362, y: y - 11, width: 20, height: 13, rx: 3, fill: "#a59c74", stroke: "#fff" }),
    shape("rect", { x: 460, ...chip, fill: "#8a8678", opacity: 0.32 }),
    shape("rect", { x: 460, ...chip, fill: "url(#hatch)" }),
    text(390, y, "merges"),
    text(490, y, "kept"),
    text(24, height - 38, planWords(plan, true), { "font-size": 12 }),
    text(24, height - 18, sourceWords(pack), { "font-size": 11, fill: GREY }),
  ];
}

/**
 * Which models the map is of, and how they were analysed.
 *
 * @param {Pack} pack
 */
export function sourceWords({ sources: { mllm, base, math }, created, engine, parameters }) {
  return `${sourceName(mllm)} ← ${math.map(sourceName).join(", ")} (base ${sourceName(base)}); analysed ${String(created).slice(0, 10)} ` +
    `with IPMerge ${engine}${optionWords(parameters)}. Geometry, not accuracy.`;
}

/** @param {Source | null | undefined} source */
function sourceName(source) {
  if (!source) return "?";
  return shortId(source.id) + (source.revision ? `@${String(source.revision).slice(0, 8)}` : "");
}

/**
 * How the pair was analysed, where not in the usual way; the plan merges with these, too.
 *
 * @param {Pack["parameters"]} parameters
 */
function optionWords({ quick, rank, temperature = 32 }) {
  const words = [quick && "quick, approximate", rank && `rank ${rank}`, temperature !== 32 && `temperature ${temperature}`];
  return words.filter(Boolean).map((word) => `, ${word}`).join("");
}
