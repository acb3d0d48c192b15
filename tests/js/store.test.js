// @ts-check
import assert from "node:assert/strict";
import { test } from "node:test";

import { createStore } from "../../ipmerge_core/ui/web/store.js";

test("set replaces fields and leaves what was read before alone", () => {
  const store = createStore({ s: 1, name: "a" }), before = store.get();
  store.set({ s: 2 });
  assert.deepEqual(store.get(), { s: 2, name: "a" });
  assert.equal(before.s, 1);
});

test("the state cannot be written to", () => {
  const store = createStore({ s: 1 });
  assert.throws(() => { /** @type {{ s: number }} */ (store.get()).s = 2; }, TypeError);
  store.set({ s: 3 });
  assert.throws(() => { /** @type {{ s: number }} */ (store.get()).s = 4; }, TypeError);
  assert.equal(store.get().s, 3);
});

test("the object that it was made from is not part of it", () => {
  const first = { s: 1 }, store = createStore(first);
  first.s = 7;
  assert.equal(store.get().s, 1);
});

test("a misspelt field is refused where it is written", () => {
  const store = createStore({ target: null });
  assert.throws(() => store.set(/** @type {object} */ ({ traget: 1 })), /no field "traget"/);
  assert.deepEqual(store.get(), { target: null });
});

test("subscribers get the new and the old state until they leave", () => {
  const store = createStore({ s: 1 });
  /** @type {[number, number][]} */
  const seen = [];
  const leave = store.subscribe((state, before) => seen.push([before.s, state.s]));
  store.set({ s: 2 });
  store.set({ s: 3 });
  leave();
  store.set({ s: 4 });
  assert.deepEqual(seen, [[1, 2], [2, 3]]);
});

test("nothing is said where nothing has changed", () => {
  const store = createStore({ s: NaN, plan: { s: 1 } }), { plan } = store.get();
  let calls = 0;
  store.subscribe(() => { calls += 1; });
  store.set({ s: NaN, plan });
  store.set({});
  assert.equal(calls, 0);
  store.set({ plan: { s: 1 } });
  assert.equal(calls, 1);
});

test("a subscriber may set and leave while it is called", () => {
  const store = createStore({ s: 1, double: 2 });
  const leave = store.subscribe((state) => {
    leave();
    store.set({ double: 2 * state.s });
  });
  store.set({ s: 5 });
  store.set({ s: 6 });
  assert.deepEqual(store.get(), { s: 6, double: 10 });
});
