// @ts-check
// The lists above the map: presets and kept plans with their source, measure, update and expert. The
// simple layout shows only those that differ from the usual, so that nothing is hidden that decides.

import { node, part, parts, setText } from "../../web/dom.js";
import { bytes, percent } from "../../web/format.js";
import { keptPlans } from "../../web/memory.js";
import {
  cleanPlan, complementAt, DEFAULT_PLAN, hasUpdate, keptOf, MEASURES, samePlan, shareOf, truncationAt, USUAL_KEPT,
  USUAL_SHARE, VARIANTS,
} from "../../web/plan.js";
import { shareInside } from "../../web/preview.js";
import { quantitiesOf } from "../../web/quantities.js";
import { LAMBDA_STEPS, LAMBDA_TICKS, lambdaPosition } from "../../web/scales.js";
import { expertName, MEASURE_LABELS, variantLabel } from "../../web/words.js";
import { buildTicks } from "./dials.js";
import { buildTables } from "./map_tables.js";

/** @import { Index, Preset, Variant } from "../../web/types.d.ts" */
/** @import { LayerMap } from "./map.js" */
/** @import { State } from "./types.d.ts" */

/** @param {[string, string][]} entries Of values and texts. */
function options(entries) {
  return entries.map(([value, text]) => node("option", { value }, text));
}

/**
 * Fill the lists for a pair that has just been opened.
 *
 * @param {LayerMap} map
 */
export function buildPicks(map) {
  const { dom: { pick }, state: { index, pack } } = map;
  buildPresets(map);
  pick.similarity.replaceChildren(...options(MEASURES.map((value) => [value, MEASURE_LABELS[value]])));
  pick.quantity.replaceChildren(...options(quantitiesOf(pack.records).map(({ key, label }) => [key, label])));
  pick.variant.replaceChildren(...options(variantsOf(index)));
  pick.expert.replaceChildren(...options([["-1", "all, highest"],
    ...Array.from({ length: index.nExperts }, (_, k) => /** @type {[string, string]} */ ([String(k), expertName(pack, k)]))]));
  buildTicks(map.find("[data-ticks=s]"), [0, 0.2, 0.4, 0.6, 0.8, 1].map((at) => (
    { at, text: Number.isInteger(at) ? String(at) : at.toFixed(1) })));
  buildTicks(map.find("[data-ticks=lambda]"), LAMBDA_TICKS.map(([lambda, text]) => (
    { at: lambdaPosition(lambda) / LAMBDA_STEPS, text: lambda === 1 ? "1 paper" : text, strong: lambda === 1 })));
  buildTables(map);
}

const COMPLEMENT = "complement", TRUNCATED = "truncated";

/**
 * The updates that the records of a pair have; the complements are one choice, with a slider, and so are truncations.
 *
 * @param {Index} index
 * @returns {[string, string][]}
 */
function variantsOf(index) {
  const plain = VARIANTS.filter((variant) => shareOf(variant) === null && keptOf(variant) === null && hasUpdate(index, variant));
  const cut = hasUpdate(index, truncationAt(USUAL_KEPT));
  const off = hasUpdate(index, complementAt(USUAL_SHARE));
  return [...plain.map((variant) => /** @type {[string, string]} */ ([variant, variantLabel(variant)])),
    .../** @type {[string, string][]} */ (off ? [[COMPLEMENT, "complement: off the MLLM's directions"]] : []),
    .../** @type {[string, string][]} */ (cut ? [[TRUNCATED, "truncated: leading directions of the math change"]] : [])];
}

/**
 * The update that a choice stands for.
 *
 * @param {string} value
 */
export function variantOf(value) {
  if (value === TRUNCATED) return truncationAt(USUAL_KEPT);
  return value === COMPLEMENT ? complementAt(USUAL_SHARE) : /** @type {Variant} */ (value);
}

/**
 * How many directions a complement leaves out of each matrix, and how much of the experts' changes.
 *
 * @param {State} state
 * @param {number} share In percent.
 */
function leftOutWords({ index }, share) {
  const records = index.cells.flatMap((cell) => cell.experts);
  const counts = records.flatMap((record) => record.left_out?.[share / 5 - 1] ?? []).sort((a, b) => a - b);
  const whole = records.reduce((sum, { math_norm2 }) => sum + math_norm2, 0);
  const inside = records.reduce((sum, record) => sum + (shareInside(record, share) ?? 0) * record.math_norm2, 0);
  const [low, high] = [counts[0] ?? 0, counts[counts.length - 1] ?? 0];
  return `${share} % of the MLLM's energy: ${low === high ? low : `${low} to ${high}`} directions of a matrix, `
    + `with ${percent(whole > 0 ? inside / whole : 0)} of the math change`;
}

/**
 * How many directions a truncation keeps of each matrix, and the size of the adapter that holds them.
 *
 * @param {State} state
 * @param {number} share In percent.
 */
function keptWords({ index }, share) {
  const records = index.cells.flatMap((cell) => cell.experts);
  const counts = records.map((record) => record.kept_directions?.[share / 5 - 1] ?? 0).sort((a, b) => a - b);
  const [low, high] = [counts[0] ?? 0, counts[counts.length - 1] ?? 0], rank = high * index.nExperts;
  const size = index.cells.reduce((sum, { experts: [{ shape }] }) => sum + 4 * rank * (shape[0] + shape[1]), 0);
  return `${share} % of the math change's energy: ${low === high ? low : `${low} to ${high}`} directions of a matrix; `
    + `as an adapter of all matrices, rank ${rank}, ${bytes(size)}`;
}

