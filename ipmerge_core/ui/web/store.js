// @ts-check
// The state of a component: one frozen object that is replaced, never written to.

/** @import { Store } from "./types.d.ts" */

/**
 * Make a store. A field that the first state does not have can never be set, so that a misspelt one
 * fails where it is written.
 *
 * @template {object} State
 * @param {State} first
 * @returns {Store<State>}
 */
export function createStore(first) {
  let state = Object.freeze({ ...first });
  /** @type {Set<(state: Readonly<State>, before: Readonly<State>) => void>} */
  const listeners = new Set();

  /** @param {Partial<State>} patch */
  function set(patch) {
    const keys = /** @type {(keyof State)[]} */ (Object.keys(patch));
    const unknown = keys.find((key) => !(key in state));
    if (unknown !== undefined) throw new TypeError(`The state has no field "${String(unknown)}".`);
    if (keys.every((key) => Object.is(patch[key], state[key]))) return;
    const before = state;
    state = Object.freeze({ ...state, ...patch });
    for (const listener of listeners) listener(state, before);
  }

  return {
    get: () => state,
    set,
    subscribe(listener) {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },
  };
}
