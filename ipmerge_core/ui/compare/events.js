// @ts-check
// What a hand does in the comparison.

import { closest, part, parts } from "../web/dom.js";
import { targetOf } from "../web/grid.js";
import { lambdaText } from "../web/format.js";
import { isUsable, markUsable, markWrong } from "../web/number_field.js";
import { cleanPlan } from "../web/plan.js";
import { tableAction } from "../web/tables.js";
import { thresholdText } from "../web/thresholds.js";
import { differs, mirrored } from "./pairs.js";
import { withPlan } from "./sides.js";

/** @import { Target } from "../web/types.d.ts" */
/** @import { Compare } from "./compare.js" */
/** @import { Letter, Mode, Side } from "./types.d.ts" */

/** @param {Compare} compare */
export function listen(compare) {
  const { element } = compare;
  element.addEventListener("click", (event) => {
    const button = closest(event, "button");
    if (!button || tableAction(button)) return;
    const target = targetOf(button), { mode, act } = button.dataset;
    if (target) choose(compare, button, target);
    else if (mode) setMode(compare, button, /** @type {Mode} */ (mode));
    else if (act === "first") chooseFirst(compare);
  });
  element.addEventListener("change", ({ target }) => {
    if (target instanceof HTMLSelectElement || target instanceof HTMLInputElement) changePlan(compare, target);
  });
  element.addEventListener("keydown", (event) => {
    const button = event.target instanceof Element ? event.target : null;
    if (button && targetOf(button) && gridAround(compare, button).key(event)) event.preventDefault();
  });
}

/**
 * The side whose own map an element is in, where there are two.
 *
 * @param {Element} element
 * @returns {Letter | undefined}
 */
function letterAround(element) {
  const letter = element.closest("[data-grid]")?.getAttribute("data-grid");
  return letter === "a" || letter === "b" ? letter : undefined;
}

/**
 * @param {Compare} compare
 * @param {Element} element
 */
function gridAround({ both, grid }, element) {
  const letter = letterAround(element);
  return letter ? both.grids[letter] : grid;
}

/**
 * @param {Compare} compare
 * @param {HTMLElement} button
 * @param {Target} target
 */
function choose(compare, button, target) {
  const { sides } = compare.state;
  if (!sides) return;
  gridAround(compare, button).moveToButton(button);
  if (letterAround(button) === "b") compare.set({ target: mirrored(target, sides.b, sides.a), otherTarget: target });
  else compare.set({ target, otherTarget: mirrored(target, sides.a, sides.b) });
  if (compare.state.mode === "side") {
    compare.paint();
    return;
  }
  compare.grid.mark(target);
  compare.describe();
}

/** @param {Compare} compare */
function chooseFirst(compare) {
  const { pairs, mode } = compare.state, first = pairs.find(differs);
  if (!first) return;
  const grid = mode === "side" ? compare.both.grids.a : compare.grid;
  choose(compare, grid.buttons[first.cell.position], { kind: "cell", cell: first.cell });
}

/**
 * @param {Compare} compare
 * @param {HTMLElement} button
 * @param {Mode} mode
 */
function setMode(compare, button, mode) {
  compare.set({ mode, target: null, otherTarget: null });
  for (const each of parts(compare.element, "[data-mode]")) each.setAttribute("aria-pressed", String(each === button));
  compare.layOut();
}

/**
 * @param {Compare} compare
 * @param {HTMLSelectElement | HTMLInputElement} field
 */
function changePlan(compare, field) {
  const { dataset: { preset, s, lambda }, value } = field;
  const letter = preset ?? s ?? lambda, { sides } = compare.state;
  if (!sides || (letter !== "a" && letter !== "b")) return;
  const side = sides[letter];
  if (field instanceof HTMLInputElement && !checkNumber(compare, field, letter, side)) return;
  const plan = preset
    ? side.presets[Number(value)]?.plan ?? side.plan
    : cleanPlan({ ...side.plan, [s ? "s" : "lambda"]: value }, side.index);
  compare.set({ sides: { ...sides, [letter]: withPlan(side, plan) } });
  compare.paint();
}

/**
 * Whether a number can be used; says beside the field what is wrong with another.
 *
 * @param {Compare} compare
 * @param {HTMLInputElement} field
 * @param {Letter} letter
 * @param {Side} side
 */
function checkNumber({ element }, field, letter, { plan }) {
  const note = part(element, `[data-wrong=${letter}]`), isS = field.dataset.s !== undefined;
  if (isUsable(field)) {
    markUsable(field, note);
    return true;
  }
  markWrong(field, note, `${isS ? "Sα" : "λ"} of ${letter.toUpperCase()}`, isS ? thresholdText(plan.s) : lambdaText(plan.lambda));
  return false;
}
