// @ts-check
// What can be chosen in a map: a matrix, a layer, a module, or a range of layers.

/** @import { Cell, Index, Target } from "./types.d.ts" */

/**
 * Whether a target is in this layer: a cell of it, the layer itself, or a range around it.
 *
 * @param {Target | null} target
 * @param {number} layer
 */
export function coversLayer(target, layer) {
  if (!target || target.kind === "module") return false;
  if (target.kind === "range") return target.from <= layer && layer <= target.to;
  return (target.kind === "cell" ? target.cell.layer : target.layer) === layer;
}

/**
 * The cells of a target.
 *
 * @param {Index} index
 * @param {Target | null} target
 * @returns {Cell[]}
 */
export function cellsOf(index, target) {
  if (!target) return [];
  if (target.kind === "cell") return target.cell.members;
  return index.cells.filter((cell) => (
    target.kind === "module" ? cell.module === target.module : coversLayer(target, cell.layer)));
}

/**
 * Whether a button's own target is what has been chosen, or part of a chosen range.
 *
 * @param {Target} own
 * @param {Target | null} chosen
 */
export function isChosen(own, chosen) {
  if (!chosen) return false;
  if (own.kind === "layer" && chosen.kind === "range") return coversLayer(chosen, own.layer);
  return sameTarget(own, chosen);
}

/**
 * @param {Target} a
 * @param {Target | null} b
 */
export function sameTarget(a, b) {
  if (b === null || a.kind !== b.kind) return false;
  const others = identity(b);
  return identity(a).every((each, i) => each === others[i]);
}

/**
 * The key of a target among others of its kind.
 *
 * @param {Target} target
 */
function identity(target) {
  switch (target.kind) {
    case "cell": return [target.cell];
    case "layer": return [target.layer];
    case "module": return [target.module];
    default: return [target.from, target.to];
  }
}

/**
 * From one layer to another: the layer itself, where they are the same.
 *
 * @param {number} layer
 * @param {number} anchor Where the range began; a later stretch starts from there.
 * @returns {Target}
 */
export function rangeTo(layer, anchor) {
  const [from, to] = layer < anchor ? [layer, anchor] : [anchor, layer];
  return from === to ? { kind: "layer", layer, anchor } : { kind: "range", from, to, anchor };
}
