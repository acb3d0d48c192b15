// @ts-check
// What corresponds to what: cells of A and B by relative depth, and the text of each pair. Pure, no DOM.

import { fixed, percent, signed } from "../web/format.js";
import { cellAt, cellChange, shownSimilarity } from "../web/preview.js";
import { sameTarget } from "../web/targets.js";

/** @import { Cell, Column, Index, Row, Target } from "../web/types.d.ts" */
/** @import { CellPair, LayerPair, MergesIn, Side, Sides } from "./types.d.ts" */
/** @typedef {Pick<Side, "index">} Indexed */
/** @typedef {Pick<Side, "index" | "plan" | "result">} Computed */

/** @type {Record<MergesIn, string>} */
export const STATE_WORDS = {
  both: "merges in both", "only A": "merges only in A", "only B": "merges only in B", neither: "merges in neither",
};
/** @type {Column[]} */
export const COLUMNS = [
  ["layer", String], ["module", String], ["merges in", String], ["experts A", String], ["experts B", String],
  ["similarity A", (v) => fixed(v)], ["similarity B", (v) => fixed(v)], ["B − A", (v) => signed(v, 3)],
  ["change A", percent], ["change B", percent],
];

/**
 * The layer of another pack at the same relative depth.
 *
 * @param {Index} from
 * @param {Index} to
 * @param {number} layer
 */
export function across(from, to, layer) {
  const last = from.layers.length - 1, depth = last ? from.layers.indexOf(layer) / last : 0;
  return to.layers[Math.round(depth * (to.layers.length - 1))];
}

/**
 * @param {Indexed} from
 * @param {Indexed} to
 * @param {Cell} cell
 */
export function partnerOf(from, to, cell) {
  const first = cellAt(to.index, across(from.index, to.index, cell.layer), cell.module);
  return first?.members[cell.members.indexOf(cell)];
}

/**
 * The same choice in the other pack, at the same relative depth.
 *
 * @param {Target} target
 * @param {Indexed} from
 * @param {Indexed} to
 * @returns {Target | null}
 */
export function mirrored(target, from, to) {
  if (target.kind === "layer") return { kind: "layer", layer: across(from.index, to.index, target.layer) };
  if (target.kind !== "cell") return target;
  const cell = partnerOf(from, to, target.cell);
  return cell ? { kind: "cell", cell } : null;
}

/**
 * The highest similarity of a cell's experts.
 *
 * @param {Pick<Side, "plan">} side
 * @param {Cell} cell
 */
export function similarityOf({ plan }, cell) {
  return shownSimilarity({ plan, expert: -1 }, cell);
}

/**
 * @param {number[]} ofA
 * @param {number[]} ofB
 * @returns {MergesIn}
 */
function mergesIn(ofA, ofB) {
  if (ofA.length) return ofB.length ? "both" : "only A";
  return ofB.length ? "only B" : "neither";
}

/** @param {number[]} experts */
function named(experts) {
  return experts.map((k) => k + 1).join(" and ") || "none";
}

/**
 * Every cell of A with its partner; cells without one are left out.
 *
 * @param {{ a: Computed, b: Computed }} sides
 * @returns {CellPair[]}
 */
export function cellPairs({ a, b }) {
  const several = Math.max(a.index.nExperts, b.index.nExperts) > 1;
  return a.index.cells.flatMap((cell) => {
    const other = partnerOf(a, b, cell);
    if (!other) return [];
    const ofA = a.result.masks[cell.position], ofB = b.result.masks[other.position];
    const similarityA = similarityOf(a, cell), similarityB = similarityOf(b, other);
    return [{
      cell, other, layer: cell.layer, module: cell.module, "merges in": mergesIn(ofA, ofB),
      ...(several ? { "experts A": named(ofA), "experts B": named(ofB) } : {}),
      "similarity A": similarityA, "similarity B": similarityB, "B − A": similarityB - similarityA,
      "change A": cellChange(cell, ofA, a.plan), "change B": cellChange(other, ofB, b.plan),
    }];
  });
}

/** @param {CellPair} pair */
export function differs(pair) {
  return pair["merges in"].startsWith("only") || (pair["merges in"] === "both" && pair["experts A"] !== pair["experts B"]);
}

/**
 * A pair as a row of a table, without what only the page needs.
 *
 * @param {CellPair} pair
 * @returns {Row}
 */
export function plainRow({ cell, other, ...row }) {
  return row;
}

/**
 * @param {{ a: Pick<Side, "index" | "result">, b: Pick<Side, "index" | "result"> }} sides
 * @returns {LayerPair[]}
 */
export function layerPairs({ a, b }) {
  return a.index.layers.map((layer) => {
    const other = across(a.index, b.index, layer);
    return { layer, ...(other === layer ? {} : { "layer of B": other }),
      "change A": a.result.layer_change[layer], "change B": b.result.layer_change[other] };
  });
}

/**
 * How many pairs merge in what.
 *
 * @param {CellPair[]} pairs
 */
export function tally(pairs) {
  const counts = { both: 0, "only A": 0, "only B": 0, neither: 0 };
  for (const pair of pairs) counts[pair["merges in"]] += 1;
  return counts;
}

/**
 * The description of a selected target.
 *
 * @param {Sides} sides
 * @param {CellPair[]} pairs
 * @param {Target} target In A.
 * @param {Cell | undefined} other What is chosen in B, for a cell.
 */
export function targetWords({ a, b }, pairs, target, other) {
  if (target.kind === "cell") {
    const pair = pairs.find((each) => each.cell === target.cell && each.other === other);
    const where = other && other.layer !== target.cell.layer ? ` (layer ${other.layer})` : "";
    const { layer, module } = target.cell;
    return `Layer ${layer}, ${module}${pair ? ` ${STATE_WORDS[pair["merges in"]]}` : ""}. A: ${cellWords(a, target.cell)}. B${where}: ${cellWords(b, other)}.`;
  }
  const counts = tally(pairs.filter(({ layer, module }) => (
    sameTarget(target, { kind: "layer", layer }) || sameTarget(target, { kind: "module", module }))));
  return `${target.kind === "module" ? `All ${target.module}` : `Layer ${target.kind === "layer" ? target.layer : ""}`}: ${counts.both} in both, ` +
    `${counts["only A"]} only in A, ${counts["only B"]} only in B, ${counts.neither} in neither.`;
}

/**
 * @param {Computed} side
 * @param {Cell | undefined} cell
 */
function cellWords({ plan, result }, cell) {
  if (!cell) return "no corresponding matrix";
  const experts = result.masks[cell.position];
  return `${experts.length ? "merges" : "kept"}, similarity ${fixed(similarityOf({ plan }, cell))}, change ${percent(cellChange(cell, experts, plan))}`;
}
