// @ts-check
// Spectra of the chosen matrix: singular values, corresponding and principal angles (a pinned matrix in
// thin lines with them), the same singular values for every layer of its module, one small panel each,
// and heat maps. Tables have every value of the pack; lines are drawn through as many as are visible.

import { node, shape } from "../../web/dom.js";
import { fixed, scientific } from "../../web/format.js";
import { BAND } from "../../web/grid.js";
import { cellAt, expertInView } from "../../web/preview.js";
import { drawnPlaces, heldWords, singularValues } from "../../web/spectrum.js";
import { figure } from "../../web/tables.js";
import { heatFigures } from "./heatmaps.js";
import { lineChart, polyline } from "./lines.js";

/** @import { Cell, LayerRecord, Row, SingularValues } from "../../web/types.d.ts" */
/** @import { LayerMap } from "./map.js" */

const PANEL = 100, GAP = 8, PANEL_HEIGHT = 54;
const LINE_POINTS = 400, PANEL_POINTS = 60;
/** @typedef {{ mllm: SingularValues, math: SingularValues }} Both */

/** @type {WeakMap<Element, Cell>} */
const panels = new WeakMap();

/**
 * The matrix of a panel of the small multiples.
 *
 * @param {Element | null} panel
 */
export function cellOfPanel(panel) {
  return panel ? panels.get(panel) : undefined;
}

/** @param {LayerMap} map */
export function buildSpectra(map) {
  const { spectra } = map.dom, { layout, target, pinned } = map.state;
  const cell = target?.kind === "cell" && target.cell.members.length === 1 ? target.cell : null;
  const records = [cell, pinned !== cell ? pinned : null].flatMap((each) => sampled(map, each));
  const [record] = records;
  spectra.hidden = layout === "simple" || record === undefined || record.name !== cell?.name;
  if (spectra.hidden) {
    spectra.replaceChildren();
    return;
  }
  const columns = getComputedStyle(spectra).gridTemplateColumns.split(" ").length;
  const width = Math.max(240, (spectra.clientWidth - 24 * (columns - 1)) / columns);
  const ofModule = recordsOfModule(map, record);
  spectra.replaceChildren(sigmaFigure(map, records, width), angleFigure(records, width), ...multiples(map, record, ofModule),
    ...heatFigures(record, ofModule.map(({ record: own }) => own)),
    map.host.server?.report_file ? node("p", { class: "lm-acts lm-figure-wide" }, largeFigureButton(map)) : "");
}

/**
 * The record in view of a cell, where it has samples.
 *
 * @param {LayerMap} map
 * @param {Cell | null} cell
 */
function sampled(map, cell) {
  if (!cell) return [];
  const record = cell.experts[expertInView(map.state, cell)];
  return record.index?.length ? [record] : [];
}

/** @param {LayerRecord} record */
function placeOf(record) {
  return `layer ${record.layer} · ${record.module}`;
}

/**
 * The spectra of both task vectors; a record that is shown has them.
 *
 * @param {LayerRecord} record
 * @returns {Both}
 */
function spectraOf(record) {
  const [mllm, math] = [singularValues(record, "mllm"), singularValues(record, "math")];
  if (!mllm || !math) throw new TypeError(`${record.name} has no spectrum.`);
  return { mllm, math };
}

/**
 * Every value that the pack has, by rank.
 *
 * @param {LayerRecord} record
 * @returns {Row[]}
 */
function sigmaRows(record) {
  const { layer, module } = record, { mllm, math } = spectraOf(record);
  return mllm.ranks.map((rank, i) => (
    { layer, module, rank, MLLM: mllm.values[i], math: math.values[i], values: mllm.values.length, possible: mllm.possible }));
}

/**
 * The points of a line, as many as are visible.
 *
 * @param {SingularValues} found
 * @param {number} most
 */
function drawnPoints({ ranks, values }, most) {
  const places = drawnPlaces(values.length, most);
  return { index: places.map((i) => ranks[i]), values: places.map((i) => values[i]) };
}

/** @param {string} text */
function fileName(text) {
  return text.replace(/[^\w-]+/g, "_");
}

/**
 * @param {LayerMap} map
 * @param {LayerRecord[]} records
 * @param {number} width
 */
