// @ts-check
// What an evaluation leaves for the map: points of its dials, and a knock-out as quantities.

import assert from "node:assert/strict";
import { test } from "node:test";
import { knockoutOf, measuredOf } from "../../ipmerge_core/ui/evaluate/measured.js";
import { DEFAULT_PLAN } from "../../ipmerge_core/ui/web/plan.js";
import { indexPack } from "../../ipmerge_core/ui/web/preview.js";
import { KNOCKOUT_QUANTITIES, QUANTITIES, quantitiesOf, quantityRow, shownValue, withKnockout } from "../../ipmerge_core/ui/web/quantities.js";
import { makePack } from "./packs.js";

const SCORE = { right: 3, n: 10, low: 0.1, high: 0.6, length: 4, cut: 0, fixed: 1, broken: 4, p: 0.4 };
const TASKS = [{ name: "m", label: "Math", group: /** @type {const} */ ("math"), n: 10 }];

test("only plans that the map can draw become points of its dials", () => {
  const point = { label: "one", plan: "0123abcd", values: [], choice: { s: 0.2, lambda: 2 }, takes: true, matrices: 1, change: 0.1, mask: "1", scores: { m: SCORE }, skills: {} };
  const content = /** @type {any} */ ({ tasks: TASKS, created: "2026-11-30", cuts: [] });
  const [found] = measuredOf(content, point);
  assert.equal(found.hash, "0123abcd");
  assert.equal(found.scores[0].share, 0.3);
  assert.deepEqual(measuredOf(content, { ...point, choice: null }), []);
  assert.deepEqual(measuredOf(content, { ...point, plan: "" }), []);
  assert.equal(knockoutOf(content), null);
});

test("a knock-out gives every matrix the change of its module", () => {
  const cuts = [{ model: "unmerged", layer: 1, module: "attention", scores: { m: SCORE } }];
  const changes = knockoutOf(/** @type {any} */ ({ tasks: TASKS, cuts }));
  assert.deepEqual(changes, { "unmerged math": { "1.attention": -0.3 } });
  const { pack } = makePack({ layers: 2 });
  const records = withKnockout(pack.records, changes), index = indexPack({ ...pack, records });
  const view = { plan: DEFAULT_PLAN, expert: -1 };
  for (const cell of index.cells) {
    const expected = cell.layer === 1 && "qkvo".includes(cell.module) ? -0.3 : null;
    assert.equal(shownValue(view, cell, KNOCKOUT_QUANTITIES[0]), expected, cell.name);
  }
  assert.equal(quantitiesOf(records).length, QUANTITIES.length + 4);
  assert.equal(quantitiesOf(withKnockout(records, null)).length, QUANTITIES.length);
  const [first] = index.cells.filter(({ layer, module }) => layer === 1 && module === "q");
  assert.equal(quantityRow(first.experts[0], first, DEFAULT_PLAN).knockout_before_math, -0.3);
  assert.equal(KNOCKOUT_QUANTITIES[0].words(-0.3), "−30");
});

test("a single module goes before the block that it belongs to", () => {
  const { pack } = makePack({ layers: 1 });
  const records = withKnockout(pack.records, { "merged perception": { "0.mlp": -0.5, "0.down": -0.1 } });
  const value = (/** @type {string} */ module) => records.find((record) => record.module === module)?.knockout?.["merged perception"];
  assert.equal(value("down"), -0.1);
  assert.equal(value("up"), -0.5);
  assert.equal(value("q"), undefined);
});
