// @ts-check
// The plan in the visitor's hand: set while dragging, committed when the hand lets go, undone and done
// again, also across a change of the pair.

import { setText } from "../../web/dom.js";
import { copyOf, LAMBDA_MAX, samePlan } from "../../web/plan.js";
import { flipValues, previewOf } from "../../web/preview.js";
import { refreshTables } from "../../web/tables.js";
import { rememberLink } from "./link.js";
import { describeDials, paintQuantity, rebuildColours, rescale } from "./painting.js";

/** @import { Plan } from "../../web/types.d.ts" */
/** @import { LayerMap } from "./map.js" */
/** @import { State, Step } from "./types.d.ts" */

/**
 * Change the plan on show; it is painted in the next frame.
 *
 * @param {LayerMap} map
 * @param {Partial<Plan>} patch
 */
export function setPlan(map, { s, lambda, ...rest }) {
  map.set({ plan: {
    ...map.state.plan, ...rest,
    ...(s === undefined ? {} : { s: Number(clamp(s, 1).toFixed(4)) }),
    ...(lambda === undefined ? {} : { lambda: clamp(lambda, LAMBDA_MAX) }),
  } });
}

/**
 * @param {number} value
 * @param {number} high
 */
function clamp(value, high) {
  return Math.max(0, Math.min(high, value));
}

/** @param {LayerMap} map */
export function startDrag(map) {
  if (map.state.dragging) return;
  map.set({ dragging: true, after: false, ghost: map.state.before });
  map.grid.paintGhost(map.state, map.state.ghost);
}

/**
 * The hand has let go: what it has left becomes a step of the history.
 *
 * @param {LayerMap} map
 * @param {string} [words] Announced before the sentence.
 */
export function commit(map, words = "") {
  map.set({ dragging: false, typing: null });
  const { plan, committed, past } = map.state;
  if (samePlan(plan, committed)) {
    map.painter.now();
    return;
  }
  map.set({ past: [...past, here(map.state)], future: [] });
  if (plan.s !== committed.s) map.tour.tick("s");
  if (plan.lambda !== committed.lambda) map.tour.tick("lambda");
  settle(map, words);
}

/**
 * Take the plan on show as the committed one: axes, marks, spoken sentence, one event to Python.
 *
 * @param {LayerMap} map
 * @param {string} [words]
 */
export function settle(map, words = "") {
  const { plan, committed, index, before } = map.state;
  map.set({ committed: copyOf(plan), flips: flipValues(index, plan), ghost: before });
  if (committed.similarity !== plan.similarity) rebuildColours(map);
  else if (map.state.quantity.key === "change") paintQuantity(map);
  rescale(map);
  map.painter.now();
  map.grid.paintGhost(map.state, before);
  map.set({ after: true, before: map.state.result });
  describeDials(map);
  refreshTables(map.element);
  rememberLink(map.state);
  setText(map.dom.note, "");
  setText(map.dom.status, `${words ? `${words} ` : ""}${map.dom.sum.textContent}`);
  map.outbox.post("commit", copyOf(plan));
}

/**
 * Start from the plan on show: committed, with nothing joined or left.
 *
 * @param {LayerMap} map
 */
export function begin(map) {
  const { plan, index } = map.state, result = previewOf(index, plan);
  map.set({ committed: copyOf(plan), result, before: result, ghost: result, flips: flipValues(index, plan) });
}

/**
 * The position in the history.
 *
 * @param {State} state
 * @returns {Step}
 */
export function here({ packId, committed }) {
  return { pack: packId, plan: committed };
}

/** @param {LayerMap} map */
export function undo(map) {
  const { past, future } = map.state;
  travel(map, past.at(-1), { past: past.slice(0, -1), future: [...future, here(map.state)] }, "Undone.", "Nothing to undo.");
}

/** @param {LayerMap} map */
export function redo(map) {
  const { past, future } = map.state;
  travel(map, future.at(-1), { past: [...past, here(map.state)], future: future.slice(0, -1) }, "Redone.", "Nothing to redo.");
}

/**
 * @param {LayerMap} map
 * @param {Step | undefined} step
 * @param {Pick<State, "past" | "future">} history After the step.
 * @param {string} done
 * @param {string} nothing
 */
function travel(map, step, history, done, nothing) {
  if (map.state.journey) return;
  if (!step) {
    setText(map.dom.status, nothing);
    return;
  }
  map.set(history);
  if (step.pack === map.state.packId) {
    map.set({ plan: step.plan });
    settle(map, done);
    return;
  }
  map.set({ journey: { ...step, words: done } }); // the plan waits until its pair has come
  map.host.trigger("packselect", { pack: step.pack });
}
