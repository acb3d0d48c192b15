// @ts-check
// Numbers as text.

const DASH = "–";

/**
 * @param {number | null | undefined} x
 * @param {number} [digits]
 */
export function fixed(x, digits = 3) {
  return x === null || x === undefined || !Number.isFinite(x) ? DASH : x.toFixed(digits);
}

/**
 * With its sign, minus as a minus sign.
 *
 * @param {number} x
 * @param {number} digits
 */
export function signed(x, digits) {
  return (x < 0 ? "−" : "+") + Math.abs(x).toFixed(digits);
}

/**
 * Four significant digits.
 *
 * @param {number | undefined} x
 */
export function scientific(x) {
  if (x === undefined) return DASH;
  return x === 0 ? "0" : x.toPrecision(4);
}

/** @param {number | null | undefined} x A fraction. */
export function percent(x) {
  if (x === null || x === undefined || !Number.isFinite(x)) return DASH;
  const value = 100 * x;
  if (value === 0) return "0 %";
  if (value >= 10) return `${value.toFixed(0)} %`;
  return `${value >= 0.1 ? value.toFixed(1) : value.toPrecision(1)} %`;
}

/** @param {number} n */
export function count(n) {
  return withUnit(n, ["B", "M", "k"]) ?? String(n);
}

/** @param {number} n */
export function bytes(n) {
  return withUnit(n, ["GB", "MB", "kB"]) ?? `${Math.round(n)} B`;
}

/**
 * @param {number} n
 * @param {[string, string, string]} units Of 10⁹, 10⁶ and 10³.
 */
function withUnit(n, units) {
  const place = [1e9, 1e6, 1e3].findIndex((size) => n >= size);
  return place < 0 ? null : `${(n / 10 ** (9 - 3 * place)).toPrecision(3)} ${units[place]}`;
}

/**
 * With all its digits: what is shown can be typed back.
 *
 * @param {number} lambda
 */
export function lambdaText(lambda) {
  return String(lambda);
}

/**
 * A budget in percent, with all its digits.
 *
 * @param {number} budget
 */
export function budgetText(budget) {
  return String(Number((100 * budget).toPrecision(12)));
}
