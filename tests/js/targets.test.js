// @ts-check
import assert from "node:assert/strict";
import { test } from "node:test";

import { indexPack } from "../../ipmerge_core/ui/web/preview.js";
import { cellsOf, coversLayer, isChosen, rangeTo, sameTarget } from "../../ipmerge_core/ui/web/targets.js";
import { makePack } from "./packs.js";

/** @import { Target } from "../../ipmerge_core/ui/web/types.d.ts" */

const index = indexPack(makePack({ layers: 5 }).pack), [cell] = index.cells;
/** @type {Target} */
const RANGE = { kind: "range", from: 1, to: 3 };

test("a range runs from the lower to the higher layer, whichever came first", () => {
  assert.deepEqual(rangeTo(4, 2), { kind: "range", from: 2, to: 4, anchor: 2 });
  assert.deepEqual(rangeTo(1, 2), { kind: "range", from: 1, to: 2, anchor: 2 });
  assert.deepEqual(rangeTo(2, 2), { kind: "layer", layer: 2, anchor: 2 });
});

test("a target stands for its cells", () => {
  assert.deepEqual(cellsOf(index, { kind: "cell", cell }), [cell]);
  assert.deepEqual(cellsOf(index, { kind: "layer", layer: 2 }).map(({ layer }) => layer), new Array(7).fill(2));
  assert.deepEqual(cellsOf(index, { kind: "module", module: "up" }).map(({ layer }) => layer), [0, 1, 2, 3, 4]);
  assert.equal(cellsOf(index, RANGE).length, 21);
  assert.deepEqual(cellsOf(index, null), []);
});

test("a target covers its layers", () => {
  assert.deepEqual([0, 1, 3, 4].map((layer) => coversLayer(RANGE, layer)), [false, true, true, false]);
  assert.ok(coversLayer({ kind: "cell", cell }, 0) && !coversLayer({ kind: "cell", cell }, 1));
  assert.ok(!coversLayer({ kind: "module", module: "q" }, 0) && !coversLayer(null, 0));
});

test("targets are the same by what they name", () => {
  assert.ok(sameTarget({ kind: "layer", layer: 1, anchor: 1 }, { kind: "layer", layer: 1 }));
  assert.ok(sameTarget(RANGE, { ...RANGE, anchor: 3 }) && !sameTarget(RANGE, { kind: "range", from: 1, to: 4 }));
  assert.ok(!sameTarget({ kind: "layer", layer: 1 }, RANGE) && !sameTarget(RANGE, null));
  assert.ok(sameTarget({ kind: "module", module: "q" }, { kind: "module", module: "q" }));
  assert.ok(!sameTarget({ kind: "cell", cell }, { kind: "cell", cell: index.cells[1] }));
});

test("the heads inside a range are chosen with it", () => {
  assert.deepEqual([0, 1, 2, 3, 4].map((layer) => isChosen({ kind: "layer", layer }, RANGE)), [false, true, true, true, false]);
  assert.ok(!isChosen({ kind: "cell", cell: index.cells[8] }, RANGE) && !isChosen({ kind: "layer", layer: 1 }, null));
});
