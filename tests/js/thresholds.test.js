// @ts-check
// Whatever is said of a threshold is true when the printed number is typed back.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { gunzipSync } from "node:zlib";

import { edgeCounts, nothingPieces } from "../../ipmerge_core/ui/explore/layer_map/sentence.js";
import { plainText, verdictText, whyText } from "../../ipmerge_core/ui/explore/layer_map/why.js";
import { DEFAULT_PLAN, MEASURES } from "../../ipmerge_core/ui/web/plan.js";
import { indexPack, previewOf } from "../../ipmerge_core/ui/web/preview.js";
import { above, atLeast, atMost, comparedTexts, thresholdText } from "../../ipmerge_core/ui/web/thresholds.js";
import { makePack, randomNumbers } from "./packs.js";

/** @import { Cell, Index, Measure, Plan } from "../../ipmerge_core/ui/web/types.d.ts" */
/** @import { State } from "../../ipmerge_core/ui/explore/layer_map/types.d.ts" */

const demo = JSON.parse(gunzipSync(readFileSync(new URL("../../assets/demo/pack.json.gz", import.meta.url))).toString());
const PACKS = [demo, ...[1, 2, 3].map((seed) => makePack({ layers: 8, experts: 1 + (seed % 2), seed }).pack)];

/**
 * What the texts read of the map's state.
 *
 * @param {Index} index
 * @param {Partial<Plan>} plan
 * @returns {State}
 */
function stateOf(index, plan) {
  return /** @type {State} */ (/** @type {unknown} */ ({ index, pack: index.pack, plan: { ...DEFAULT_PLAN, ...plan }, expert: -1 }));
}

/** @type {(visit: (index: Index, similarity: Measure, cell: Cell) => void) => void} */
function everyMatrix(visit) {
  for (const index of PACKS.map(indexPack)) {
    for (const similarity of MEASURES) for (const cell of index.cells) visit(index, similarity, cell);
  }
}

/**
 * Whether a matrix merges at the threshold that follows a sign in a text.
 *
 * @param {Index} index
 * @param {Cell} cell
 * @param {Partial<Plan>} plan
 */
function mergesAt(index, cell, plan) {
  return previewOf(index, { ...DEFAULT_PLAN, ...plan }).masks[cell.position].length > 0;
}

/**
 * @param {string} text
 * @param {RegExp} pattern
 */
function typed(text, pattern) {
  const found = text.match(pattern)?.[1];
  assert.ok(found, text);
  return Number(found);
}

test("a matrix that is kept merges at the named threshold", () => {
  everyMatrix((index, similarity, cell) => {
    for (const text of [verdictText, whyText].map((words) => words(stateOf(index, { s: 1, similarity }), cell))) {
      if (text.startsWith("Merged") || text.includes("is merged")) continue;
      assert.ok(mergesAt(index, cell, { s: typed(text, /Merged for Sα ≤ ([\d.]+\d)/), similarity }), text);
    }
  });
});

test("a matrix that merges is kept above the named threshold", () => {
  everyMatrix((index, similarity, cell) => {
    const text = whyText(stateOf(index, { s: 0, similarity }), cell), named = typed(text, /Kept for Sα > ([\d.]+\d)/);
    assert.ok(named >= 1 || !mergesAt(index, cell, { s: named + 1e-9, similarity }), text);
  });
});

test("a comparison in a text is true of the numbers in it, in plain words too", () => {
  everyMatrix((index, similarity, cell) => {
    const value = Math.max(...cell.experts.map((record) => record.similarity[similarity]));
    for (const s of [value, value + 1e-6, value - 1e-6, value + 1e-4].map((each) => Math.min(1, Math.max(0, each)))) {
      const state = stateOf(index, { s, similarity }), plain = plainText(state, cell);
      const [, left, right] = plain.match(/similarity of ([\d.]+\d) .*threshold ([\d.]+\d)/) ?? [];
      assert.equal(Number(left) >= Number(right), value >= s, plain);
      const [, a, sign, b] = whyText(state, cell).match(/because ([\d.]+\d) ([≥<]) Sα ([\d.]+\d)/) ?? [];
      assert.equal(sign === "≥", Number(a) >= Number(b));
      assert.equal(sign === "≥", value >= s);
    }
  });
});

test("nothing merges above the number that the sentence names", () => {
  for (const index of PACKS.map(indexPack)) {
    for (const similarity of MEASURES) {
      const text = nothingPieces(stateOf(index, { s: 1, similarity })).map(String).join("");
      if (!text.includes("above")) continue;
      const s = Math.min(1, typed(text, /above ([\d.]+\d)/) + 1e-9);
      assert.equal(previewOf(index, { ...DEFAULT_PLAN, s, similarity }).selected.length, 0);
    }
  }
});

test("as many matrices join and leave as are said to, if the step is typed", () => {
  for (const index of PACKS.map(indexPack)) {
    for (let place = 2; place <= 98; place++) {
      const s = place / 100, plan = { ...DEFAULT_PLAN, s }, now = previewOf(index, plan).selected.length;
      const { joins, leaves } = edgeCounts({ index, plan });
      /** @param {number} to */
      const at = (to) => previewOf(index, { ...plan, s: Number(to.toFixed(2)) }).selected.length;
      assert.deepEqual([joins, leaves], [at(s - 0.01) - now, now - at(s + 0.01)]);
    }
  }
});

test("rounding goes to the side that is asked for, also where a product of decimals is not exact", () => {
  const random = randomNumbers(5);
  const values = [0, 1, 0.3, 0.4139, 0.41398, 0.29, 0.57, 1.005, ...Array.from({ length: 2000 }, random)];
  for (const x of values) {
    for (const digits of [2, 3, 4]) {
      const [low, high, over] = [atMost(x, digits), atLeast(x, digits), above(x, digits)], step = 10 ** -digits;
      assert.ok(low <= x && x - low < step && Number(low.toFixed(digits)) === low, `${x}`);
      assert.ok(high >= x && high - x < step && Number(high.toFixed(digits)) === high, `${x}`);
      assert.ok(over > x && over - x <= step * 1.001, `${x}`);
    }
    assert.equal(Number(thresholdText(x)), x);
  }
  assert.deepEqual([thresholdText(0.4), thresholdText(1), thresholdText(0.41398)], ["0.400", "1.000", "0.41398"]);
  assert.deepEqual(comparedTexts(0.41398, 0.414), ["0.41398", "0.41400"]);
  assert.deepEqual(comparedTexts(0.5, 0.5), ["0.500", "0.500"]);
});
