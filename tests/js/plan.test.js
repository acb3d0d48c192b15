// @ts-check
import assert from "node:assert/strict";
import { test } from "node:test";

import { cleanPlan, copyOf, DEFAULT_PLAN, planArguments, samePlan } from "../../ipmerge_core/ui/web/plan.js";
import { indexPack } from "../../ipmerge_core/ui/web/preview.js";
import { expertName, planWords, shortId } from "../../ipmerge_core/ui/web/words.js";
import { makePack } from "./packs.js";

const { pack } = makePack({ experts: 2 });
const index = indexPack(pack), NAME = pack.records[0].name;
const GOOD = { s: 0.3, lambda: 2, similarity: /** @type {const} */ ("max"), variant: /** @type {const} */ ("sum"), overrides: { [NAME]: /** @type {const} */ ("merge") }, budget: 0 };

test("a good plan is taken as it is, also from text", () => {
  /** @type {string[]} */
  const problems = [];
  assert.deepEqual(cleanPlan(GOOD, index, problems), GOOD);
  assert.deepEqual(cleanPlan({ ...GOOD, s: "0.3", lambda: "2" }, index, problems), GOOD);
  assert.deepEqual(cleanPlan({}, index, problems), DEFAULT_PLAN);
  assert.deepEqual(problems, []);
});

for (const [raw, problem] of /** @type {[object, RegExp][]} */ ([
  [{ s: 9 }, /^s must be a number from 0 to 1$/], [{ s: "NaN" }, /^s must/], [{ s: -0.1 }, /^s must/], [{ s: {} }, /^s must/],
  [{ lambda: "1e999" }, /^lambda must be a number from 0 to 32$/], [{ lambda: -1 }, /^lambda must/], [{ lambda: "<b>" }, /^lambda must/],
  [{ similarity: "best" }, /^similarity must be one of first, max, weighted$/], [{ similarity: null }, /^similarity/],
  [{ variant: "\0" }, /^variant must be one of sum, max, rescale_only, select_only, protect, complement_5 to complement_100, truncated_5 to truncated_95$/], [{ variant: ["sum"] }, /^variant/],
  [{ budget: 2 }, /^budget must be a number from 0 to 1$/], [{ variant: "complement_7" }, /^variant must/], [{ variant: "truncated_100" }, /^variant must/],
  [{ overrides: { "model.embed_tokens.weight": "merge" } }, /does not match/], [{ overrides: { [NAME]: "delete" } }, /does not match/],
  [{ overrides: "x" }, /does not match/], [{ overrides: { __proto__: null, constructor: "merge" } }, /does not match/],
])) {
  test(`${JSON.stringify(raw)} gives the default and a sentence`, () => {
    /** @type {string[]} */
    const problems = [];
    assert.deepEqual(cleanPlan(raw, index, problems), DEFAULT_PLAN);
    assert.equal(problems.length, 1);
    assert.match(problems[0], problem);
  });
}

test("an empty field means the default, without a sentence", () => {
  /** @type {string[]} */
  const problems = [];
  assert.deepEqual(cleanPlan({ s: "", lambda: null, overrides: null }, index, problems), DEFAULT_PLAN);
  assert.deepEqual(problems, []);
});

test("plans are the same whatever the order of their overrides", () => {
  const [a, b] = [pack.records[0].name, pack.records[2].name];
  assert.ok(samePlan({ ...GOOD, overrides: { [a]: "keep", [b]: "merge" } }, { ...GOOD, overrides: { [b]: "merge", [a]: "keep" } }));
  assert.ok(!samePlan(GOOD, { ...GOOD, overrides: {} }));
  for (const change of [{ s: 0.31 }, { lambda: 1 }, { variant: /** @type {const} */ ("max") }]) assert.ok(!samePlan(GOOD, { ...GOOD, ...change }));
});

test("a copy has overrides of its own", () => {
  const copy = copyOf(GOOD);
  assert.deepEqual(copy, GOOD);
  assert.notEqual(copy.overrides, GOOD.overrides);
});

test("the arguments are those of make_plan", () => {
  assert.deepEqual(planArguments(GOOD), { similarity_threshold: 0.3, lambda_: 2, similarity: "max", overrides: GOOD.overrides });
  assert.deepEqual(planArguments({ ...DEFAULT_PLAN, variant: "max" }),
    { similarity_threshold: 0.4, lambda_: 1, similarity: "first", overrides: {}, gamma_norm: "max" });
  assert.deepEqual(planArguments({ ...DEFAULT_PLAN, variant: "select_only" }),
    { similarity_threshold: 0.4, lambda_: 1, similarity: "first", overrides: {}, ablation: "select_only" });
});

test("the arguments name the projector of an update off the MLLM's directions, and a budget", () => {
  const usual = { similarity_threshold: 0.4, lambda_: 1, similarity: "first", overrides: {} };
  assert.deepEqual(planArguments({ ...DEFAULT_PLAN, variant: "complement_45" }), { ...usual, projector: "complement", energy: 0.45 });
  assert.deepEqual(planArguments({ ...DEFAULT_PLAN, variant: "truncated_45" }), { ...usual, ablation: "select_only", math_energy: 0.45 });
  assert.deepEqual(planArguments({ ...DEFAULT_PLAN, variant: "protect", budget: 0.02 }), { ...usual, projector: "protect", budget: 0.02 });
});

test("an update that an older pack lacks gives the default and a sentence", () => {
  const records = pack.records.map(({ updates: { sum, max, rescale_only, select_only }, ...rest }) => (
    { ...rest, updates: { sum, max, rescale_only, select_only } }));
  const old = indexPack({ ...pack, records });
  /** @type {string[]} */
  const problems = [];
  assert.deepEqual(cleanPlan({ variant: "complement_80" }, old, problems), DEFAULT_PLAN);
  assert.match(problems.join(), /does not contain the update complement_80; analyse the pair again/);
  assert.equal(cleanPlan({ variant: "complement_80" }, index, problems).variant, "complement_80");
  assert.equal(problems.length, 1);
});

test("a plan in a few words names what is unusual, in full everything", () => {
  assert.equal(planWords(DEFAULT_PLAN), "Sα 0.400, λ 1");
  assert.equal(planWords(GOOD), "Sα 0.300, λ 2, best angle max sᵢ, 1 set by hand");
  assert.equal(planWords({ ...DEFAULT_PLAN, variant: "complement_45", budget: 0.015 }), "Sα 0.400, λ 1, off 45 % of the MLLM's energy, budget 1.5 %");
  assert.equal(planWords({ ...DEFAULT_PLAN, variant: "truncated_90" }), "Sα 0.400, λ 1, truncated to 90 % of the math change's energy");
  assert.equal(planWords(DEFAULT_PLAN, true), "Sα 0.400 on first angle s₁, λ 1, γ sums to 1 (paper)");
});

test("an expert is called by the end of its id, or by its number", () => {
  assert.equal(expertName(pack, 1), "math-1");
  assert.equal(expertName(pack, 2), "expert 3");
  assert.equal(shortId("./models/math/"), "math");
  assert.equal(shortId("///", 1), "expert 2");
});
