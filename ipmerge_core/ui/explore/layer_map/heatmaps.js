// @ts-check
// Heat maps of the chosen matrix: the singular values of its module in every layer, of the base and of
// both task vectors, and the cosines between the leading directions of both.

import { node } from "../../web/dom.js";
import { fixed, scientific } from "../../web/format.js";
import { heldWords, overlapMatrix, singularValues, valueAt } from "../../web/spectrum.js";
import { figure } from "../../web/tables.js";
import { heatmap } from "./heatmap.js";

/** @import { LayerRecord, Row, Side, SingularValues } from "../../web/types.d.ts" */
/** @typedef {{ record: LayerRecord, found: SingularValues }} Spectrum */

const COLUMNS = 160, DECADES = 4;
/** @type {[Side, string][]} */
const SIDES = [["base", "base weights W₀"], ["mllm", "task vector of the MLLM"], ["math", "task vector of the math model"]];

/**
 * @param {LayerRecord} record The chosen one.
 * @param {LayerRecord[]} known Of its module, in the order of the layers.
 */
export function heatFigures(record, known) {
  const maps = SIDES.flatMap(([side, name]) => {
    const spectra = known.flatMap((each) => {
      const found = singularValues(each, side);
      return found ? [{ record: each, found }] : [];
    });
    return spectra.length ? [spectraFigure(record.module, side, name, spectra)] : [];
  });
  return [...maps, ...overlapFigure(record), ...missing(record)];
}

/**
 * @param {string} module
 * @param {Side} side
 * @param {string} name
 * @param {Spectrum[]} spectra
 */
function spectraFigure(module, side, name, spectra) {
  const last = Math.max(...spectra.map(({ found }) => found.computed));
  const columns = Math.min(COLUMNS, last);
  const rankAt = Array.from({ length: columns }, (_, i) => Math.round(last ** (i / (columns - 1 || 1))));
  const top = Math.max(...spectra.map(({ found }) => found.values[0])), floor = lowest(spectra, top);
  const held = [...new Set(spectra.map(({ found }) => heldWords(found)))].join(" or ");
  /** @param {number} row @param {number} column */
  const valueOf = (row, column) => valueAt(spectra[row].found, rankAt[column]);
  return figure({
    heading: `Singular values of ${module}, ${name}`, extra: node("span", {}, `layers × rank, ${held}`),
    stem: `spectra-${side}-${module}`.replace(/[^\w-]+/g, "_"),
    drawing: heatmap({
      rows: spectra.length, columns, height: Math.max(56, Math.min(180, 9 * spectra.length)),
      label: `Heat map of the singular values of ${module} by layer and rank: ${name}, from ${scientific(top)} to ${scientific(floor)}.`,
      low: scientific(floor), high: `${scientific(top)} σ, logarithmic`,
      yNames: [`layer ${spectra[0].record.layer}`, String(spectra[spectra.length - 1].record.layer)],
      xTicks: rankTicks(last),
      share: (row, column) => logShare(valueOf(row, column), floor, top),
      words: (row, column) => `Layer ${spectra[row].record.layer}, rank ${rankAt[column]}: σ ${scientific(valueOf(row, column))}`,
    }),
    rows: () => spectra.flatMap(spectrumRows),
    columns: [["layer", String], ["rank", String], ["sigma", scientific], ["values", String], ["possible", String]],
  });
}

/**
 * @param {Spectrum[]} spectra
 * @param {number} top
 */
function lowest(spectra, top) {
  const ends = spectra.flatMap(({ found }) => found.values.filter((value) => value > 0).slice(-1));
  return Math.max(Math.min(top, ...ends), top * 10 ** -DECADES);
}

/**
 * @param {number | undefined} value
 * @param {number} floor
 * @param {number} top
 */
function logShare(value, floor, top) {
  if (value === undefined) return null;
  if (!(value > 0)) return 0;
  return Math.log(value / floor) / Math.log(top / floor || 1) || 0;
}

/** @param {number} last */
function rankTicks(last) {
  const powers = Array.from({ length: Math.floor(Math.log10(last)) + 1 }, (_, i) => 10 ** i);
  return powers.map((rank) => ({ at: Math.log(rank) / Math.log(Math.max(last, 2)), text: rank === 1 ? "rank 1" : String(rank) }));
}

/**
 * @param {Spectrum} spectrum
 * @returns {Row[]}
 */
function spectrumRows({ record, found }) {
  return found.ranks.map((rank, i) => (
    { layer: record.layer, rank, sigma: found.values[i], values: found.values.length, possible: found.possible }));
}

/** @param {LayerRecord} record */
function overlapFigure({ layer, module, spectra }) {
  const overlap = spectra?.overlap;
  if (!overlap?.rows || !overlap.columns) return [];
  const cosines = overlapMatrix(overlap), size = `${overlap.rows} × ${overlap.columns}`;
  const best = Math.max(...cosines.flat());
  return [figure({
    heading: `Cosines |V_mllmᵀ V_math|, layer ${layer} · ${module}`,
    extra: node("span", {}, `leading ${size} directions`),
    stem: `directions-layer-${layer}-${module}`.replace(/[^\w-]+/g, "_"),
    drawing: heatmap({
      rows: overlap.rows, columns: overlap.columns, height: 180, low: "0", high: "1",
      label: `Heat map of the absolute cosines between the leading ${size} right singular vectors of both task vectors; the largest is ${fixed(best, 2)}.`,
      yNames: ["MLLM 1", String(overlap.rows)],
      xTicks: [{ at: 0, text: "math 1" }, { at: 1 - 1 / overlap.columns, text: String(overlap.columns) }],
      share: (row, column) => cosines[row][column],
      words: (row, column) => `Direction ${row + 1} of the MLLM, ${column + 1} of the math model: cosine ${fixed(cosines[row][column])}`,
    }),
    rows: () => cosines.flatMap((row, i) => row.map((cosine, j) => ({ layer, module, mllm: i + 1, math: j + 1, cosine }))),
    columns: [["mllm", String], ["math", String], ["cosine", (value) => fixed(value)]],
  })];
}

/** @param {LayerRecord} record */
function missing({ spectra }) {
  if (!spectra) {
    return [node("p", { class: "lm-hint lm-figure-wide" }, "This pair was analysed by an earlier version, which stored only samples of each spectrum. Analyse it again for all singular values, those of the base, and the cosines of the leading directions.")];
  }
  if (spectra.base) return [];
  return [node("p", { class: "lm-hint lm-figure-wide" }, "The spectrum of the base is not part of an analysis of leading directions.")];
}
