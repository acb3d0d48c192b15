// Layer map, the two dials: the histogram of similarities over the threshold slider, and the
// keep / absorb curves over the lambda slider. Axes are fixed while something is being dragged.

const INSET = 10;  // half a slider thumb, so that a line stands exactly over the thumb
const BINS = 50;

function plotWidth(map, svg) {
  return Math.max(160, svg.clientWidth || map.dom.root.clientWidth || 320) - 2 * INSET;
}

function buildHistogram(map) {
  const svg = map.dom.hist, width = plotWidth(map, svg), height = svg.clientHeight || 92;
  const bins = new Array(BINS).fill(0);
  const cells = map.target?.kind === "range" ? cellsOf(map, map.target) : map.index.cells;
  for (const cell of cells) {
    for (const record of map.expert >= 0 ? [cell.experts[map.expert]] : cell.experts) {
      bins[Math.min(BINS - 1, Math.floor(record.similarity[map.plan.similarity] * BINS))] += 1;
    }
  }
  const top = Math.max(...bins), [low, high] = map.domain, step = width / BINS;
  const bars = () => bins.map((n, i) => n && shape("rect", {
    x: (INSET + i * step + 0.5).toFixed(2), width: Math.max(1, step - 1).toFixed(2),
    y: (height - 3 - (n / top) * (height - 22)).toFixed(2), height: (3 + (n / top) * (height - 22)).toFixed(2),
    rx: 1.5, fill: rgb(((i + 0.5) / BINS - low) / (high - low)),
  })).filter(Boolean);
  svg.setAttribute("viewBox", `0 0 ${width + 2 * INSET} ${height}`);
  const kept = shape("rect", { x: 0, y: 0, height, width: 0 });
  const taken = shape("rect", { x: 0, y: 0, height, width: 0 });
  const line = shape("g", { class: "lm-line" },
    shape("line", { x1: 0, x2: 0, y1: 4, y2: height }),
    shape("path", { d: "M-5 0H5L0 7Z" }));
  svg.replaceChildren(
    shape("defs", {}, shape("clipPath", { id: map.id + "k" }, kept), shape("clipPath", { id: map.id + "t" }, taken),
      hatch(map.id + "h")),
    shape("g", { "clip-path": `url(#${map.id}k)` },
      shape("g", { class: "lm-dim" }, ...bars()),
      shape("g", { class: "lm-hatch" }, ...bars().map((bar) => fill(bar, { fill: `url(#${map.id}h)` }, [])))),
    shape("g", { "clip-path": `url(#${map.id}t)`, class: "lm-lit" }, ...bars()),
    ...chanceMark(map, width, height),
    shape("text", { x: INSET + width, y: 12, class: "lm-note", "text-anchor": "end" }, `similarity of ${cells.length} matrices${map.target?.kind === "range" ? " in range" : ""}`),
    line);
  map.hist = { width, kept, taken, line };
}

