// Layer map, spectra of the chosen matrix from the samples in the pack: singular values, corresponding
// and principal angles (a pinned matrix in thin lines beside them), and the same singular values for
// every layer of its module, one small panel each.

function buildSpectra(map) {
  const { spectra } = map.dom, cell = map.target?.kind === "cell" ? map.target.cell : null;
  const record = cell && cell.experts[expertInView(map, cell)];
  spectra.hidden = map.layout === "simple" || !record?.index?.length;
  if (spectra.hidden) { spectra.replaceChildren(); return; }
  const columns = getComputedStyle(spectra).gridTemplateColumns.split(" ").length;
  const width = Math.max(240, (spectra.clientWidth - 24 * (columns - 1)) / columns);
  const pinned = map.pinned && map.pinned !== cell ? map.pinned.experts[expertInView(map, map.pinned)] : null;
  const records = [record, pinned].filter((r) => r?.index?.length);
  spectra.replaceChildren(sigmaFigure(map, records, width), angleFigure(records, width), ...multiples(map, record),
    server?.report_file ? node("p", { class: "lm-acts lm-figure-wide" }, largeFigureButton(map)) : "");
}

const placeOf = (record) => `layer ${record.layer} · ${record.module}`;
const stemOf = (record, what) => `${what}-layer-${record.layer}-${record.module}`.replace(/[^\w-]+/g, "_");

function sigmaFigure(map, records, width) {
  const [record, pinned] = records;
  return figure({
    heading: `Singular values, ${placeOf(record)}`, stem: stemOf(record, "sigma"),
    extra: node("span", { class: "lm-figure-key" }, node("span", { class: "k-mllm" }, "━ MLLM"), node("span", { class: "k-math" }, "╍ math"),
      pinned ? node("span", {}, `thin: ${placeOf(pinned)}`) : null, scaleSwitch(map)),
    summary: sigmaWords(record) + (pinned ? " Pinned: " + sigmaWords(pinned) : ""),
    rows: () => records.flatMap((r) => r.index.map((rank, i) => ({ layer: r.layer, module: r.module, rank, MLLM: r.mllm_sigma[i], math: r.math_sigma[i] }))),
    columns: [["rank", String], ["MLLM", scientific], ["math", scientific], ["layer", String], ["module", String]],
    drawing: lineChart({
      width, log: map.sigmaScale !== "linear",
      series: records.flatMap((r, i) => [
        { index: r.index, values: r.mllm_sigma, style: "lm-keep" + (i ? " thin" : "") },
        { index: r.index, values: r.math_sigma, style: "lm-absorb" + (i ? " thin" : "") }]),
      marks: [{ value: record.noise_floor, text: "rounding of the stored weights" }] }),
  });
}

function angleFigure(records, width) {
  const [record, pinned] = records;
  return figure({
    heading: "Corresponding angles sᵢ", stem: stemOf(record, "angles"),
    extra: node("span", { class: "lm-figure-key" }, node("span", {}, "◇ best"), node("span", {}, "◆ first k directions, principal")),
    summary: angleWords(record) + (pinned ? " Pinned: " + angleWords(pinned) : ""),
    rows: () => records.flatMap((r) => [
      ...r.index.map((rank, i) => ({ layer: r.layer, module: r.module, rank, kind: "corresponding", cosine: r.angles[i] })),
      ...Object.entries(r.principal || {}).map(([k, cosine]) => ({ layer: r.layer, module: r.module, rank: Number(k), kind: "principal, first k", cosine }))]),
    columns: [["rank", String], ["kind", String], ["cosine", (v) => fixed(v)], ["layer", String], ["module", String]],
    drawing: lineChart({
      width, log: false, top: 1,
      series: records.map((r, i) => ({ index: r.index, values: r.angles, style: "lm-angle" + (i ? " thin" : "") })),
      dots: [...Object.entries(record.principal || {}).filter(([k]) => k <= record.index[record.index.length - 1]).map(([k, value]) => ({ at: Number(k), value, style: "lm-principal", text: `first ${k} directions: mean principal cosine ${fixed(value)}` })),
        { at: record.best_index, value: record.similarity.max, style: "lm-best", text: `best: ${fixed(record.similarity.max)} at rank ${record.best_index}` }],
      marks: [{ value: record.chance?.max, text: "chance of the best" }, { value: record.chance?.first, text: "chance of one" }] }),
  });
}

const scientific = (x) => (x === undefined ? "–" : x === 0 ? "0" : x.toPrecision(4));

