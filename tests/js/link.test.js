// @ts-check
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { linkAddress, linkQuery, packOverrides, readLink, spokenPart, unpackOverrides } from "../../ipmerge_core/ui/explore/layer_map/link.js";
import { lambdaText } from "../../ipmerge_core/ui/web/format.js";
import { DEFAULT_PLAN } from "../../ipmerge_core/ui/web/plan.js";
import { indexPack } from "../../ipmerge_core/ui/web/preview.js";
import { QUANTITIES } from "../../ipmerge_core/ui/web/quantities.js";
import { thresholdText } from "../../ipmerge_core/ui/web/thresholds.js";
import { makePack, randomNumbers } from "./packs.js";

/** @import { Override, Plan } from "../../ipmerge_core/ui/web/types.d.ts" */

const index = indexPack(makePack({ layers: 28 }).pack);
const OPENED = { pack: "packs-a", plan: DEFAULT_PLAN, target: null, pinned: null, expert: -1, problems: [] };
const STATE = { packId: "packs-a", home: "", index, plan: DEFAULT_PLAN, target: null };

test("a link brings back plan, pair and matrix", () => {
  const [cell] = index.cells.slice(40);
  /** @type {Plan} */
  const plan = { s: 0.62, lambda: 0.4, similarity: "max", variant: "max", overrides: { [cell.name]: "keep", [index.cells[0].name]: "merge" }, budget: 0.0123 };
  const found = readLink(`?${linkQuery({ ...STATE, plan, target: { kind: "cell", cell } })}`, index);
  assert.deepEqual(found, { ...OPENED, plan, target: { kind: "cell", cell } });
});

test("numbers come back with all their digits", () => {
  const random = randomNumbers(5);
  for (let i = 0; i < 500; i++) {
    const plan = { ...DEFAULT_PLAN, s: random(), lambda: 32 * random() ** 8 };
    assert.deepEqual(readLink(`?${linkQuery({ ...STATE, plan })}`, index)?.plan, plan);
    assert.equal(Number(thresholdText(plan.s)), plan.s);
    assert.equal(Number(lambdaText(plan.lambda)), plan.lambda);
  }
});

test("everything that can be selected comes back, and the pinned matrix and the expert", () => {
  const two = indexPack(makePack({ layers: 6, experts: 2 }).pack), [cell, pinned] = two.cells;
  /** @type {import("../../ipmerge_core/ui/web/types.d.ts").Target[]} */
  const targets = [{ kind: "cell", cell }, { kind: "layer", layer: 5 }, { kind: "module", module: "down" }, { kind: "range", from: 1, to: 4, anchor: 1 }];
  for (const target of targets) {
    const found = readLink(`?${linkQuery({ ...STATE, index: two, target, pinned, expert: 1 })}`, two);
    assert.deepEqual(found, { ...OPENED, target, pinned, expert: 1 });
  }
});

test("the chosen method stays in the link, and only its options beside a plan of the map", () => {
  const spoken = "method=ties&p.density=0.25&o.norms=merge", search = `?${linkQuery({ ...STATE, spoken })}&x=1&p.=&o=`;
  assert.deepEqual(readLink(`?${linkQuery({ ...STATE, spoken })}`, index)?.problems, []);
  assert.equal(spokenPart(search), spoken);
  assert.equal(spokenPart(spoken, false), "o.norms=merge");
  assert.equal(spokenPart("p.rank=8&o.norms=merge", false), "p.rank=8&o.norms=merge"); // of the map's own method
  assert.equal(new URL(linkAddress(STATE, `http://127.0.0.1/?${spoken}`)).search, "?v=1&pack=packs-a&s=0.4&l=1");
});

test("the usual plan makes a short link", () => {
  assert.equal(linkQuery(STATE).toString(), "v=1&pack=packs-a&s=0.4&l=1");
});

test("any number of matrices set by hand comes back, in at most 300 characters", () => {
  const random = randomNumbers(11);
  for (const share of [0, 0.01, 0.5, 1]) {
    /** @type {Record<string, Override>} */
    const overrides = {};
    for (const { name } of index.cells) if (random() < share) overrides[name] = random() < 0.5 ? "merge" : "keep";
    const query = linkQuery({ ...STATE, plan: { ...DEFAULT_PLAN, s: 0.1234, similarity: "weighted", variant: "rescale_only", overrides } });
    assert.ok(`https://huggingface.co/spaces/someone/ipmerge?${query}`.length <= 300);
    /** @type {string[]} */
    const problems = [];
    assert.deepEqual(unpackOverrides(index, query.get("o"), problems), overrides);
    assert.deepEqual(problems, []);
  }
});

