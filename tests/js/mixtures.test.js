// @ts-check
// Mixtures of experts and hybrids: several matrices in one place, and places without a matrix.

import assert from "node:assert/strict";
import { test } from "node:test";

import { DEFAULT_PLAN } from "../../ipmerge_core/ui/web/plan.js";
import { cellAt, countMerging, flipValues, indexPack, previewOf } from "../../ipmerge_core/ui/web/preview.js";
import { medianValue, QUANTITIES, similarityWords } from "../../ipmerge_core/ui/web/quantities.js";
import { cellsOf } from "../../ipmerge_core/ui/web/targets.js";
import { shortModule } from "../../ipmerge_core/ui/web/words.js";
import { makePack } from "./packs.js";

/** Layer 0 has four experts and a router where the others have an MLP; layer 1 has no q. */
function mixture() {
  const { pack } = makePack({ layers: 3 });
  const experts = ["gate", "up", "down"];
  const records = pack.records.flatMap((record) => {
    if (record.layer === 1 && record.module === "q") return [{ ...record, module: "linear_attn.in_proj_qkv" }];
    if (record.layer || !experts.includes(record.module)) return [record];
    return [0, 1, 2, 3].map((n) => ({ ...record, name: `${record.name}[${n}]`, module: `mlp.experts.${record.module}_proj`,
      similarity: { ...record.similarity, first: (n + 1) / 10 } }));
  });
  const [first] = records;
  return { ...pack, records: [...records, { ...first, name: "router", module: "mlp.router" }] };
}

const view = { plan: { ...DEFAULT_PLAN, s: 0.3 }, expert: -1 };

test("the experts of a layer are one place with a median and a range", () => {
  const index = indexPack(mixture()), cell = cellAt(index, 0, "mlp.experts.up_proj");
  assert.ok(cell);
  assert.equal(cell.members.length, 4);
  assert.equal(similarityWords(view, cell), "median similarity 0.25 (0.10 to 0.40)");
  assert.equal(medianValue(view, cell, QUANTITIES[0]), 0.25);
  assert.deepEqual(countMerging(view, previewOf(index, view.plan), cell), { merging: 2, total: 4, on: "0" });
  assert.deepEqual(cellsOf(index, { kind: "cell", cell }), cell.members);
});

test("other matrices than projections merge by hand only", () => {
  const index = indexPack(mixture()), plan = { ...DEFAULT_PLAN, s: 0 };
  const others = ["mlp.router", "linear_attn.in_proj_qkv"];
  const selected = new Set(previewOf(index, plan).selected);
  for (const cell of index.cells) assert.equal(selected.has(cell.name), !others.includes(cell.module));
  assert.ok(flipValues(index, plan).every(({ cell }) => !others.includes(cell.module)));
  const byHand = { ...plan, overrides: { router: /** @type {const} */ ("merge") } };
  assert.ok(previewOf(index, byHand).selected.includes("router"));
});

test("places without a matrix are not expected", () => {
  const { expected, modules } = indexPack(mixture());
  assert.ok(modules.includes("q") && !expected.has("1.q") && expected.has("1.linear_attn.in_proj_qkv"));
  assert.ok(!expected.has("0.up") && expected.has("1.up"));
});

test("modules have short names", () => {
  const names = ["q", "mlp.experts.up_proj", "self_attn.kv_a_proj_with_mqa", "linear_attn.in_proj_qkv"];
  assert.deepEqual(names.map(shortModule), ["q", "experts.up", "kv_a_proj_with_mqa", "linear_attn.in_proj_qkv"]);
});
