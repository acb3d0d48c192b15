// @ts-check
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { gunzipSync } from "node:zlib";

import { spectrumRows } from "../../ipmerge_core/ui/explore/layer_map/map_tables.js";
import { DEFAULT_PLAN } from "../../ipmerge_core/ui/web/plan.js";
import { indexPack } from "../../ipmerge_core/ui/web/preview.js";
import { findQuantity, QUANTITIES, quantityRow, shownValue } from "../../ipmerge_core/ui/web/quantities.js";
import { allValues, decode, drawnPlaces, heldWords, overlapMatrix, singularValues, valueAt } from "../../ipmerge_core/ui/web/spectrum.js";
import { makePack } from "./packs.js";

/** @import { LayerRecord, Pack } from "../../ipmerge_core/ui/web/types.d.ts" */

/** @type {Pack} */
const demo = JSON.parse(gunzipSync(readFileSync(new URL("../../assets/demo/pack.json.gz", import.meta.url))).toString());
const old = makePack({ layers: 1 }).pack.records[0];

test("variable-length numbers are read as they are written", () => {
  assert.deepEqual(decode("AfgB"), [0, 31, 32]);
  assert.deepEqual(decode(""), []);
  assert.throws(() => decode("A*"), RangeError);
});

test("every value of the demo pack is there, descending, and the sums agree with the exact ones", () => {
  for (const record of demo.records) {
    for (const side of /** @type {const} */ (["mllm", "math", "base"])) {
      const found = singularValues(record, side), stored = record.spectra?.[side];
      assert.ok(found && stored);
      assert.equal(found.values.length, Math.min(...record.shape));
      assert.ok(found.values.every((value, i) => i === 0 || value <= found.values[i - 1]));
      const total = found.values.reduce((sum, value) => sum + value, 0);
      const squares = found.values.reduce((sum, value) => sum + value * value, 0);
      assert.ok(Math.abs(total / stored.total - 1) < 5e-4);
      assert.ok(Math.abs(squares / stored.squares - 1) < 1e-3);
    }
    const exact = record.mllm_norm2;
    assert.ok(Math.abs((record.spectra?.mllm.squares ?? 0) / exact - 1) < 1e-5);
  }
});

test("samples, with six digits, lie within half a step of the values", () => {
  for (const record of demo.records) {
    const found = singularValues(record, "math");
    record.index.forEach((rank, i) => {
      assert.ok(found && Math.abs(found.values[rank - 1] / record.math_sigma[i] - 1) < 5.1e-4);
    });
  }
});

test("what a pack holds is said: all values, leading ones, or samples of them", () => {
  const complete = singularValues(demo.records[0], "mllm");
  assert.ok(complete);
  assert.equal(heldWords(complete), "all 128 values");
  assert.equal(heldWords({ ...complete, computed: 64 }), "the leading 64 of 128 values");
  const samples = singularValues(old, "mllm");
  assert.ok(samples);
  assert.equal(heldWords(samples), "3 samples of 4 values");
  assert.equal(singularValues(old, "base"), null);
  assert.deepEqual([1, 2, 3, 4].map((rank) => valueAt(samples, rank)), [3, 2, 2, 1]);
});

test("zeros and a matrix of zeros come back", () => {
  assert.deepEqual(allValues({ count: 3, rank: 1, total: 1, squares: 1, steps: "A" }), [1, 0, 0]);
  assert.deepEqual(allValues({ count: 2, rank: 0, total: 0, squares: 0, steps: "" }), [0, 0]);
});

test("a drawing keeps the first and the last value, and all of a short spectrum", () => {
  assert.deepEqual(drawnPlaces(4, 10), [0, 1, 2, 3]);
  const places = drawnPlaces(3584, 100);
  assert.deepEqual([places[0], places.at(-1)], [0, 3583]);
  assert.ok(places.length <= 100 && places.every((place, i) => i === 0 || place > places[i - 1]));
});

test("the first cosine of the leading directions is the first angle", () => {
  for (const { spectra, angles } of demo.records) {
    assert.ok(spectra);
    const cosines = overlapMatrix(spectra.overlap);
    assert.equal(cosines.length, spectra.overlap.rows);
    if (spectra.overlap.rows && spectra.overlap.columns) assert.ok(Math.abs(cosines[0][0] - angles[0]) <= 0.0026);
  }
});

test("the numbers of a matrix as CSV have every value and say how many there are", () => {
  const index = indexPack(demo), rows = spectrumRows([index.cells[0]]);
  assert.equal(rows.length, 128);
  assert.deepEqual([rows[0].values, rows[0].possible], [128, 128]);
  assert.ok(Number(rows[0].base_sigma) > 0);
  assert.equal(rows.filter(({ angle }) => angle !== "").length, demo.records[0].index.length);
});

test("every quantity of the map is a number with words, alone in its name", () => {
  const index = indexPack(demo), view = { plan: DEFAULT_PLAN, expert: -1 };
  assert.equal(new Set(QUANTITIES.map(({ key }) => key)).size, QUANTITIES.length);
  for (const quantity of QUANTITIES) {
    for (const cell of index.cells) {
      const value = shownValue(view, cell, quantity);
      assert.ok(value !== null && Number.isFinite(value), quantity.key);
      assert.ok(quantity.words(value) && quantity.words(value) !== "–");
    }
    assert.equal(quantity.words(null), "–");
  }
});

test("cosine and norm ratio follow from the inner products, and are left out where one is zero", () => {
  const [cell] = indexPack(demo).cells, [record] = cell.experts, row = quantityRow(record, cell, DEFAULT_PLAN);
  assert.equal(row.cosine, record.inner / Math.sqrt(record.mllm_norm2 * record.math_norm2));
  assert.equal(row.norm_ratio, Math.sqrt(record.math_norm2 / record.mllm_norm2));
  /** @type {LayerRecord} */
  const still = { ...record, mllm_norm2: 0, inner: 0 };
  assert.deepEqual([findQuantity("cosine")?.of(still, cell, DEFAULT_PLAN), findQuantity("norm_ratio")?.of(still, cell, DEFAULT_PLAN)], [null, null]);
  assert.equal(findQuantity("toString"), undefined);
});