/**
 * The overrides that one byte of a link stands for: five matrices, three choices each.
 *
 * @param {number} byte
 * @param {number} place
 */
function overridesOf(byte, place) {
  /** @type {Record<string, Override>} */
  const overrides = {};
  for (let i = 0; i < 5; i++) {
    const digit = Math.floor(byte / 3 ** i) % 3;
    if (digit) overrides[index.cells[5 * place + i].name] = digit === 1 ? "merge" : "keep";
  }
  return overrides;
}

test("every byte at every place is written in letters that an address keeps", () => {
  for (let place = 0; place < 3; place++) {
    for (let byte = 1; byte < 3 ** 5; byte++) {
      const overrides = overridesOf(byte, place), text = packOverrides(index, overrides);
      assert.match(text, /^[\w-]+$/);
      assert.deepEqual(unpackOverrides(index, text, []), overrides);
    }
  }
});

test("overrides of every length are packed without loss", () => {
  for (let length = 1; length <= 12; length++) {
    const overrides = { [index.cells[length - 1].name]: /** @type {const} */ ("keep") };
    assert.deepEqual(unpackOverrides(index, packOverrides(index, overrides), []), overrides);
  }
});

test("the last of thousands of matrices is set by hand, and a link of more is refused", () => {
  const { pack } = makePack({ layers: 900 }), own = indexPack(pack), last = own.cells[own.cells.length - 1];
  const overrides = { [last.name]: /** @type {const} */ ("keep") }, text = packOverrides(own, overrides);
  assert.ok(own.cells.length > 6000 && text.length > 1600);
  const problems = /** @type {string[]} */ ([]);
  assert.deepEqual(unpackOverrides(own, text, problems), overrides);
  assert.deepEqual(problems, []);
  assert.deepEqual(unpackOverrides(index, text, problems), {});
  assert.deepEqual(problems, ["o belongs to another pair"]);
});

for (const { release, query, plan, cell } of JSON.parse(readFileSync(new URL("../links.json", import.meta.url), "utf8"))) {
  test(`a link of release ${release} keeps working`, () => {
    const { pack } = makePack({ layers: 28 });
    const places = { self_attn: ["q", "k", "v", "o"], mlp: ["gate", "up", "down"] };
    for (const record of pack.records) {
      const part = places.mlp.includes(record.module) ? "mlp" : "self_attn";
      record.name = `model.layers.${record.layer}.${part}.${record.module}_proj.weight`;
    }
    const own = indexPack(pack), found = readLink(query, own);
    assert.deepEqual(found?.plan, { ...DEFAULT_PLAN, ...plan });
    assert.ok(found?.target?.kind === "cell");
    assert.equal(`Layer ${found.target.cell.layer} · ${found.target.cell.module}`, cell);
    assert.equal(linkQuery({ ...STATE, index: own, plan, target: found.target }).toString(), query);
  });
}

for (const [query, problem] of /** @type {[string, RegExp][]} */ ([
  ["v=1&s=9", /^s must be a number from 0 to 1$/], ["v=1&l=-1", /^lambda must be a number from 0 to 32$/],
  ["v=1&l=1e999", /^lambda must be a number/], ["v=1&m=best", /^similarity must be one of/], ["v=1&u=%00", /^variant must be one of/],
  ["v=1&o=<script>alert(1)</script>", /^o is damaged$/], ["v=1&o=AAAAA", /^o is damaged$/], [`v=1&o=${"A".repeat(401)}`, /^o is damaged$/],
  ["v=1&o=-g", /^o belongs to another pair$/], [`v=1&o=${"A".repeat(55)}`, /^o belongs to another pair$/],
  [`v=1&o=${"_".repeat(60)}`, /^o belongs to another pair$/], [`v=1&o=${"A".repeat(60)}`, /^o belongs to another pair$/],
])) {
  test(`${query.slice(0, 40)} gives the default and a sentence`, () => {
    const found = readLink(query, index);
    assert.deepEqual(found?.plan, DEFAULT_PLAN);
    assert.equal(found?.problems.length, 1);
    assert.match(String(found?.problems[0]), problem);
  });
}

