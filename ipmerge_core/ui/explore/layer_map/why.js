// @ts-check
// Why a matrix merges or is kept, computed from the live values: a technical text, and a plain
// one for the simple layout.

import { actionButton, node, setText } from "../../web/dom.js";
import { fixed, percent } from "../../web/format.js";
import { MEASURES } from "../../web/plan.js";
import { merges, previewOf, shownSimilarity } from "../../web/preview.js";
import { atLeast, atMost, comparedTexts, thresholdText } from "../../web/thresholds.js";
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
  const { s, similarity, overrides } = state.plan, value = shownSimilarity(state, cell);
  const override = overrides[cell.name], [text, threshold] = comparedTexts(value, s);
  if (override) return `Always ${override === "merge" ? "merged" : "kept"} (override). Similarity: ${fixed(value)}.`;
  return value >= s
    ? `Merged: ${MEASURE_LABELS[similarity]} is ${text} ≥ Sα ${threshold}.`
    : `Kept: ${MEASURE_LABELS[similarity]} is ${fixed(value)}. Merged for Sα ≤ ${thresholdText(atMost(value))}.`;
}

/**
 * The same for readers without a background in linear algebra.
 *
 * @param {State} state
 * @param {Cell} cell
 */
export function plainText(state, cell) {
  const { s, overrides } = state.plan, value = shownSimilarity(state, cell);
  const [text, threshold] = comparedTexts(value, s, 2);
  const override = overrides[cell.name];
  const alike = `The math model and the vision model changed this matrix in directions with a similarity of ${text} (0: unrelated, 1: identical).`;
  if (override) return `${alike} It is always ${override === "merge" ? "merged" : "kept"}, because you overrode the threshold.`;
  return value >= s
    ? `${alike} This reaches the threshold ${threshold}, so the math model's change is merged.`
    : `${alike} This is below the threshold ${threshold}, so the vision model's weights are kept.`;
}

/**
 * @param {State} state
 * @param {Cell} cell
 */
export function whyText(state, cell) {
  const { s, overrides } = state.plan, value = shownSimilarity(state, cell);
  const [text, threshold] = comparedTexts(value, s);
  const rank = `Rank ${rankOf(state, cell)} of ${state.index.cells.length}.`;
  if (overrides[cell.name]) {
    return `${title(cell)} has an override; without it, it would be ${value >= s ? `merged (${text} ≥` : `kept (${text} <`} Sα ${threshold}). ${rank}`;
  }
  return value >= s
    ? `${title(cell)} is merged because ${text} ≥ Sα ${threshold}. ${rank} Kept for Sα > ${thresholdText(atLeast(value))}.`
    : `${title(cell)} is kept because ${text} < Sα ${threshold}. ${rank} Merged for Sα ≤ ${thresholdText(atMost(value))}.`;
}

/**
 * The contribution of this matrix: the total change with and without it.
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
  return `${isOn ? "Without it" : "With it"} the total change would be ${without} of ‖W‖ instead of ${now}.`;
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
    return `${MEASURE_LABELS[similarity]} is ${fixed(value)}: ${value >= plan.s ? "merged" : "kept"}`;
  });
  return `With the other measures: ${words.join("; ")}.`;
}

/**
 * @param {State} state
 * @param {LayerRecord} record
 */
function chanceText({ plan }, record) {
  const chance = record.chance?.[plan.similarity];
  const level = Number.isFinite(chance) ? ` Chance level for unrelated matrices of this size: about ${fixed(chance, 2)}.` : "";
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
  const show = actionButton("show-flip", "Animate the threshold");
  live.add(() => { show.hidden = Boolean(map.state.plan.overrides[cell.name]); });
  /** @param {(result: Preview) => string} words */
  const line = (words) => {
    const made = node("p");
    live.add((result) => { if (!text.hidden) setText(made, words(result)); }); // no sums for hidden text
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
  return [node("p", {}, `The first two singular values differ by only ${percent(gap)}, so the choice of the first direction is unstable.`)];
}
