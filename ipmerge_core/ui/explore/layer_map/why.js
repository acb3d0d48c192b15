// @ts-check
// Why a matrix merges or is kept, answered from the live values; in the field's words, and in plain
// ones for the simple layout.

import { actionButton, node, setText } from "../../web/dom.js";
import { fixed, percent } from "../../web/format.js";
import { MEASURES } from "../../web/plan.js";
import { merges, previewOf, shownSimilarity } from "../../web/preview.js";
import { MEASURE_LABELS, MEASURE_MEANING, title } from "../../web/words.js";

/** @import { Cell, LayerRecord, Preview } from "../../web/types.d.ts" */
/** @import { LiveTexts } from "./live.js" */
/** @import { LayerMap } from "./map.js" */
/** @import { State } from "./types.d.ts" */

/**
 * The place of a matrix in the order of similarities, from 1.
 *
 * @param {State} state
 * @param {Cell} cell
 */
function rankOf(state, cell) {
  const value = shownSimilarity(state, cell);
  return 1 + state.index.cells.filter((other) => shownSimilarity(state, other) > value).length;
}

/**
 * @param {State} state
 * @param {Cell} cell
 */
export function verdictText(state, cell) {
  const { s, similarity, overrides } = state.plan, value = shownSimilarity(state, cell), text = fixed(value);
  const override = overrides[cell.name];
  if (override) return `Always ${override === "merge" ? "merged" : "kept"}, by your choice. Its similarity is ${text}.`;
  return value >= s
    ? `Merges: ${MEASURE_LABELS[similarity]} is ${text}, at or above S_α ${fixed(s)}.`
    : `Kept: ${MEASURE_LABELS[similarity]} is ${text}. It needs S_α ≤ ${text} to merge.`;
}

/**
 * The same for someone who has never seen a weight matrix.
 *
 * @param {State} state
 * @param {Cell} cell
 */
export function plainText(state, cell) {
  const { s, overrides } = state.plan, value = shownSimilarity(state, cell), text = fixed(value, 2);
  const override = overrides[cell.name];
  const alike = `The math model and the vision model changed this matrix in directions that agree by ${text}, where 0 is unrelated and 1 the same.`;
  if (override) return `${alike} You have set it to ${override === "merge" ? "merge" : "stay"}, whatever the threshold says.`;
  return value >= s
    ? `${alike} That reaches the threshold ${fixed(s, 2)}, so the math model's change is merged into it.`
    : `${alike} That is below the threshold ${fixed(s, 2)}, so it stays as the vision model has it.`;
}

/**
 * @param {State} state
 * @param {Cell} cell
 */
function whyText(state, cell) {
  const { s, overrides } = state.plan, value = shownSimilarity(state, cell), text = fixed(value);
  const rank = `It ranks ${rankOf(state, cell)} of ${state.index.cells.length}.`;
  if (overrides[cell.name]) {
    return `${title(cell)} is set by hand; without that it would ${value >= s ? "merge" : "be kept"}, with ${text} against S_α ${fixed(s)}. ${rank}`;
  }
  return value >= s
    ? `${title(cell)} merges because ${text} ≥ S_α ${fixed(s)}. ${rank} It would leave above ${text}.`
    : `${title(cell)} is kept because ${text} < S_α ${fixed(s)}. ${rank} It would join at ${text}.`;
}

/**
 * What this matrix is worth to the whole: the change with and without it.
 *
 * @param {State} state
 * @param {Cell} cell
 * @param {Preview} result
 */
function shareText(state, cell, result) {
  const isOn = merges(state, result, cell);
  const overrides = { ...state.plan.overrides, [cell.name]: isOn ? /** @type {const} */ ("keep") : /** @type {const} */ ("merge") };
  const other = previewOf(state.index, { ...state.plan, overrides });
  const [without, now] = [other, result].map(({ relative_change: x }) => `${Number((100 * x).toPrecision(3))} %`);
  return `${isOn ? "Without it" : "With it"} the whole change would be ${without} of ‖W‖ instead of ${now}.`;
}

/**
 * What the other two measures would decide about it at the same threshold.
 *
 * @param {State} state
 * @param {Cell} cell
 */
function otherMeasures({ plan, expert }, cell) {
  const words = MEASURES.filter((measure) => measure !== plan.similarity).map((similarity) => {
    const value = shownSimilarity({ plan: { similarity }, expert }, cell);
    return `${MEASURE_LABELS[similarity]} is ${fixed(value)}: ${value >= plan.s ? "merges" : "kept"}`;
  });
  return `By the other measures: ${words.join("; ")}.`;
}

/**
 * @param {State} state
 * @param {LayerRecord} record
 */
function chanceText({ plan }, record) {
  const chance = record.chance?.[plan.similarity];
  const level = Number.isFinite(chance) ? ` Two unrelated matrices of this size reach about ${fixed(chance, 2)}.` : "";
  return `Similarity is ${MEASURE_MEANING[plan.similarity]}.${level}`;
}

/**
 * The buttons that set a matrix by hand, and what "Why?" unfolds.
 *
 * @param {LayerMap} map
 * @param {LiveTexts} live
 * @param {Cell} cell
 * @param {LayerRecord} record
 * @param {HTMLElement} buttons
 */
export function whyBlock(map, live, cell, record, buttons) {
  const text = node("div", { class: "lm-why", id: `${map.id}why`, hidden: "" });
  const button = actionButton("why", "Why?", { "aria-expanded": "false", "aria-controls": text.id });
  const show = actionButton("show-flip", "Show me the flip");
  live.add(() => { show.hidden = Boolean(map.state.plan.overrides[cell.name]); });
  /** @param {(result: Preview) => string} words */
  const line = (words) => {
    const made = node("p");
    live.add((result) => { if (!text.hidden) setText(made, words(result)); }); // no sums for what nobody reads
    return made;
  };
  text.append(
    line(() => whyText(map.state, cell)), line((result) => shareText(map.state, cell, result)),
    line(() => chanceText(map.state, record)), line(() => otherMeasures(map.state, cell)),
    ...gapWarning(record), show);
  return node("div", { class: "lm-whybox" }, node("div", { class: "lm-acts" }, buttons, button), text);
}

/** @param {LayerRecord} record */
function gapWarning({ gap }) {
  if (gap === null || !Number.isFinite(gap) || gap >= 0.05) return [];
  return [node("p", {}, `The first two singular values differ by only ${percent(gap)}, so which direction counts as the first is nearly a coin toss here.`)];
}
