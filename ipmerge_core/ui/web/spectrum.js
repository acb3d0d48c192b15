// @ts-check
// The singular values of a record. Packs hold all of them, as steps on a logarithmic grid; older ones
// hold samples. `analysis/singular_values.py` writes what is decoded here.

/** @import { LayerRecord, Overlap, Side, SingularValues, StoredValues } from "./types.d.ts" */

const STEP = Math.log1p(1e-3), COSINE_STEP = 0.005;
const DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
const MORE = 32;

/** @type {WeakMap<StoredValues, number[]>} */
const decoded = new WeakMap();

/**
 * Integers from variable-length base-32 digits.
 *
 * @param {string} text
 */
export function decode(text) {
  const found = [];
  let number = 0, scale = 1;
  for (const letter of text) {
    const digit = DIGITS.indexOf(letter);
    if (digit < 0) throw new RangeError(`'${letter}' is not a digit of a spectrum.`);
    number += scale * (digit % MORE);
    scale *= MORE;
    if (digit >= MORE) continue;
    found.push(number);
    number = 0;
    scale = 1;
  }
  return found;
}

/**
 * All values of a spectrum, descending, each within 0.05 %.
 *
 * @param {StoredValues} stored
 * @returns {number[]}
 */
export function allValues(stored) {
  const known = decoded.get(stored);
  if (known) return known;
  const [start, ...falls] = stored.steps ? decode(stored.steps) : [];
  const values = [];
  if (start !== undefined) {
    let level = start % 2 ? -(start + 1) / 2 : start / 2;
    values.push(Math.exp(STEP * level));
    for (const fall of falls) {
      level -= fall;
      values.push(Math.exp(STEP * level));
    }
  }
  while (values.length < stored.count) values.push(0);
  decoded.set(stored, values);
  return values;
}

/**
 * What a record holds of a spectrum: all computed values, or samples of them; null where nothing.
 *
 * @param {LayerRecord} record
 * @param {Side} side
 * @returns {SingularValues | null}
 */
export function singularValues(record, side) {
  const possible = Math.min(...record.shape), stored = record.spectra?.[side];
  if (stored) {
    const values = allValues(stored);
    return { ranks: values.map((_, i) => i + 1), values, computed: stored.count, possible, isComplete: true, stored };
  }
  if (side === "base" || !record.index.length) return null;
  const values = side === "mllm" ? record.mllm_sigma : record.math_sigma;
  return { ranks: record.index, values, computed: record.index[record.index.length - 1], possible, isComplete: false, stored: null };
}

/**
 * How many values there are, in words.
 *
 * @param {SingularValues} found
 */
export function heldWords({ values, computed, possible, isComplete }) {
  if (!isComplete) return `${values.length} samples of ${computed} values`;
  return computed === possible ? `all ${possible} values` : `the leading ${computed} of ${possible} values`;
}

/**
 * Positions of a spectrum that a drawing needs: all of a short one, else evenly spaced on the
 * logarithmic axis, the first and the last included.
 *
 * @param {number} n
 * @param {number} most
 */
export function drawnPlaces(n, most) {
  if (n <= most) return Array.from({ length: n }, (_, i) => i);
  const places = Array.from({ length: most }, (_, i) => Math.round(n ** (i / (most - 1))) - 1);
  return [...new Set(places)];
}

/**
 * The value at a rank, or of the nearest sample before it.
 *
 * @param {SingularValues} found
 * @param {number} rank From 1.
 */
export function valueAt({ ranks, values, isComplete }, rank) {
  if (isComplete) return values[rank - 1];
  return values[Math.max(0, ranks.findLastIndex((each) => each <= rank))];
}

/**
 * The cosines |V_mllm^T V_math| of the leading directions, one row for each direction of the MLLM.
 *
 * @param {Overlap} overlap
 * @returns {number[][]}
 */
export function overlapMatrix({ rows, columns, cosines }) {
  const flat = decode(cosines).map((step) => step * COSINE_STEP);
  return Array.from({ length: rows }, (_, i) => flat.slice(i * columns, (i + 1) * columns));
}
