// @ts-check
import assert from "node:assert/strict";
import { test } from "node:test";

import { lowestCosine } from "../../ipmerge_core/ui/explore/layer_map/curve.js";
import { highestChange } from "../../ipmerge_core/ui/explore/layer_map/painting.js";
import { bytes, count, fixed, lambdaText, percent, scientific, signed } from "../../ipmerge_core/ui/web/format.js";
import { DEFAULT_PLAN, LAMBDA_MAX } from "../../ipmerge_core/ui/web/plan.js";
import { angles, indexPack, previewOf } from "../../ipmerge_core/ui/web/preview.js";
import {
  cividis, colourDomain, LAMBDA_STEPS, LAMBDA_TICKS, lambdaAt, lambdaPosition, niceTop, quantile, readableOn, rgb,
} from "../../ipmerge_core/ui/web/scales.js";
import { makePack } from "./packs.js";

test("every step of the lambda slider comes back to itself and they rise", () => {
  for (let position = 0; position <= LAMBDA_STEPS; position++) {
    assert.equal(Math.round(lambdaPosition(lambdaAt(position))), position);
    if (position) assert.ok(lambdaAt(position) > lambdaAt(position - 1));
  }
  assert.deepEqual([lambdaAt(0), lambdaAt(LAMBDA_STEPS)], [0, LAMBDA_MAX]);
});

test("the ticks of lambda stand at steps of the slider, and 1 is among them", () => {
  for (const [lambda] of LAMBDA_TICKS) assert.equal(lambdaAt(lambdaPosition(lambda)), lambda);
  assert.ok(LAMBDA_TICKS.some(([lambda, text]) => lambda === 1 && text === "1"));
});

test("a lambda beyond the slider stands at its end", () => {
  assert.equal(lambdaPosition(1000), LAMBDA_STEPS);
});

test("an axis ends at a round number that is not below what it shows", () => {
  for (let x = 1e-7; x < 1e7; x *= 1.37) {
    const top = niceTop(x), lead = top / 10 ** Math.floor(Math.log10(top * 1.0001));
    assert.ok(top >= 0.999 * x && top <= 2.51 * x, `${top} for ${x}`);
    assert.ok([1, 2, 2.5, 5].some((step) => Math.abs(lead - step) < 1e-9), `${top} for ${x}`);
  }
  assert.deepEqual([0, -1, NaN].map(niceTop), [0.01, 0.01, 0.01]);
});

test("quantiles lie between neighbours", () => {
  assert.deepEqual([0, 0.25, 0.5, 0.9, 1].map((q) => quantile([1, 2, 3, 4, 5], q)), [1, 2, 3, 4.6, 5]);
  assert.equal(quantile([7], 0.98), 7);
});

test("the colour domain leaves out what is extreme and is never empty", () => {
  const values = Array.from({ length: 101 }, (_, i) => i / 100);
  assert.deepEqual(colourDomain([...values].reverse()), [0.02, 0.98]);
  const [low, high] = colourDomain([0.5, 0.5]);
  assert.ok(low < 0.5 && high > 0.5);
});

test("cividis grows lighter from end to end and stays within it", () => {
  assert.equal(rgb(0), "rgb(0,34,78)");
  assert.equal(rgb(1), "rgb(254,232,56)");
  assert.deepEqual([cividis(-1), cividis(2)], [cividis(0), cividis(1)]);
  for (let t = 0.02; t <= 1; t += 0.02) assert.ok(luminance(t) > luminance(t - 0.02));
});

test("text on every colour has a contrast of 4.5", () => {
  for (let t = 0; t <= 1; t += 0.01) {
    const light = luminance(t), contrast = readableOn(t) === "#fff" ? 1.05 / (light + 0.05) : (light + 0.05) / 0.05;
    assert.ok(contrast >= 4.5, `${contrast} at ${t}`);
  }
});

/** @param {number} t */
function luminance(t) {
  const [r, g, b] = cividis(t).map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

test("the curves' axis ends at the next level below all that they reach", () => {
  const levels = [0, -0.25, -0.5, -1], seen = new Set();
  for (let seed = 1; seed <= 60; seed++) {
    const index = indexPack(makePack({ layers: 1, seed }).pack), plan = { ...DEFAULT_PLAN, s: (seed % 10) / 10 };
    const reached = [0, 0.25, plan.s].flatMap((s) => [0, LAMBDA_MAX].flatMap((lambda) => (
      Object.values(angles(previewOf(index, { ...plan, s }).sums, lambda)).map(Number))));
    const low = lowestCosine(index, plan);
    assert.equal(low, levels.find((level) => level <= Math.min(0, ...reached)));
    seen.add(low);
  }
  assert.ok(seen.size >= 3);
});

test("the bars' axis ends above what every matrix together changes", () => {
  const index = indexPack(makePack().pack);
  const everything = Object.values(previewOf(index, { ...DEFAULT_PLAN, s: 0 }).layer_change);
  assert.equal(highestChange(index, { ...DEFAULT_PLAN, s: 0.9 }), niceTop(Math.max(...everything)));
  assert.equal(highestChange(index, { ...DEFAULT_PLAN, lambda: 0 }), highestChange(index, DEFAULT_PLAN));
});

test("numbers are written with the digits they need", () => {
  assert.deepEqual([fixed(0.12345), fixed(1, 1), fixed(null), fixed(undefined), fixed(NaN)], ["0.123", "1.0", "–", "–", "–"]);
  assert.deepEqual([0, 0.5, 0.12345, 0.0123, 0.000123, 1.5].map(percent), ["0 %", "50 %", "12 %", "1.2 %", "0.01 %", "150 %"]);
  assert.deepEqual([percent(null), percent(Infinity)], ["–", "–"]);
  assert.deepEqual([12, 1234, 65432, 7.61e9].map(count), ["12", "1.23 k", "65.4 k", "7.61 B"]);
  assert.deepEqual([12.4, 2048, 1.5e7, 7.61e9].map(bytes), ["12 B", "2.05 kB", "15.0 MB", "7.61 GB"]);
  assert.deepEqual([signed(0.5, 2), signed(-0.5, 2), signed(0, 1)], ["+0.50", "−0.50", "+0.0"]);
  assert.deepEqual([scientific(0), scientific(undefined), scientific(0.00012345)], ["0", "–", "0.0001234"]);
  assert.deepEqual([1, 0.30000000000000004, 31.999].map(lambdaText), ["1", "0.30000000000000004", "31.999"]);
});
