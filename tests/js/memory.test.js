// @ts-check
import assert from "node:assert/strict";
import { beforeEach, test } from "node:test";

import { keepPlans, KEPT_EVENT, keptPlans, MEMORY, recall, remember } from "../../ipmerge_core/ui/web/memory.js";
import { DEFAULT_PLAN } from "../../ipmerge_core/ui/web/plan.js";
import { indexPack } from "../../ipmerge_core/ui/web/preview.js";
import { makePack } from "./packs.js";

const index = indexPack(makePack().pack);
/** @type {Map<string, string>} */
const stored = new Map();
/** @type {string[]} */
const events = [];

/** @param {boolean} isClosed */
function setWindow(isClosed) {
  const localStorage = {
    getItem: (/** @type {string} */ key) => { if (isClosed) throw new Error("closed"); return stored.get(key) ?? null; },
    setItem: (/** @type {string} */ key, /** @type {string} */ value) => { if (isClosed) throw new Error("closed"); stored.set(key, value); },
  };
  Object.assign(globalThis, { window: { localStorage, dispatchEvent: (/** @type {Event} */ { type }) => events.push(type) } });
}

beforeEach(() => {
  stored.clear();
  setWindow(false);
});

test("what is remembered is there for the next visit", () => {
  remember("layout", "full");
  assert.equal(JSON.parse(String(stored.get(MEMORY))).layout, "full");
  stored.set(MEMORY, '{"layout": "simple"}');
  assert.equal(recall("layout", "full"), "simple");
  assert.equal(recall("never", 7), 7);
});

test("a closed storage lasts as long as the page", () => {
  setWindow(true);
  remember("dragged", true);
  assert.equal(recall("dragged", false), true);
});

test("kept plans come back cleaned, nine at most, and the page is told", () => {
  keepPlans("packs-a", Array.from({ length: 12 }, (_, i) => ({ ...DEFAULT_PLAN, s: i / 20 })));
  assert.deepEqual(events.splice(0), [KEPT_EVENT]);
  const kept = keptPlans("packs-a", index);
  assert.deepEqual(kept.map(({ plan }) => plan.s), [0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4]);
  assert.equal(kept[1].label, "2 · Sα 0.050, λ 1");
  assert.deepEqual(keptPlans("packs-b", index), []);
});

for (const damaged of ["", "null", "7", "[]", "{", '{"kept": 3}', '{"kept": {"packs-a": {"length": 2}}}']) {
  test(`storage that holds ${damaged || "nothing"} is survived`, () => {
    remember("kept", {});
    stored.set(MEMORY, damaged);
    assert.deepEqual(keptPlans("packs-a", index), []);
  });
}

test("damaged plans take their defaults", () => {
  stored.set(MEMORY, '{"kept": {"packs-a": [{"s": "<b>", "overrides": {"x": 1}}, null, 3]}}');
  assert.deepEqual(keptPlans("packs-a", index).map(({ plan }) => plan), [DEFAULT_PLAN, DEFAULT_PLAN, DEFAULT_PLAN]);
});
