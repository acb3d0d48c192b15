// @ts-check
import assert from "node:assert/strict";
import { test } from "node:test";

import { edgeCounts } from "../../ipmerge_core/ui/explore/layer_map/sentence.js";
import { cleanPlan, DEFAULT_PLAN, LAMBDA_MAX, MEASURES, VARIANTS } from "../../ipmerge_core/ui/web/plan.js";
import {
  addRecords, angles, cellAt, cellChange, emptyIndex, expertInView, flipValues, indexPack, merges, previewOf, shareInside,
  shownSimilarity,
} from "../../ipmerge_core/ui/web/preview.js";
import { dot, makePack } from "./packs.js";

/** @import { Plan } from "../../ipmerge_core/ui/web/types.d.ts" */

/**
 * @param {number} seen
 * @param {number} expected
 */
function assertClose(seen, expected) {
  assert.ok(Math.abs(seen - expected) <= 1e-12 * Math.max(1, Math.abs(expected)), `${seen} is not ${expected}`);
}

/**
 * The change of every matrix, added up entry by entry as a merge does it.
 *
 * @param {ReturnType<typeof makePack>} made
 * @param {Plan} plan
 */
function mergedTheLongWay({ pack, vectors }, plan) {
  const sums = { change: 0, weight: 0, keep: 0, own: 0, merged: 0 };
  /** @type {Set<string>} */
  const selected = new Set();
  for (const [name, { vision, updates }] of vectors) {
    const records = pack.records.filter((record) => record.name === name);
    const change = vision.map((_, i) => records.reduce((sum, record, k) => {
      const override = plan.overrides[name];
      if (override ? override === "keep" : record.similarity[plan.similarity] < plan.s) return sum;
      selected.add(name);
      return sum + plan.lambda * updates[k][plan.variant][i];
    }, 0));
    const merged = vision.map((x, i) => x + change[i]);
    sums.change += dot(change, change);
    sums.weight += records[0].weight_norm2;
    sums.keep += dot(vision, merged);
    sums.own += dot(vision, vision);
    sums.merged += dot(merged, merged);
  }
  return { selected: [...selected], change: Math.sqrt(sums.change / sums.weight), keep: sums.keep / Math.sqrt(sums.own * sums.merged) };
}

for (const experts of [1, 3]) {
  for (const variant of VARIANTS) {
    test(`a preview is what a merge does, ${experts} experts, ${variant}`, () => {
      const made = makePack({ layers: 4, experts, seed: 7 }), index = indexPack(made.pack);
      const [first, second] = index.cells;
      for (const similarity of MEASURES) {
        const plan = { s: 0.4, lambda: 2.3, similarity, variant, overrides: { [first.name]: /** @type {const} */ ("keep"), [second.name]: /** @type {const} */ ("merge") }, budget: 0 };
        const seen = previewOf(index, plan), expected = mergedTheLongWay(made, plan);
        assert.deepEqual(seen.selected, expected.selected);
        assertClose(seen.relative_change, expected.change);
        assertClose(Number(seen.keep), expected.keep);
        const byLayer = index.layers.reduce((sum, layer) => sum + seen.layer_change[layer] ** 2 * Number(index.layerWeight2.get(layer)), 0);
        assertClose(Math.sqrt(byLayer / index.weight2), seen.relative_change);
        assert.equal(seen.parameters_touched, 24 * seen.selected.length);
        assert.equal(seen.bytes_rewritten, 2 * seen.parameters_touched);
      }
    });
  }
}

test("with a budget every merged matrix changes by it, at lambda 1", () => {
  const index = indexPack(makePack({ experts: 2 }).pack);
  const plan = { ...DEFAULT_PLAN, s: 0, lambda: 3, budget: 0.02 };
  for (const cell of index.cells) assertClose(cellChange(cell, [0, 1], plan), 0.06);
  assertClose(previewOf(index, plan).relative_change, 0.06);
});

test("the share of a change inside the MLLM's directions is what a complement leaves out", () => {
  const { pack } = makePack(), [record] = pack.records;
  const updates = { ...record.updates, complement_40: { ...record.updates.select_only, norm2: record.updates.select_only.norm2 / 4 } };
  assertClose(Number(shareInside({ ...record, updates }, 40)), 0.75);
  const { sum, max, rescale_only, select_only } = record.updates;
  assert.equal(shareInside({ ...record, updates: { sum, max, rescale_only, select_only } }, 40), null);
});

test("the size of an update is relative to the experts' own change", () => {
  const index = indexPack(makePack({ experts: 2 }).pack), plan = { ...DEFAULT_PLAN, s: 0, lambda: 0.2 };
  assertClose(Number(previewOf(index, { ...plan, variant: "select_only" }).update_share), 0.2);
  assert.equal(previewOf(index, { ...plan, s: 1 }).update_share, null);
});

test("one matrix changes the whole by its own change", () => {
  const index = indexPack(makePack({ experts: 2 }).pack), [cell] = index.cells;
  const plan = cleanPlan({ s: 1, lambda: 3, overrides: { [cell.name]: "merge" } }, index);
  const { relative_change: change } = previewOf(index, plan);
  assertClose(change, cellChange(cell, [0, 1], plan) * Math.sqrt(cell.experts[0].weight_norm2 / index.weight2));
});

