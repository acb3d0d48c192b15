// @ts-check
// Evaluation results: axes, scores as text, rows of tables and which score is best.

import assert from "node:assert/strict";
import { test } from "node:test";
import { scaleOf, shownTicks } from "../../ipmerge_core/ui/evaluate/axes.js";
import {
  bestPoints, cutRows, dropOf, gainWords, isSignificant, orderedTasks, pointWords, pWords, scoreRows, scoreWords,
  skillRows, testWords, uncutWords, valueWords,
} from "../../ipmerge_core/ui/evaluate/scores.js";

/** @import { Content, Score } from "../../ipmerge_core/ui/evaluate/types.d.ts" */

/**
 * @param {number} right
 * @param {number} n
 * @param {Partial<Score>} [more]
 * @returns {Score}
 */
function scored(right, n, more = {}) {
  return { right, n, low: 0.1, high: 0.9, length: 6.5, cut: 0, fixed: null, broken: null, p: null, ...more };
}

/** @returns {Content} */
function content() {
  return {
    id: "one", kind: "sweep", title: "Sweep", pack: "pack", created: "2026-11-30", facts: [], notes: [],
    axes: [{ parameter: "lambda_", label: "lambda", values: [0, 1, 32] }],
    tasks: [{ name: "p", label: "Perception", group: "perception", n: 300 }, { name: "m", label: "Math", group: "math", n: 300 }],
    points: [
      { label: "unmerged", plan: "", values: [], choice: null, takes: false, matrices: 0, change: null, mask: "00", scores: { m: scored(0, 300), p: scored(270, 300) }, skills: { "m/add": scored(0, 60) } },
      { label: "lambda 1", plan: "0123abcd", values: [1], choice: null, takes: true, matrices: 2, change: 0.01, mask: "11",
        scores: { m: scored(60, 300, { fixed: 60, broken: 0, p: 1e-12 }), p: scored(264, 300, { fixed: 2, broken: 8, p: 0.109 }) }, skills: { "m/add": scored(30, 60) } },
    ],
    layers: [0], modules: ["q", "k"], flips: [], flipped: 0,
    cuts: [{ model: "before", layer: 0, module: "mlp", scores: { p: scored(0, 300, { fixed: 0, broken: 270, p: 0 }) } }],
  };
}

test("a score has its interval and its number of items, and a small sample is marked", () => {
  assert.equal(scoreWords(scored(60, 300, { low: 0.158, high: 0.249 })), "20.0 % (15.8–24.9), n 300");
  assert.match(scoreWords(scored(10, 199)), /small sample/);
  assert.doesNotMatch(scoreWords(scored(10, 200)), /small sample/);
  assert.equal(scoreWords(undefined), "–");
  assert.equal(scoreWords(scored(0, 0)), "–");
});

test("a cut is compared with the score of the model with all modules", () => {
  const [{ scores }] = content().cuts;
  assert.equal(uncutWords(scores.p), "90.0 %");
  assert.equal(uncutWords(scored(30, 60, { fixed: 6, broken: 12 })), "60.0 %");
  assert.equal(uncutWords(scored(1, 2)), "–");
});

test("differences are paired: fixed minus broken items, with the p value of their test", () => {
  const [, merged] = content().points;
  assert.equal(gainWords(merged.scores.m), "+20.0");
  assert.equal(gainWords(merged.scores.p), "−2.0");
  assert.equal(testWords(merged.scores.p), "fixed 2, broken 8, p 0.109");
  assert.equal(testWords(scored(1, 2)), "");
  assert.ok(isSignificant(merged.scores.m));
  assert.ok(!isSignificant(merged.scores.p));
  assert.equal(pWords(1e-9), "< 0.0001");
  assert.equal(pWords(0.0004), "0.0004");
});

test("mathematics comes first, and the best of a task is marked unless all are equal", () => {
  const all = content();
  assert.deepEqual(orderedTasks(all.tasks).map(({ name }) => name), ["m", "p"]);
  assert.deepEqual(bestPoints(all, "m"), [1]);
  assert.deepEqual(bestPoints(all, "p"), [0]);
  all.points[1].scores.m.right = 0;
  assert.deepEqual(bestPoints(all, "m"), []);
});

test("a point is described with every task, never a math score without perception", () => {
  const all = content(), words = pointWords(all, all.points[1]);
  assert.match(words, /^lambda 1; 2 matrices merge; Math 20.0 % .*; Perception 88.0 %/);
});

test("tables have all rows with all numbers", () => {
  const rows = scoreRows(content());
  assert.equal(rows.length, 2);
  assert.equal(rows[1].lambda, 1);
  assert.equal(rows[1]["m share"], 0.2);
  assert.equal(rows[1]["p broken"], 8);
  assert.equal(rows[0]["m p"], "");
  assert.deepEqual(Object.keys(rows[0]), Object.keys(rows[1]));
  assert.deepEqual(skillRows(content()).map(({ skill }) => skill), ["add"]);
  assert.equal(cutRows(content())[0]["p share"], 0);
  assert.equal(cutRows(content())[0]["m share"], "");
});

test("a knocked-out module drops the score by the paired difference", () => {
  const [cut] = content().cuts;
  assert.equal(dropOf(cut, "p"), -0.9);
  assert.equal(dropOf(cut, "m"), null);
  assert.equal(dropOf(undefined, "p"), null);
});

test("axes place numbers by value, lambda as on its slider, and names at even distances", () => {
  assert.deepEqual(scaleOf({ parameter: "s", label: "s", values: [0, 0.25, 1] }).at, [0, 0.25, 1]);
  assert.deepEqual(scaleOf({ parameter: "norm", label: "norm", values: ["sum", "max"] }).at, [0, 1]);
  assert.deepEqual(scaleOf({ parameter: "s", label: "s", values: [0.3] }).at, [0.5]);
  const [zero, one, two, four] = scaleOf({ parameter: "lambda_", label: "lambda", values: [0, 1, 2, 4] }).at;
  assert.equal(zero, 0);
  assert.ok(Math.abs(two - one - (four - two)) < 1e-9, "an octave has one length");
});

test("ticks that would overlap are left out, the first one stays", () => {
  const scale = scaleOf({ parameter: "s", label: "s", values: [0, 0.01, 0.02, 1] });
  assert.deepEqual(shownTicks(scale, 200).map(({ text }) => text), ["0", "1"]);
  assert.equal(shownTicks(scale, 20000).length, 4);
});

test("values are shown without digits of rounding", () => {
  assert.equal(valueWords(0.1 + 0.2), "0.3");
  assert.equal(valueWords(null), "none");
  assert.equal(valueWords("max"), "max");
  assert.equal(valueWords(true), "true");
});
