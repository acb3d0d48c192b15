// @ts-check
// Thresholds as text that stays true when it is typed back: rounded to the side on which what is said of
// them holds, and with as many digits as a comparison needs.

const DIGITS = 3, MOST_DIGITS = 17;

/**
 * The largest number of so many decimals that does not exceed x.
 *
 * @param {number} x
 * @param {number} [digits]
 */
export function atMost(x, digits = DIGITS) {
  const scale = 10 ** digits;
  const near = Math.round(x * scale), place = near / scale <= x ? near : near - 1;
  return place / scale;
}

/**
 * The smallest number of so many decimals that is not below x.
 *
 * @param {number} x
 * @param {number} [digits]
 */
export function atLeast(x, digits = DIGITS) {
  return -atMost(-x, digits) + 0; // no minus zero
}

/**
 * The smallest number of so many decimals that exceeds x.
 *
 * @param {number} x
 * @param {number} [digits]
 */
export function above(x, digits = DIGITS) {
  const least = atLeast(x, digits);
  return least > x ? least : Number((least + 10 ** -digits).toFixed(digits));
}

/**
 * A threshold with all of its digits, and at least three decimals.
 *
 * @param {number} s
 */
export function thresholdText(s) {
  const text = String(s), decimals = text.split(".")[1]?.length ?? 0;
  return text.includes("e") ? s.toFixed(MOST_DIGITS) : s.toFixed(Math.max(DIGITS, decimals));
}

/**
 * A value and a threshold as texts that compare as the numbers do.
 *
 * @param {number} value
 * @param {number} s
 * @param {number} [digits] At least.
 * @returns {[string, string]}
 */
export function comparedTexts(value, s, digits = DIGITS) {
  for (let count = digits; count < MOST_DIGITS; count++) {
    const texts = /** @type {[string, string]} */ ([value.toFixed(count), s.toFixed(count)]);
    if (Math.sign(Number(texts[0]) - Number(texts[1])) === Math.sign(value - s)) return texts;
  }
  return [String(value), String(s)];
}