for (const text of ["99.k", "<img src=x>.k", "5.k.q", ".", "99", "3-2", "3-99", "gate2", "-1", "5.", "1e3"]) {
  test(`a selection that is not there is named: ${text}`, () => {
    const found = readLink(`v=1&c=${encodeURIComponent(text)}&p=${encodeURIComponent(text)}&e=${encodeURIComponent(text)}`, index);
    assert.deepEqual([found?.target, found?.pinned, found?.expert], [null, null, -1]);
    assert.deepEqual(found?.problems.map((problem) => problem.slice(0, 5 + text.length)), ["c", "p", "e"].map((key) => `${key} is ${text}`));
  });
}

test("unknown parts of a link are named, those of the page are not", () => {
  const found = readLink("v=1&S=0.3&lamda=2&__theme=dark&present=1&utm_source=x&view=api", index);
  assert.deepEqual(found?.problems, ["S is not part of a link", "lamda is not part of a link"]);
});

test("another version is not read, and no version is no link", () => {
  assert.deepEqual(readLink("v=<b>1</b>-and-more&s=0.1", index),
    { pack: null, problems: ["version <b>1</b>-and of the link is not supported"] });
  assert.equal(readLink("s=0.1&l=2", index), null);
});

test("an address keeps the page's other keys and loses what the link replaces", () => {
  const address = new URL(linkAddress(STATE, "http://127.0.0.1:7860/?__theme=dark&v=0&c=1.q&o=AA#tab"));
  assert.equal(address.search, "?__theme=dark&v=1&pack=packs-a&s=0.4&l=1");
  assert.equal(address.hash, "");
});

test("on a Space the address is that of its page", () => {
  assert.equal(linkAddress({ ...STATE, home: "https://huggingface.co/spaces/a/b" }, "http://127.0.0.1/?y=1"),
    "https://huggingface.co/spaces/a/b?v=1&pack=packs-a&s=0.4&l=1");
});

test("a thousand damaged links end in a plan of this pair or a message", () => {
  const random = randomNumbers(29);
  const overrides = Object.fromEntries(index.cells.slice(0, 60).map(({ name }, i) => /** @type {[string, Override]} */ ([name, i % 2 ? "keep" : "merge"])));
  /** @type {Plan} */
  const plan = { ...DEFAULT_PLAN, s: 0.61, lambda: 2.5, similarity: "max", overrides };
  const sound = `?${linkQuery({ ...STATE, plan, target: { kind: "cell", cell: index.cells[9] } })}`;
  const hostile = ["NaN", "Infinity", "-1", "1e999", "%00", "%", "%ff", "&v=1", "&s=", "=", "9".repeat(5000), "_", "__proto__", "constructor", ".", "\u202e", "\ud800"];
  const names = new Set(index.cells.map(({ name }) => name));
  for (let seed = 0; seed < 1000; seed++) {
    const start = Math.floor(random() * sound.length), length = Math.floor(random() * 12);
    const inserted = random() < 0.7 ? hostile[Math.floor(random() * hostile.length)] : String.fromCharCode(Math.floor(random() * 256));
    const link = sound.slice(0, start) + (random() < 0.8 ? inserted : "") + sound.slice(start + length);
    const found = readLink(link, index);
    if (!found) {
      assert.ok(!new URLSearchParams(link).has("v"), link);
      continue;
    }
    assert.ok(found.problems.every((problem) => problem.length > 10 && problem.length < 400), link);
    if (!found.plan) continue;
    assert.ok(found.plan.s >= 0 && found.plan.s <= 1 && found.plan.lambda >= 0 && found.plan.lambda <= 32, link);
    assert.ok(["first", "max", "weighted"].includes(found.plan.similarity), link);
    assert.ok(Object.entries(found.plan.overrides).every(([name, rule]) => names.has(name) && ["merge", "keep"].includes(rule)), link);
  }
});

test("a link brings back what the colours show, and says when it cannot", () => {
  for (const quantity of QUANTITIES) {
    const query = linkQuery({ ...STATE, quantity });
    assert.equal(readLink(`?${query}`, index)?.quantity, quantity.key === "similarity" ? undefined : quantity.key);
  }
  const found = readLink("?v=1&q=nonsense", index);
  assert.equal(found?.quantity, undefined);
  assert.deepEqual(found?.problems, ["q is nonsense, which is no quantity of the map"]);
});
