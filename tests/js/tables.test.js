// @ts-check
import assert from "node:assert/strict";
import { test } from "node:test";

import { layerRows, lambdaRows, matrixRows, spectrumRows } from "../../ipmerge_core/ui/explore/layer_map/map_tables.js";
import { sourceWords } from "../../ipmerge_core/ui/explore/layer_map/picture.js";
import { fileStem, planJson } from "../../ipmerge_core/ui/explore/layer_map/takeaway.js";
import { DEFAULT_PLAN } from "../../ipmerge_core/ui/web/plan.js";
import { indexPack, previewOf } from "../../ipmerge_core/ui/web/preview.js";
import { csvText, sortRows } from "../../ipmerge_core/ui/web/tables.js";
import { makePack } from "./packs.js";

const { pack } = makePack({ layers: 2, experts: 2 });
const index = indexPack(pack), plan = { ...DEFAULT_PLAN, s: 0.5, lambda: 2, overrides: { [pack.records[0].name]: /** @type {const} */ ("keep") } };
const shown = { index, plan, result: previewOf(index, plan) };

test("CSV quotes what would break it and keeps full precision", () => {
  const rows = [{ name: 'a "b"', value: 0.1 + 0.2 }, { name: "c,d", value: null }, { name: "two\nlines", value: true }];
  assert.equal(csvText(rows), 'name,value\n"a ""b""",0.30000000000000004\n"c,d",null\n"two\nlines",true\n');
});

test("rows are sorted both ways, equal ones by layer, and left alone", () => {
  const rows = [{ layer: 2, x: 1 }, { layer: 0, x: 3 }, { layer: 1, x: 1 }, { layer: 3, x: 2 }];
  assert.deepEqual(sortRows(rows, { key: "x", down: false }).map(({ layer }) => layer), [1, 2, 3, 0]);
  assert.deepEqual(sortRows(rows, { key: "x", down: true }).map(({ layer }) => layer), [0, 3, 1, 2]);
  assert.deepEqual(rows.map(({ layer }) => layer), [2, 0, 1, 3]);
});

test("words are sorted too, and rows without a layer keep their order", () => {
  const rows = [{ lambda: 1, x: "b" }, { lambda: 2, x: "a" }, { lambda: 3, x: "b" }];
  assert.deepEqual(sortRows(rows, { key: "x", down: false }).map(({ lambda }) => lambda), [2, 1, 3]);
});

test("the table of matrices says of every record what the plan does with it", () => {
  const rows = matrixRows(shown);
  assert.deepEqual(rows.map(({ name, expert }) => [name, expert]), pack.records.map(({ name, expert }) => [name, expert]));
  rows.forEach((row, i) => {
    const record = pack.records[i], byHand = record.name === pack.records[0].name;
    assert.equal(row.merges, !byHand && record.similarity.first >= 0.5);
    assert.equal(row.override, byHand ? "keep" : "");
    assert.equal(row.change, 2 * Math.sqrt(record.updates.sum.norm2 / record.weight_norm2));
    assert.equal(row.update_inner, record.updates.sum.inner);
  });
});

test("the table of layers counts what merges", () => {
  const rows = layerRows(shown);
  assert.deepEqual(rows.map(({ layer, matrices }) => [layer, matrices]), [[0, 7], [1, 7]]);
  assert.equal(Number(rows[0].merging) + Number(rows[1].merging), shown.result.selected.length);
  assert.deepEqual(rows.map(({ change }) => change), [shown.result.layer_change[0], shown.result.layer_change[1]]);
});

test("the table over lambda agrees with a preview at every lambda", () => {
  for (const row of lambdaRows(shown)) {
    const { keep, absorb, relative_change: change } = previewOf(index, { ...plan, lambda: Number(row.lambda) });
    assert.deepEqual([row.keep, row.absorb, row.change], [keep, absorb, change]);
  }
});

test("a matrix's numbers have a row for every sample and expert", () => {
  const rows = spectrumRows(index.cells.slice(0, 2));
  assert.equal(rows.length, 2 * 2 * 3);
  assert.deepEqual(rows[0], { name: index.cells[0].name, expert: 0, rank: 1, mllm_sigma: 3, math_sigma: 2, base_sigma: "",
    angle: pack.records[0].angles[0], values: 3, possible: 4 });
});

test("the JSON holds the plan, its arguments and its preview, and nothing that only the page needs", () => {
  const saved = JSON.parse(planJson({ ...shown, pack, packId: "packs-c" }));
  assert.deepEqual([saved.format, saved.version, saved.pair.id, saved.plan], ["ipmerge-choice", 1, "packs-c", plan]);
  assert.equal(saved.arguments.similarity_threshold, 0.5);
  assert.equal(saved.preview.relative_change, shown.result.relative_change);
  assert.ok(!("masks" in saved.preview) && !("sums" in saved.preview));
});

test("what is taken away says how the pair was analysed, where not in the usual way", () => {
  const sources = { mllm: { id: "a/vlm", revision: "0123456789" }, base: { id: "./base/" }, math: [{ id: "b/math" }, { id: "c/code" }] };
  /** @param {object} parameters */
  const words = (parameters) => sourceWords({ ...pack, sources, engine: "0.1", parameters });
  assert.equal(words({ rank: null, temperature: 32 }),
    "vlm@01234567 ← math, code (base base); analysed 2026-01-01 with IPMerge 0.1. Geometry, not accuracy.");
  assert.match(words({ rank: 5, temperature: 8 }), /with IPMerge 0\.1, rank 5, temperature 8\. Geometry/);
  assert.match(words({ quick: true }), /, quick, approximate\. Geometry/);
  const saved = JSON.parse(planJson({ ...shown, pack: { ...pack, parameters: { rank: 5 } }, packId: "x" }));
  assert.deepEqual(saved.pair.parameters, { rank: 5 });
});

test("file names are made of plain letters", () => {
  assert.equal(fileStem({ name: "Qwen2.5-VL / math: <b>" }), "ipmerge-qwen2-5-vl-math-b");
  assert.ok(fileStem({ name: "x".repeat(200) }).length <= 48);
});