/**
 * What can be chosen under Preset.
 *
 * @param {Pick<State, "presets" | "kept">} state
 * @returns {Preset[]}
 */
export function entriesOf({ presets, kept }) {
  return [...presets, ...kept];
}

/**
 * The plan of an entry; presets have no overrides.
 *
 * @param {State} state
 * @param {Pick<Preset, "plan" | "kept">} entry
 */
export function planOf({ index }, entry) {
  return cleanPlan(entry.kept ? entry.plan : { ...entry.plan, overrides: {} }, index);
}

/** @param {State} state */
export function keptHere({ kept, plan }) {
  return kept.findIndex((entry) => samePlan(entry.plan, plan));
}

/** @param {LayerMap} map */
export function buildPresets(map) {
  map.set({ kept: keptPlans(map.state.packId, map.state.index) });
  const { presets, kept } = map.state;
  /**
   * @param {Preset[]} from
   * @param {number} first
   */
  const list = (from, first) => options(from.map(({ label }, i) => [String(first + i), label]));
  map.dom.pick.preset.replaceChildren(...list(presets, 0),
    ...(kept.length ? [node("optgroup", { label: "Kept by you" }, ...list(kept, presets.length))] : []),
    ...options([["edited", "Edited"]]));
}

/** @param {LayerMap} map */
export function paintChoices(map) {
  const { dom: { pick }, state: { plan, past, future, expert, quantity, index, layout } } = map, simple = layout === "simple";
  pick.similarity.value = plan.similarity;
  const left = shareOf(plan.variant), kept = keptOf(plan.variant);
  pick.variant.value = left !== null ? COMPLEMENT : kept !== null ? TRUNCATED : plan.variant;
  show(map.dom.energy, left !== null || kept !== null);
  show(map.dom.number.budget, !simple || plan.budget > 0);
  pick.expert.value = String(expert);
  pick.quantity.value = quantity.key;
  show(pick.quantity, !simple || quantity.key !== "similarity");
  show(pick.similarity, !simple || plan.similarity !== DEFAULT_PLAN.similarity);
  show(pick.variant, !simple || plan.variant !== DEFAULT_PLAN.variant);
  show(pick.expert, index.nExperts > 1 && (!simple || expert >= 0));
  for (const button of parts(map.element, "[data-act=layout]")) {
    button.setAttribute("aria-pressed", String(button.dataset.layout === layout));
  }
  part(map.element, "[data-act=undo]", HTMLButtonElement).disabled = !past.length;
  part(map.element, "[data-act=redo]", HTMLButtonElement).disabled = !future.length;
  paintPreset(map);
}

/**
 * The slider of a complement or a truncation, which also follows a drag.
 *
 * @param {LayerMap} map
 */
export function paintEnergy({ dom: { energy, energyLabel, leftOut }, state }) {
  const left = shareOf(state.plan.variant), kept = keptOf(state.plan.variant), share = left ?? kept;
  if (share === null) return;
  setText(energyLabel, left === null ? "Kept" : "Left out");
  energy.max = left === null ? "95" : "100";
  energy.value = String(share);
  const words = left === null ? keptWords(state, share) : leftOutWords(state, share);
  energy.setAttribute("aria-valuetext", words);
  setText(leftOut, words);
}

/**
 * @param {HTMLElement} field
 * @param {boolean} isShown With its label.
 */
function show(field, isShown) {
  if (field.parentElement) field.parentElement.hidden = !isShown;
}

/** @param {LayerMap} map */
export function paintPreset(map) {
  const { preset } = map.dom.pick, entries = entriesOf(map.state);
  const exact = entries.findIndex((entry) => samePlan(planOf(map.state, entry), map.state.plan));
  if (exact >= 0) map.set({ preset: exact });
  const base = map.state.preset !== null ? entries[map.state.preset] : undefined;
  const edited = part(preset, "[value=edited]");
  preset.value = exact >= 0 ? String(exact) : "edited";
  setText(edited, base && exact < 0 ? `${base.label}, edited` : "Edited");
  edited.hidden = exact >= 0;
  setText(map.dom.source, exact >= 0 ? entries[exact].source : editedWords(map.state, base));
  setText(map.find("[data-act=keep-plan]"), keptHere(map.state) >= 0 ? "Forget plan" : "Keep plan");
}

const PARTS = /** @type {const} */ ([["s", "Sα"], ["lambda", "λ"], ["similarity", "the similarity measure"], ["variant", "the update"], ["budget", "the budget"]]);

/**
 * How the plan on show differs from the entry that it started from.
 *
 * @param {State} state
 * @param {Preset | undefined} base
 */
function editedWords(state, base) {
  if (!base) return "";
  const { plan } = state, from = planOf(state, base);
  /** @type {string[]} */
  const changed = PARTS.filter(([key]) => plan[key] !== from[key]).map(([, name]) => name);
  if (JSON.stringify(Object.entries(plan.overrides).sort()) !== JSON.stringify(Object.entries(from.overrides).sort())) changed.push("the overrides");
  return `Edited: differs from “${base.label}” in ${changed.join(", ")}.`;
}