function sigmaFigure(map, records, width) {
  const [record, pinned] = records;
  return figure({
    heading: `Singular values, ${placeOf(record)}: ${heldWords(spectraOf(record).mllm)}`, stem: fileName(`sigma-layer-${record.layer}-${record.module}`),
    extra: node("span", { class: "lm-figure-key" }, node("span", { class: "k-mllm" }, "━ MLLM"), node("span", { class: "k-math" }, "╍ math"),
      pinned ? node("span", {}, `thin: ${placeOf(pinned)}`) : null, scaleSwitch(map)),
    summary: sigmaWords(record) + (pinned ? ` Pinned: ${sigmaWords(pinned)}` : ""),
    rows: () => records.flatMap(sigmaRows),
    columns: [["rank", String], ["MLLM", scientific], ["math", scientific], ["layer", String], ["module", String]],
    drawing: lineChart({
      width, log: map.state.sigmaScale !== "linear",
      series: records.flatMap((r, i) => [
        { ...drawnPoints(spectraOf(r).mllm, LINE_POINTS), style: `lm-keep${i ? " thin" : ""}` },
        { ...drawnPoints(spectraOf(r).math, LINE_POINTS), style: `lm-absorb${i ? " thin" : ""}` }]),
      marks: [{ value: record.noise_floor, text: "rounding of the stored weights" }] }),
  });
}

/**
 * @param {LayerRecord[]} records
 * @param {number} width
 */
function angleFigure(records, width) {
  const [record, pinned] = records;
  return figure({
    heading: `Corresponding angles sᵢ: ${record.index.length} samples`, stem: fileName(`angles-layer-${record.layer}-${record.module}`),
    extra: node("span", { class: "lm-figure-key" }, node("span", {}, "◇ best"), node("span", {}, "◆ first k directions, principal")),
    summary: angleWords(record) + (pinned ? ` Pinned: ${angleWords(pinned)}` : ""),
    rows: () => records.flatMap(angleRows),
    columns: [["rank", String], ["kind", String], ["cosine", (v) => fixed(v)], ["layer", String], ["module", String]],
    drawing: lineChart({
      width, log: false, top: 1,
      series: records.map((r, i) => ({ index: r.index, values: r.angles, style: `lm-angle${i ? " thin" : ""}` })),
      dots: [...principalDots(record), {
        at: record.best_index, value: record.similarity.max, style: "lm-best",
        text: `best: ${fixed(record.similarity.max)} at rank ${record.best_index}` }],
      marks: [{ value: record.chance?.max, text: "chance of the best" }, { value: record.chance?.first, text: "chance of one" }] }),
  });
}

/** @param {LayerRecord} record */
function angleRows({ layer, module, index, angles, principal }) {
  return [
    ...index.map((rank, i) => ({ layer, module, rank, kind: "corresponding", cosine: angles[i] })),
    ...Object.entries(principal || {}).map(([k, cosine]) => (
      { layer, module, rank: Number(k), kind: "principal, first k", cosine }))];
}

/** @param {LayerRecord} record */
function principalDots({ index, principal }) {
  const last = index[index.length - 1];
  return Object.entries(principal || {}).map(([k, value]) => (
    { at: Number(k), value, style: "lm-principal", text: `first ${k} directions: mean principal cosine ${fixed(value)}` }))
    .filter(({ at }) => at <= last);
}

/** @param {LayerRecord} r */
function sigmaWords(r) {
  const { mllm, math } = spectraOf(r);
  return `Singular values of ${placeOf(r)}: the MLLM's task vector falls from ${scientific(mllm.values[0])} to ${scientific(mllm.values.at(-1))}, ` +
    `the math model's from ${scientific(math.values[0])} to ${scientific(math.values.at(-1))}, over ${mllm.computed} ranks${exactSums(mllm, math)}.`;
}

/**
 * The sums that an analysis computes from the exact values.
 *
 * @param {SingularValues} mllm
 * @param {SingularValues} math
 */
function exactSums({ stored }, { stored: other }) {
  if (!stored || !other) return "";
  return `; the sum of σ is ${scientific(stored.total)} and ${scientific(other.total)}, of σ² ${scientific(stored.squares)} and ${scientific(other.squares)}`;
}

/** @param {LayerRecord} r */
function angleWords(r) {
  const chance = r.chance?.max;
  const level = Number.isFinite(chance) ? `, where unrelated matrices reach about ${fixed(chance)}` : "";
  return `Cosines of corresponding singular vectors of ${placeOf(r)}: ${fixed(r.angles[0])} at rank 1, ` +
    `best ${fixed(r.similarity.max)} at rank ${r.best_index}${level}.`;
}

/** @param {LayerMap} map */
function scaleSwitch(map) {
  return node("span", { class: "lm-seg lm-mini", role: "group", "aria-label": "Scale of the singular values" },
    ...["log", "linear"].map((scale) => node("button", { type: "button", "data-act": "sigma-scale", "data-scale": scale,
      "aria-pressed": String(map.state.sigmaScale === scale) }, scale)));
}

