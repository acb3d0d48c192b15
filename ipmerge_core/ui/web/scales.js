// @ts-check
// Colours and axes.

// Cividis, designed for colour-vision deficiency (Nunez, Anderton, Renslow 2018), ten even steps.
const CIVIDIS = [
  "#00224e", "#123570", "#3b496c", "#575d6d", "#707173",
  "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838",
].map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));

/** @param {number} t From 0 to 1. */
export function cividis(t) {
  const x = Math.max(0, Math.min(1, t)) * (CIVIDIS.length - 1);
  const low = Math.min(Math.floor(x), CIVIDIS.length - 2);
  return CIVIDIS[low].map((c, i) => Math.round(c + (x - low) * (CIVIDIS[low + 1][i] - c)));
}

/** @param {number} t From 0 to 1. */
export function rgb(t) {
  return `rgb(${cividis(t).join(",")})`;
}

/**
 * Black or white, whichever reads better on the colour at t (WCAG relative luminance).
 *
 * @param {number} t From 0 to 1.
 */
export function readableOn(t) {
  const [r, g, b] = cividis(t).map((c) => linear(c / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18 ? "#000" : "#fff";
}

/** @param {number} c A channel of sRGB, from 0 to 1. */
function linear(c) {
  return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
}

/**
 * @param {number[]} sorted
 * @param {number} q From 0 to 1.
 */
export function quantile(sorted, q) {
  const at = (sorted.length - 1) * q, low = Math.floor(at);
  return sorted[low] + (at - low) * ((sorted[low + 1] ?? sorted[low]) - sorted[low]);
}

/**
 * The colour domain: 2nd to 98th percentile of the similarities, printed in the legend.
 *
 * @param {number[]} values
 * @returns {[number, number]}
 */
export function colourDomain(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const low = quantile(sorted, 0.02), high = quantile(sorted, 0.98);
  return high - low > 1e-9 ? [low, high] : [low - 0.01, low + 0.01];
}

// The lambda slider: 0 to 1/8 linear in the first steps, then 20 steps an octave up to 32.
const LAMBDA_FOOT = 10;
export const LAMBDA_STEPS = LAMBDA_FOOT + 160;

/** @param {number} position Of the slider. */
export function lambdaAt(position) {
  const value = position <= LAMBDA_FOOT
    ? position / LAMBDA_FOOT / 8
    : 2 ** (-3 + (position - LAMBDA_FOOT) / 20);
  return Number(value.toPrecision(3));
}

/** @param {number} lambda */
export function lambdaPosition(lambda) {
  if (lambda <= 1 / 8) return lambda * 8 * LAMBDA_FOOT;
  return Math.min(LAMBDA_STEPS, LAMBDA_FOOT + 20 * (Math.log2(lambda) + 3));
}

/** @type {[number, string][]} */
export const LAMBDA_TICKS = [
  [0, "0"], [0.125, "⅛"], [0.25, "¼"], [0.5, "½"], [1, "1"], [2, "2"], [4, "4"], [8, "8"],
  [16, "16"], [32, "32"],
];

/**
 * A rounded upper end for an axis: 1, 2, 2.5 or 5 times a power of ten.
 *
 * @param {number} x
 */
export function niceTop(x) {
  if (!(x > 0)) return 0.01;
  const power = 10 ** Math.floor(Math.log10(x));
  return [1, 2, 2.5, 5].map((step) => step * power).find((top) => top >= x * 0.999) ?? 10 * power;
}