function sigmaWords(r) {
  const last = r.index.length - 1;
  return `Singular values of ${placeOf(r)}: the MLLM's task vector falls from ${scientific(r.mllm_sigma[0])} to ${scientific(r.mllm_sigma[last])}, ` +
    `the math model's from ${scientific(r.math_sigma[0])} to ${scientific(r.math_sigma[last])}, over ${r.index[last]} ranks.`;
}

function angleWords(r) {
  return `Cosines of corresponding singular vectors of ${placeOf(r)}: ${fixed(r.angles[0])} at rank 1, best ${fixed(r.similarity.max)} at rank ${r.best_index}` +
    (Number.isFinite(r.chance?.max) ? `, where unrelated matrices reach about ${fixed(r.chance.max)}.` : ".");
}

function scaleSwitch(map) {
  const group = node("span", { class: "lm-seg lm-mini", role: "group", "aria-label": "Scale of the singular values" });
  for (const scale of ["log", "linear"]) {
    group.append(node("button", { type: "button", "data-act": "sigma-scale", "data-scale": scale,
      "aria-pressed": String((map.sigmaScale || "log") === scale) }, scale));
  }
  return group;
}

function largeFigureButton(map) {
  return node("button", { type: "button", class: "lm-quiet", "data-act": "large", "aria-pressed": String(Boolean(map.large)) },
    map.large ? "Hide the large figure" : "Large figure, with values on hover");
}

// One panel per layer, all on the same logarithmic axes; a click chooses that layer's matrix. On narrow
// pages the panels wrap, seven in a row. (The map's own cells are the keyboard's way to choose.)
function multiples(map, record) {
  const { layers } = map.index;
  if (layers.length < 2) return [];
  const cells = layers.map((layer) => map.index.at.get(layer + "." + record.module));
  const records = cells.map((cell) => cell && cell.experts[Math.min(record.expert, cell.experts.length - 1)]);
  const known = records.filter((r) => r?.index?.length);
  const all = known.flatMap((r) => [...r.mllm_sigma, ...r.math_sigma]).filter((v) => v > 0);
  const high = Math.log(Math.max(...all)), low = Math.max(Math.log(Math.min(...all)), high - Math.log(1e5));
  const perRow = map.narrow ? 7 : Math.min(layers.length, BAND), rows = Math.ceil(layers.length / perRow);
  const panel = 100, gap = 8, height = 54;
  const svg = shape("svg", { viewBox: `0 0 ${perRow * panel} ${rows * height}`, preserveAspectRatio: "none", class: "lm-multiples" });
  svg.style.height = `${rows * height}px`;
  records.forEach((r, i) => {
    if (!r?.index?.length) return;
    const left = (i % perRow) * panel, top = Math.floor(i / perRow) * height, last = Math.log(r.index[r.index.length - 1]) || 1;
    const xs = r.index.map((rank) => left + gap + (Math.log(rank) / last) * (panel - 2 * gap));
    const ys = (values) => values.map((v) => top + height - 5 - ((Math.max(Math.log(Math.max(v, 1e-300)), low) - low) / (high - low || 1)) * (height - 12));
    const group = shape("g", { class: r === record ? "lm-panel chosen" : "lm-panel" },
      shape("rect", { x: left + 3, width: panel - 6, y: top + 2, height: height - 4, rx: 2 }),
      shape("path", { class: "lm-keep", d: polyline(xs, ys(r.mllm_sigma)) }),
      shape("path", { class: "lm-absorb", d: polyline(xs, ys(r.math_sigma)) }),
      shape("title", {}, `Layer ${r.layer}, ${r.module}`));
    group.cell = cells[i];
    svg.append(group);
  });
  const firsts = known.map((r) => r.mllm_sigma[0]);
  return [figure({
    heading: `Singular values of ${record.module} in every layer, same axes`, wide: true, drawing: svg, stem: stemOf(record, "sigma-of-all").replace(/-layer-\d+/, ""),
    summary: `Singular values of ${record.module} in ${known.length} layers. The MLLM's largest is between ${scientific(Math.min(...firsts))} and ${scientific(Math.max(...firsts))}.`,
    rows: () => known.flatMap((r) => r.index.map((rank, i) => ({ layer: r.layer, rank, MLLM: r.mllm_sigma[i], math: r.math_sigma[i] }))),
    columns: [["layer", String], ["rank", String], ["MLLM", scientific], ["math", scientific]],
  })];
}