/** @param {LayerMap} map */
function largeFigureButton(map) {
  const { large } = map.state;
  return node("button", { type: "button", class: "lm-quiet", "data-act": "large", "aria-pressed": String(large) },
    large ? "Hide the large figure" : "Large figure, with values on hover");
}

/**
 * One panel per layer, all on the same logarithmic axes; a click chooses that layer's matrix. On narrow
 * pages the panels wrap, seven in a row. (The map's own cells are the keyboard's way to choose.)
 *
 * @param {LayerMap} map
 * @param {LayerRecord} record
 * @param {ReturnType<typeof recordsOfModule>} found
 */
function multiples(map, record, found) {
  const { index: { layers }, narrow } = map.state;
  if (layers.length < 2) return [];
  const perRow = narrow ? 7 : Math.min(layers.length, BAND), rows = Math.ceil(layers.length / perRow);
  const svg = shape("svg", { viewBox: `0 0 ${perRow * PANEL} ${rows * PANEL_HEIGHT}`, preserveAspectRatio: "none", class: "lm-multiples" });
  svg.style.height = `${rows * PANEL_HEIGHT}px`;
  const known = found.map(({ record: own }) => own), range = logRange(known);
  for (const { cell, at, record: own } of found) {
    const panel = sigmaPanel(own, (at % perRow) * PANEL, Math.floor(at / perRow) * PANEL_HEIGHT, range);
    if (own === record) panel.classList.add("chosen");
    panels.set(panel, cell);
    svg.append(panel);
  }
  const firsts = known.map((r) => spectraOf(r).mllm.values[0]);
  return [figure({
    heading: `Singular values of ${record.module} in every layer, same axes`, wide: true, drawing: svg,
    stem: fileName(`sigma-of-all-${record.module}`),
    summary: `Singular values of ${record.module} in ${known.length} layers. The MLLM's largest is between ${scientific(Math.min(...firsts))} and ${scientific(Math.max(...firsts))}.`,
    rows: () => known.flatMap(sigmaRows),
    columns: [["layer", String], ["rank", String], ["MLLM", scientific], ["math", scientific]],
  })];
}

/**
 * The records of a module in all layers, with the place of their panel.
 *
 * @param {LayerMap} map
 * @param {LayerRecord} record
 */
function recordsOfModule(map, { module, expert }) {
  const { index } = map.state;
  return index.layers.flatMap((layer, at) => {
    const cell = cellAt(index, layer, module);
    const own = cell?.experts[Math.min(expert, cell.experts.length - 1)];
    return cell && own?.index?.length ? [{ cell, at, record: own }] : [];
  });
}

/**
 * The logarithms between which all singular values are drawn, at most five decades.
 *
 * @param {LayerRecord[]} records
 */
function logRange(records) {
  const ends = records.flatMap((r) => Object.values(spectraOf(r)).flatMap(({ values }) => (
    [values[0], values.findLast((v) => v > 0) ?? values[0]])));
  const high = Math.log(Math.max(...ends, 1e-300));
  return { high, low: Math.max(Math.log(Math.max(Math.min(...ends), 1e-300)), high - Math.log(1e5)) };
}

/**
 * @param {LayerRecord} r
 * @param {number} left
 * @param {number} top
 * @param {{ low: number, high: number }} range
 */
function sigmaPanel(r, left, top, { low, high }) {
  const { mllm, math } = spectraOf(r), last = Math.log(mllm.computed) || 1;
  /** @param {number[]} values */
  const ys = (values) => values.map((v) => {
    const share = (Math.max(Math.log(Math.max(v, 1e-300)), low) - low) / (high - low || 1);
    return top + PANEL_HEIGHT - 5 - share * (PANEL_HEIGHT - 12);
  });
  /** @param {SingularValues} found */
  const line = (found) => {
    const { index, values } = drawnPoints(found, PANEL_POINTS);
    return polyline(index.map((rank) => left + GAP + (Math.log(rank) / last) * (PANEL - 2 * GAP)), ys(values));
  };
  return shape("g", { class: "lm-panel" },
    shape("rect", { x: left + 3, width: PANEL - 6, y: top + 2, height: PANEL_HEIGHT - 4, rx: 2 }),
    shape("path", { class: "lm-keep", d: line(mllm) }),
    shape("path", { class: "lm-absorb", d: line(math) }),
    shape("title", {}, `Layer ${r.layer}, ${r.module}`));
}