function hatch(id) {
  return shape("pattern", { id, width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
    shape("line", { x1: 0, x2: 0, y1: 0, y2: 5, class: "lm-hatch-line" }));
}

// Where unrelated matrices would fall: it differs with the matrix size, so it is a band.
function chanceMark(map, width, height) {
  const levels = map.index.cells.map((cell) => cell.experts[0].chance?.[map.plan.similarity]).filter(Number.isFinite);
  if (!levels.length) return [];
  const low = INSET + Math.min(...levels) * width, high = INSET + Math.max(...levels) * width;
  const label = shape("text", { x: high + 4, y: 12, class: "lm-note" }, "chance");
  return [shape("rect", { x: low - 0.75, width: high - low + 1.5, y: 4, height: height - 4, class: "lm-chance" },
    shape("title", {}, `Unrelated matrices reach about ${fixed(Math.min(...levels), 2)} to ${fixed(Math.max(...levels), 2)} by chance`)), label];
}

function paintHistogram(map) {
  const { width, kept, taken, line } = map.hist, x = INSET + map.plan.s * width;
  kept.setAttribute("width", x);
  taken.setAttribute("x", x);
  taken.setAttribute("width", width + 2 * INSET - x);
  line.setAttribute("transform", `translate(${x} 0)`);
}

function buildCurve(map) {
  const svg = map.dom.curve, width = plotWidth(map, svg), height = svg.clientHeight || 92;
  svg.setAttribute("viewBox", `0 0 ${width + 2 * INSET} ${height}`);
  const y = (value) => height - 4 - ((value - map.curveLow) / (1 - map.curveLow)) * (height - 12);
  const x = (position) => INSET + (position / LAMBDA_STEPS) * width;
  const rules = [...new Set([map.curveLow, 0, 0.5, 1])].map((value) => shape("line", {
    x1: INSET, x2: INSET + width, y1: y(value), y2: y(value), class: value === 0 ? "lm-zero" : "lm-rule" }));
  const labels = [[1, "1"], [map.curveLow, fixed(map.curveLow, map.curveLow ? 2 : 0)]].map(([value, text]) =>
    shape("text", { x: INSET + width, y: y(value) + (value === 1 ? 11 : -3), class: "lm-note", "text-anchor": "end" }, text));
  labels.push(shape("text", { x: INSET, y: y(0.5) - 4, class: "lm-note" }, "cosines: geometry, not accuracy"));
  const keep = shape("path", { class: "lm-keep" }), absorb = shape("path", { class: "lm-absorb" });
  const line = shape("g", { class: "lm-line" },
    shape("line", { x1: 0, x2: 0, y1: 4, y2: height }), shape("path", { d: "M-5 0H5L0 7Z" }));
  const dots = [shape("circle", { r: 4, class: "lm-keep-dot" }), shape("circle", { r: 4, class: "lm-absorb-dot" })];
  const paper = shape("line", { x1: x(lambdaPosition(1)), x2: x(lambdaPosition(1)), y1: 4, y2: height, class: "lm-paper" },
    shape("title", {}, "λ = 1, the update as the paper writes it"));
  svg.replaceChildren(...rules, paper, keep, absorb, ...labels, line, ...dots);
  map.curve = { x, y, keep, absorb, line, dots, width };
}

// The lowest value the two curves reach, over thresholds and lambda; fixed between drags.
function scaleCurve(map) {
  let low = 0;
  for (const s of [0, 0.25, map.plan.s]) {
    const { sums } = previewOf(map.index, { ...map.plan, s });
    const { keep, absorb } = angles(sums, 0), end = angles(sums, LAMBDA_MAX);
    low = Math.min(low, ...[keep, absorb, end.keep, end.absorb].filter((v) => v !== null));
  }
  map.curveLow = low < -0.5 ? -1 : low < -0.25 ? -0.5 : low < 0 ? -0.25 : 0;
}

// Where the curves are drawn, worked out once: a frame then only has two cosines a point.
const CURVE_POINTS = Array.from({ length: LAMBDA_STEPS / 2 + 1 }, (_, i) => [2 * i, lambdaAt(2 * i)]);

function paintCurve(map, result) {
  const { x, y, line, dots } = map.curve, clamp = (v) => Math.max(map.curveLow, v);
  const paths = { keep: "", absorb: "" };
  for (const [position, lambda] of CURVE_POINTS) {
    const point = angles(result.sums, lambda), at = x(position).toFixed(1);
    for (const name in paths) {
      if (point[name] !== null) paths[name] += `${paths[name] ? "L" : "M"}${at} ${y(clamp(point[name])).toFixed(1)}`;
    }
  }
  const here = x(lambdaPosition(map.plan.lambda));
  line.setAttribute("transform", `translate(${here} 0)`);
  ["keep", "absorb"].forEach((name, i) => {
    map.curve[name].setAttribute("d", paths[name]);
    dots[i].style.display = result[name] === null ? "none" : "";
    if (result[name] !== null) dots[i].setAttribute("transform", `translate(${here} ${y(clamp(result[name]))})`);
    setText(map.dom[name], fixed(result[name]));
  });
}

// What the two plots say, in a sentence each, for those who do not see them; between drags only.
function describeDials(map) {
  const values = map.index.cells.map((cell) => shownSimilarity(map, cell)).sort((a, b) => a - b), { sums, keep, absorb } = map.result;
  const end = angles(sums, LAMBDA_MAX);
  map.dom.hist.setAttribute("aria-label", `Histogram of the similarities of ${values.length} matrices: ${fixed(values[0], 2)} to ` +
    `${fixed(values[values.length - 1], 2)}, median ${fixed(quantile(values, 0.5), 2)}; ${map.result.selected.length} merge at S alpha ${fixed(map.plan.s)}.`);
  map.dom.curve.setAttribute("aria-label", `Two cosines over lambda. At ${lambdaText(map.plan.lambda)}: keeps vision ${fixed(keep)}, absorbs math ${fixed(absorb)}. ` +
    `At ${LAMBDA_MAX}: keeps ${fixed(end.keep)}, absorbs ${fixed(end.absorb)}.`);
}

// Tick labels under a slider, at the same inset as its thumb.
function buildTicks(holder, ticks) {
  holder.replaceChildren(...ticks.map(([at, text, strong]) => {
    const tick = node("span", { class: strong ? "lm-tick strong" : "lm-tick" }, text);
    tick.style.left = `calc(${INSET}px + (100% - ${2 * INSET}px) * ${at})`;
    return tick;
  }));
}