test("without an update there is no angle to it, and lambda 0 keeps everything", () => {
  const index = indexPack(makePack().pack);
  const nothing = previewOf(index, { ...DEFAULT_PLAN, s: 1 });
  assert.deepEqual([nothing.selected, nothing.relative_change, nothing.absorb, nothing.keep], [[], 0, null, 1]);
  const still = previewOf(index, { ...DEFAULT_PLAN, s: 0, lambda: 0 });
  assert.deepEqual([still.selected.length, still.relative_change, still.keep], [21, 0, 1]);
});

test("cosines never leave their range", () => {
  assert.deepEqual(angles({ vv: 1, vx: 1.0001, xx: 1 }, 1), { keep: 1, absorb: 1 });
  assert.deepEqual(angles({ vv: 1, vx: -1.0001, xx: 1 }, 0.5), { keep: 1, absorb: -1 });
  const index = indexPack(makePack({ seed: 3 }).pack);
  for (const lambda of [0, 1e-9, 0.5, LAMBDA_MAX]) {
    const { keep, absorb } = previewOf(index, { ...DEFAULT_PLAN, s: 0, lambda });
    for (const value of [keep, absorb]) assert.ok(value !== null && Math.abs(value) <= 1);
  }
});

test("an empty pack has nothing to merge", () => {
  const { selected, n_matrices: n, relative_change: change } = previewOf(emptyIndex(), DEFAULT_PLAN);
  assert.deepEqual([selected, n, change], [[], 0, 0]);
});

test("records that come one by one give the index of the whole pack", () => {
  const { pack } = makePack({ layers: 2, experts: 2 });
  const places = pack.records.map(({ layer, module }) => ({ layer, module }));
  const growing = { places, total: 14, done: 0, running: true };
  const index = indexPack({ ...pack, records: [], growing }), whole = indexPack(pack);
  assert.deepEqual([index.layers, index.modules, index.cells], [[0, 1], whole.modules, []]);
  assert.equal(addRecords(index, pack.records.slice(0, 6)).length, 3);
  assert.deepEqual(addRecords(index, pack.records.slice(6, 8)).map(({ position }) => position), [3]);
  addRecords(index, pack.records.slice(8));
  for (const key of /** @type {const} */ (["cells", "weight2", "mllm2", "numel", "nExperts"])) assert.deepEqual(index[key], whole[key]);
  assert.deepEqual(previewOf(index, DEFAULT_PLAN).masks, previewOf(whole, DEFAULT_PLAN).masks);
});

test("modules come in their usual order, unknown ones last", () => {
  const { pack } = makePack({ layers: 1 });
  const records = pack.records.map((record) => ({ ...record, module: record.module === "v" ? "router" : record.module })).reverse();
  assert.deepEqual(indexPack({ ...pack, records }).modules, ["q", "k", "o", "gate", "up", "down", "router"]);
});

test("a threshold at a flip merges the matrix, and just above it does not", () => {
  const index = indexPack(makePack({ layers: 2, experts: 2 }).pack);
  const flips = flipValues(index, DEFAULT_PLAN);
  assert.equal(flips.length, 28);
  flips.forEach(({ cell, expert, value }, i) => {
    assert.ok(i === 0 || value <= flips[i - 1].value);
    assert.ok(previewOf(index, { ...DEFAULT_PLAN, s: value }).masks[cell.position].includes(expert));
    assert.ok(!previewOf(index, { ...DEFAULT_PLAN, s: value + 1e-9 }).masks[cell.position].includes(expert));
  });
  const [{ cell }] = flips;
  const without = flipValues(index, { ...DEFAULT_PLAN, overrides: { [cell.name]: "keep" } });
  assert.ok(without.every((flip) => flip.cell !== cell));
});

test("the edge is counted as thresholds a step away decide", () => {
  const index = indexPack(makePack({ layers: 30 }).pack);
  for (const s of [0.2, 0.5, 0.8]) {
    const [lower, here, higher] = [s - 0.01, s, s + 0.01].map((at) => previewOf(index, { ...DEFAULT_PLAN, s: at }).selected.length);
    assert.deepEqual(edgeCounts({ index, plan: { ...DEFAULT_PLAN, s } }), { joins: lower - here, leaves: here - higher });
  }
});

test("a cell shows the expert in view, or the most similar", () => {
  const index = indexPack(makePack({ experts: 3, seed: 5 }).pack), plan = { ...DEFAULT_PLAN, s: 0.5 };
  const result = previewOf(index, plan);
  for (const cell of index.cells) {
    const values = cell.experts.map((record) => record.similarity.first), best = Math.max(...values);
    assert.equal(shownSimilarity({ plan, expert: -1 }, cell), best);
    assert.equal(values[expertInView({ plan, expert: -1 }, cell)], best);
    assert.equal(merges({ expert: -1 }, result, cell), best >= 0.5);
    for (const expert of [0, 1, 2]) {
      assert.equal(shownSimilarity({ plan, expert }, cell), values[expert]);
      assert.equal(expertInView({ plan, expert }, cell), expert);
      assert.equal(merges({ expert }, result, cell), values[expert] >= 0.5);
    }
  }
});

test("a cell is found by its place", () => {
  const index = indexPack(makePack().pack);
  assert.equal(cellAt(index, 2, "up")?.name, "model.layers.2.up.weight");
  assert.equal(cellAt(index, 3, "up"), undefined);
});
