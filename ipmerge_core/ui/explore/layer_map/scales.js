// Layer map, scales and words: colours, the lambda axis, numbers as text, small DOM helpers.

const SVG = "http://www.w3.org/2000/svg";
// Cividis, designed for colour-vision deficiency (Nunez, Anderton, Renslow 2018), ten even steps.
const CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173",
  "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"].map(
  (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));

function cividis(t) {
  const x = Math.max(0, Math.min(1, t)) * (CIVIDIS.length - 1);
  const low = Math.min(Math.floor(x), CIVIDIS.length - 2);
  return CIVIDIS[low].map((c, i) => Math.round(c + (x - low) * (CIVIDIS[low + 1][i] - c)));
}

const rgb = (t) => `rgb(${cividis(t).join(",")})`;

// Black or white, whichever reads better on the colour at t (WCAG relative luminance).
function readableOn(t) {
  const [r, g, b] = cividis(t).map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18 ? "#000" : "#fff";
}

function quantile(sorted, q) {
  const at = (sorted.length - 1) * q, low = Math.floor(at);
  return sorted[low] + (at - low) * ((sorted[low + 1] ?? sorted[low]) - sorted[low]);
}

// The colour domain: 2nd to 98th percentile of the similarities, printed in the legend.
function colourDomain(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const low = quantile(sorted, 0.02), high = quantile(sorted, 0.98);
  return high - low > 1e-9 ? [low, high] : [low - 0.01, low + 0.01];
}

// The lambda slider: 0 to 1/8 linear in the first steps, then 20 steps an octave up to 32.
const LAMBDA_FOOT = 10, LAMBDA_STEPS = LAMBDA_FOOT + 160;

function lambdaAt(position) {
  const value = position <= LAMBDA_FOOT
    ? position / LAMBDA_FOOT / 8
    : 2 ** (-3 + (position - LAMBDA_FOOT) / 20);
  return Number(value.toPrecision(3));
}

function lambdaPosition(lambda) {
  if (lambda <= 1 / 8) return lambda * 8 * LAMBDA_FOOT;
  return Math.min(LAMBDA_STEPS, LAMBDA_FOOT + 20 * (Math.log2(lambda) + 3));
}

const LAMBDA_TICKS = [[0, "0"], [0.125, "⅛"], [0.25, "¼"], [0.5, "½"], [1, "1"], [2, "2"], [4, "4"],
  [8, "8"], [16, "16"], [32, "32"]];

const VARIANT_LABELS = {
  sum: "γ sums to 1 (paper)", max: "γ divided by its maximum",
  rescale_only: "rescale only, no projection", select_only: "select only",
};
const MEASURE_LABELS = {
  first: "first angle s₁", max: "best angle max sᵢ", weighted: "all angles, weighted",
};
const MEASURE_MEANING = {
  first: "the cosine between the first right singular vectors of the two task vectors, s₁ = |⟨v₁, v₁′⟩|",
  max: "the largest cosine between right singular vectors of equal rank, max |⟨vᵢ, vᵢ′⟩|",
  weighted: "the cosines of all right singular vectors of equal rank, weighted by both singular values",
};

const MODULE_MEANING = {
  q: "Attention: what a token asks for.", k: "Attention: what a token offers to be found by.",
  v: "Attention: what a token passes on.", o: "Attention: how what was gathered is written back.",
  gate: "MLP: which of its features are let through.", up: "MLP: the features it looks for.", down: "MLP: what it writes back.",
};

const fixed = (x, digits = 3) => (x === null || x === undefined || !Number.isFinite(x) ? "–" : x.toFixed(digits));

function percent(x) {
  if (x === null || !Number.isFinite(x)) return "–";
  const value = 100 * x;
  return (value === 0 ? "0" : value >= 10 ? value.toFixed(0) : value >= 0.1 ? value.toFixed(1) : value.toPrecision(1)) + " %";
}

function count(n) {
  for (const [size, unit] of [[1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (n >= size) return (n / size).toPrecision(3) + " " + unit;
  }
  return String(n);
}

function bytes(n) {
  for (const [size, unit] of [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"]]) {
    if (n >= size) return (n / size).toPrecision(3) + " " + unit;
  }
  return Math.round(n) + " B";
}

const lambdaText = (lambda) => String(Number(lambda.toPrecision(3)));
// A plan in a few words; in full, every choice is named.
function planWords({ s, lambda, variant, similarity, overrides }, full = false) {
  const byHand = Object.keys(overrides).length, parts = [`S_α ${fixed(s)}${full ? ` on ${MEASURE_LABELS[similarity]}` : ""}`, `λ ${lambdaText(lambda)}`];
  if (!full && similarity !== DEFAULT_PLAN.similarity) parts.push(MEASURE_LABELS[similarity]);
  if (full || variant !== DEFAULT_PLAN.variant) parts.push(VARIANT_LABELS[variant]);
  if (byHand) parts.push(`${byHand} set by hand`);
  return parts.join(", ");
}

const title = (cell) => `Layer ${cell.layer}, ${cell.module}`;

// A rounded upper end for an axis: 1, 2, 2.5 or 5 times a power of ten.
function niceTop(x) {
  if (!(x > 0)) return 0.01;
  const power = 10 ** Math.floor(Math.log10(x));
  return [1, 2, 2.5, 5, 10].map((step) => step * power).find((step) => step >= x * 0.999);
}

// node("button", {class: "x", "aria-label": "y"}, "text" or child, ...): text never becomes markup.
function node(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function shape(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(made, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function setText(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

// The head of a table that can be sorted: a button a column, its arrow for the eye only.
function sortHeads(names, { key, down }, attributes = {}) {
  return node("thead", {}, node("tr", {}, ...names.map((name) => {
    const order = name !== key ? "none" : down ? "descending" : "ascending";
    return node("th", { scope: "col", "aria-sort": order }, node("button", { type: "button", class: "lm-quiet", "data-key": name, ...attributes },
      name, name === key ? node("span", { "aria-hidden": "true" }, down ? " ↓" : " ↑") : null));
  })));
}

// Rows in the order that its heads say, equal ones by layer.
function sortRows(rows, { key, down }) {
  const sign = down ? -1 : 1;
  return [...rows].sort((x, y) => sign * (x[key] > y[key] ? 1 : x[key] < y[key] ? -1 : 0) || x.layer - y.layer);
}
