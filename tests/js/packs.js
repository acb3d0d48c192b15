// @ts-check
// Small seeded packs. Every matrix is stood for by short random vectors, so that all inner products of a
// record belong together as those of real matrices do, and a test can do the sums the long way.

import { VARIANTS } from "../../ipmerge_core/ui/web/plan.js";

/** @import { LayerRecord, Pack, UpdateProducts, Variant } from "../../ipmerge_core/ui/web/types.d.ts" */

const MODULES = ["q", "k", "v", "o", "gate", "up", "down"];

/**
 * Numbers from 0 to 1 (a linear congruential generator).
 *
 * @param {number} seed
 */
export function randomNumbers(seed) {
  let state = seed >>> 0;
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 32;
  };
}

/**
 * @param {number[]} a
 * @param {number[]} b
 */
export function dot(a, b) {
  return a.reduce((sum, x, i) => sum + x * b[i], 0);
}

/**
 * A pack, and the vectors behind every record: dV and one P for each expert and variant.
 *
 * @param {{ layers?: number, experts?: number, seed?: number }} [options]
 */
export function makePack({ layers = 3, experts = 1, seed = 1 } = {}) {
  const random = randomNumbers(seed);
  const vector = () => Array.from({ length: 5 }, () => random() - 0.5);
  /** @type {Map<string, { vision: number[], updates: Record<Variant, number[]>[] }>} */
  const vectors = new Map();
  /** @type {LayerRecord[]} */
  const records = [];
  for (let layer = 0; layer < layers; layer++) {
    for (const module of MODULES) {
      const name = `model.layers.${layer}.${module}.weight`, vision = vector(), weight2 = 10 + random();
      const updates = Array.from({ length: experts }, () => (
        /** @type {Record<Variant, number[]>} */ (Object.fromEntries(VARIANTS.map((variant) => [variant, vector()])))));
      vectors.set(name, { vision, updates });
      for (let expert = 0; expert < experts; expert++) {
        records.push(recordOf({ name, layer, module, expert }, vision, updates, { weight2, random }));
      }
    }
  }
  /** @type {Pack} */
  const pack = {
    name: `small ${layers}`, engine: "0", created: "2026-01-01T00:00:00Z", parameters: { rank: null, temperature: 32 },
    sources: { mllm: { id: "x/mllm" }, base: { id: "x/base" }, math: Array.from({ length: experts }, (_, k) => ({ id: `x/math-${k}` })) },
    totals: { model_parameters: 1000, llm_parameters: 900, model_bytes: 2000, decoder_itemsize: 2 }, records,
  };
  return { pack, vectors };
}

/**
 * @param {{ name: string, layer: number, module: string, expert: number }} place
 * @param {number[]} vision
 * @param {Record<Variant, number[]>[]} updates
 * @param {{ weight2: number, random: () => number }} rest
 * @returns {LayerRecord}
 */
function recordOf(place, vision, updates, { weight2, random }) {
  const math = updates[place.expert].select_only, first = random();
  /** @param {Variant} variant @returns {UpdateProducts} */
  const products = (variant) => {
    const own = updates[place.expert][variant];
    return { norm2: dot(own, own), inner: dot(vision, own),
      cross: updates.slice(0, place.expert).map((other) => dot(own, other[variant])) };
  };
  return {
    ...place, shape: [4, 6], similarity: { first, max: Math.min(1, first * 1.2), weighted: first * 0.5 },
    best_index: 1, gap: 0.2, principal: { 1: first }, rho: 1.5, weight_norm2: weight2, base_norm2: weight2,
    mllm_norm2: dot(vision, vision), math_norm2: dot(math, math), inner: dot(vision, math),
    updates: /** @type {LayerRecord["updates"]} */ (Object.fromEntries(VARIANTS.map((variant) => [variant, products(variant)]))),
    chance: { first: 0.3, max: 0.5 }, noise_floor: 1e-6, index: [1, 2, 4],
    mllm_sigma: [3, 2, 1], math_sigma: [2, 1, 0.5], angles: [first, 0.2, 0.1],
  };
}
