// Layer map 5/10, spectra of the chosen matrix from the samples in the pack: singular values and
// corresponding angles (a pinned matrix in thin lines beside them), and the same singular values
// for every layer of its module, one small panel under each column of the map.

function buildSpectra(map) {
  const { spectra } = map.dom, cell = map.target?.kind === "cell" ? map.target.cell : null;
  const record = cell && cell.experts[expertInView(map, cell)];
  spectra.hidden = !record?.index?.length;
  if (spectra.hidden) { spectra.replaceChildren(); return; }
  const columns = getComputedStyle(spectra).gridTemplateColumns.split(" ").length;
  const width = Math.max(240, (spectra.clientWidth - 24 * (columns - 1)) / columns);
  const pinned = map.pinned && map.pinned !== cell ? map.pinned.experts[expertInView(map, map.pinned)] : null;
  const name = (r) => `layer ${r.layer} · ${r.module}`;
  spectra.replaceChildren(
    figure(`Singular values, ${name(record)}`, key(pinned && name(pinned)), lineChart({
      width, log: true, label: "Singular values of both task vectors by rank",
      series: [record, pinned].filter(Boolean).flatMap((r, i) => [
        { index: r.index, values: r.mllm_sigma, style: "lm-keep" + (i ? " thin" : "") },
        { index: r.index, values: r.math_sigma, style: "lm-absorb" + (i ? " thin" : "") }]),
      marks: [{ value: record.noise_floor, text: "rounding of the stored dtype" }] })),
    figure("Corresponding angles sᵢ", null, lineChart({
      width, log: false, label: "Cosines of corresponding singular vectors by rank",
      series: [record, pinned].filter(Boolean).map((r, i) => ({ index: r.index, values: r.angles, style: "lm-angle" + (i ? " thin" : "") })),
      dots: [{ at: record.best_index, value: record.similarity.max }],
      marks: [{ value: record.chance?.max, text: "chance of the best" }] })),
    ...multiples(map, record));
}

function figure(heading, extra, drawing) {
  return node("figure", { class: "lm-figure" }, node("figcaption", {}, heading, extra), drawing);
}

function key(pinned) {
  return node("span", { class: "lm-figure-key" }, node("span", { class: "k-mllm" }, "━ MLLM"), node("span", { class: "k-math" }, "╍ math"),
    pinned ? node("span", {}, `thin: ${pinned}`) : null);
}

// Lines over the logarithm of the rank. `log` says whether the values are on a log scale too.
function lineChart({ width, series, log, label, marks = [], dots = [] }) {
  const height = 150, left = 34, right = 6, top = 8, bottom = 18;
  const last = Math.log(Math.max(...series.flatMap((s) => s.index), 2));
  const values = series.flatMap((s) => s.values).filter((v) => !log || v > 0);
  const low = log ? Math.floor(Math.log10(Math.max(Math.min(...values), Math.max(...values) * 1e-5))) : 0;
  const high = log ? Math.log10(Math.max(...values)) : 1;
  const y = (v) => height - bottom - ((Math.max(log ? Math.log10(Math.max(v, 1e-300)) : v, low) - low) / (high - low || 1)) * (height - top - bottom);
  const x = (i) => left + (Math.log(i) / last) * (width - left - right);
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, class: "lm-chart", role: "img", "aria-label": label });
  const ticks = log ? Array.from({ length: Math.floor(high) - low + 1 }, (_, i) => low + i) : [0, 0.5, 1];
  for (const tick of ticks) {
    const at = y(log ? 10 ** tick : tick);
    svg.append(shape("line", { x1: left, x2: width - right, y1: at, y2: at, class: "lm-rule" }),
      shape("text", { x: left - 5, y: at + 4, class: "lm-note", "text-anchor": "end" }, log ? `1e${tick}` : String(tick)));
  }
  for (let rank = 1; Math.log(rank) <= last; rank *= 10) {
    svg.append(shape("text", { x: x(rank), y: height - 4, class: "lm-note", "text-anchor": rank === 1 ? "start" : "middle" }, rank === 1 ? "rank 1" : String(rank)));
  }
  for (const s of series) svg.append(shape("path", { class: s.style, d: polyline(s.index.map(x), s.values.map(y)) }));
  for (const { at, value } of dots) {
    if (at && Number.isFinite(value)) svg.append(shape("circle", { cx: x(at), cy: y(value), r: 4.5, class: "lm-best" }, shape("title", {}, `best: ${fixed(value)} at rank ${at}`)));
  }
  for (const { value, text } of marks) {
    if (!(value > 0) || (log && Math.log10(value) < low) || y(value) < top) continue;
    svg.append(shape("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), class: "lm-mark" }),
      shape("text", { x: width - right, y: y(value) - 4, "text-anchor": "end", class: "lm-note" }, text));
  }
  return svg;
}

const polyline = (xs, ys) => xs.map((x, i) => `${i ? "L" : "M"}${x.toFixed(1)} ${ys[i].toFixed(1)}`).join("");

// One panel per layer, all on the same logarithmic axes; a click chooses that layer's matrix.
function multiples(map, record) {
  const { layers } = map.index;
  if (map.narrow || layers.length > 2 * BAND || layers.length < 2) return [];
  const cells = layers.map((layer) => map.index.at.get(layer + "." + record.module));
  const records = cells.map((cell) => cell && cell.experts[Math.min(record.expert, cell.experts.length - 1)]);
  const all = records.filter((r) => r?.index?.length).flatMap((r) => [...r.mllm_sigma, ...r.math_sigma]).filter((v) => v > 0);
  const high = Math.log(Math.max(...all)), low = Math.max(Math.log(Math.min(...all)), high - Math.log(1e5));
  const height = 54, panel = 100, gap = 8;
  const svg = shape("svg", { viewBox: `0 0 ${layers.length * panel} ${height}`, preserveAspectRatio: "none", class: "lm-multiples", "aria-hidden": "true" });
  records.forEach((r, i) => {
    if (!r?.index?.length) return;
    const last = Math.log(r.index[r.index.length - 1]) || 1;
    const xs = r.index.map((rank) => i * panel + gap + (Math.log(rank) / last) * (panel - 2 * gap));
    const ys = (values) => values.map((v) => height - 3 - ((Math.max(Math.log(Math.max(v, 1e-300)), low) - low) / (high - low || 1)) * (height - 8));
    const group = shape("g", { class: r === record ? "lm-panel chosen" : "lm-panel" },
      shape("rect", { x: i * panel + 3, width: panel - 6, y: 0, height, rx: 2 }),
      shape("path", { class: "lm-keep", d: polyline(xs, ys(r.mllm_sigma)) }),
      shape("path", { class: "lm-absorb", d: polyline(xs, ys(r.math_sigma)) }),
      shape("title", {}, `Layer ${r.layer}, ${r.module}`));
    group.cell = cells[i];
    svg.append(group);
  });
  return [node("figure", { class: "lm-figure lm-figure-wide" },
    node("figcaption", {}, `Singular values of ${record.module} in every layer, same axes`), svg)];
}
