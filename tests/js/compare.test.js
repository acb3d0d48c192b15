// @ts-check
import assert from "node:assert/strict";
import { test } from "node:test";

import { across, cellPairs, differs, layerPairs, mirrored, partnerOf, plainRow, tally, targetWords } from "../../ipmerge_core/ui/compare/pairs.js";
import { DEFAULT_PLAN } from "../../ipmerge_core/ui/web/plan.js";
import { indexPack, previewOf } from "../../ipmerge_core/ui/web/preview.js";
import { makePack } from "./packs.js";

/** @import { Plan } from "../../ipmerge_core/ui/web/types.d.ts" */

/**
 * @param {ReturnType<typeof makePack>} made
 * @param {Partial<Plan>} [patch]
 */
function side({ pack }, patch = {}) {
  const index = indexPack(pack), plan = { ...DEFAULT_PLAN, ...patch };
  return { id: "x", given: [], presets: [], index, plan, result: previewOf(index, plan) };
}

test("layers correspond by relative depth, the ends to the ends", () => {
  const [deep, shallow] = [28, 4].map((layers) => indexPack(makePack({ layers }).pack));
  assert.deepEqual([0, 4, 5, 9, 18, 27].map((layer) => across(deep, shallow, layer)), [0, 0, 1, 1, 2, 3]);
  assert.deepEqual([0, 1, 2, 3].map((layer) => across(shallow, deep, layer)), [0, 9, 18, 27]);
  const one = indexPack(makePack({ layers: 1 }).pack);
  assert.deepEqual([across(one, deep, 0), across(deep, one, 27)], [0, 0]);
});

test("every matrix is counted once, by what each plan does with it", () => {
  const made = makePack({ layers: 6 }), a = side(made, { s: 0.3 }), b = side(made, { s: 0.6, overrides: { [made.pack.records[0].name]: "merge" } });
  const pairs = cellPairs({ a, b }), inA = a.result.selected, inB = b.result.selected;
  const both = inA.filter((name) => inB.includes(name)), either = new Set([...inA, ...inB]);
  assert.deepEqual(tally(pairs), {
    both: both.length, "only A": inA.length - both.length, "only B": inB.length - both.length, neither: 42 - either.size });
  assert.deepEqual(pairs.filter(differs).map(({ cell }) => cell.name),
    a.index.cells.map(({ name }) => name).filter((name) => inA.includes(name) !== inB.includes(name)));
});

test("a pair's numbers are those of the two plans", () => {
  const made = makePack(), a = side(made), b = side(made, { similarity: "max", lambda: 3, s: 0 });
  for (const pair of cellPairs({ a, b })) {
    const { first, max } = pair.cell.experts[0].similarity;
    assert.deepEqual([pair["similarity A"], pair["similarity B"], pair["B − A"]], [first, max, max - first]);
    assert.ok(Math.abs(pair["change B"] - 3 * Math.sqrt(pair.cell.experts[0].updates.sum.norm2 / pair.cell.experts[0].weight_norm2)) < 1e-12);
    if (first < 0.4) assert.equal(pair["change A"], 0);
  }
});

test("with several experts a difference is also which of them merge", () => {
  const made = makePack({ layers: 6, experts: 2 }), a = side(made, { s: 0.3 }), b = side(made, { s: 0.45 });
  const pairs = cellPairs({ a, b });
  for (const pair of pairs) {
    const [ofA, ofB] = [0.3, 0.45].map((s) => pair.cell.experts.flatMap(({ similarity }, k) => (similarity.first >= s ? [k + 1] : [])));
    assert.equal(pair["experts A"], ofA.join(" and ") || "none");
    assert.equal(pair["experts B"], ofB.join(" and ") || "none");
    assert.equal(differs(pair), ofA.join() !== ofB.join());
  }
  assert.ok(pairs.some((pair) => pair["merges in"] === "both" && differs(pair)));
});

test("equal plans differ in nothing", () => {
  const made = makePack({ experts: 2 });
  assert.deepEqual(cellPairs({ a: side(made), b: side(made) }).filter(differs), []);
});

test("matrices without a partner are left out", () => {
  const made = makePack(), other = makePack();
  other.pack.records = other.pack.records.filter(({ module }) => module !== "gate");
  assert.equal(cellPairs({ a: side(made), b: side(other) }).length, 18);
});

test("layers of another pair are named where they differ", () => {
  const a = side(makePack({ layers: 3 })), b = side(makePack({ layers: 5 }));
  assert.deepEqual(layerPairs({ a, b }).map((pair) => pair["layer of B"] ?? pair.layer), [0, 2, 4]);
  assert.deepEqual(layerPairs({ a, b })[1]["change B"], b.result.layer_change[2]);
});

test("a choice is mirrored at the same depth", () => {
  const a = side(makePack({ layers: 28 })), b = side(makePack({ layers: 4 }));
  const cell = a.index.cells[9 * 7 + 5], partner = partnerOf(a, b, cell);
  assert.deepEqual([partner?.layer, partner?.module], [1, "up"]);
  assert.deepEqual(mirrored({ kind: "cell", cell }, a, b), { kind: "cell", cell: partner });
  assert.deepEqual(mirrored({ kind: "layer", layer: 27 }, a, b), { kind: "layer", layer: 3 });
  assert.deepEqual(mirrored({ kind: "module", module: "q" }, a, b), { kind: "module", module: "q" });
});

test("a row of the table has nothing but values", () => {
  const made = makePack(), [pair] = cellPairs({ a: side(made), b: side(made) });
  for (const value of Object.values(plainRow(pair))) assert.ok(["string", "number"].includes(typeof value));
});

test("what is chosen is said in words", () => {
  const made = makePack({ layers: 2 }), sides = { a: side(made, { s: 0 }), b: side(made, { s: 1 }) }, pairs = cellPairs(sides);
  const [cell] = sides.a.index.cells, other = sides.b.index.cells[0];
  assert.match(targetWords(sides, pairs, { kind: "cell", cell }, other), /^Layer 0, q merges only in A\. A: merges, similarity .* B: kept, /);
  assert.match(targetWords(sides, pairs, { kind: "cell", cell }, undefined), /B: no corresponding matrix\.$/);
  assert.equal(targetWords(sides, pairs, { kind: "layer", layer: 1 }, undefined), "Layer 1: 0 in both, 7 only in A, 0 only in B, 0 in neither.");
  assert.equal(targetWords(sides, pairs, { kind: "module", module: "v" }, undefined), "All v: 0 in both, 2 only in A, 0 only in B, 0 in neither.");
});
