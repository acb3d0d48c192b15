// Layer map, what can be taken away beside tables: JSON of the plan, SVG and PNG of the map with its
// plan in the caption (always light, drawn here and not a picture of the page).

function planJson(map) {
  const { masks, sums, ...preview } = map.result, { name, engine, created, parameters, sources } = map.pack;
  return JSON.stringify({ format: "ipmerge-choice", version: 1, pair: { id: map.packId, name, engine, created, parameters, sources },
    plan: map.plan, arguments: planArguments(map.plan), preview }, null, 1) + "\n";
}

// The keyword arguments of `ipmerge_core.make_plan` for this plan.
function planArguments({ s, lambda, similarity, variant, overrides }) {
  const update = { sum: {}, max: { gamma_norm: "max" }, rescale_only: { ablation: "rescale_only" }, select_only: { ablation: "select_only" } };
  return { similarity_threshold: s, lambda_: lambda, similarity, overrides, ...update[variant] };
}

const fileStem = (map) => `ipmerge-${String(map.pack.name).toLowerCase().replace(/[^a-z0-9]+/g, "-").slice(0, 40).replace(/^-|-$/g, "")}`;

// The map as one SVG picture: heading, sentence, cells, change bars, legend, plan and sources.
function mapPicture(map) {
  const { layers, modules } = map.index, bands = Math.ceil(layers.length / BAND), columns = Math.ceil(layers.length / bands);
  const left = 78, size = columns > 9 ? Math.max(22, Math.floor(1080 / columns)) : Math.floor(646 / columns) - 2, rowHeight = Math.min(34, size), top = 122;
  const bandHeight = 22 + modules.length * (rowHeight + 2) + 66;
  const width = Math.max(760, left + columns * (size + 2) + 30), height = top + bands * bandHeight + 92;
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, width, height, "font-family": "system-ui, 'Segoe UI', Arial, sans-serif", fill: "#1b2330" });
  const text = (x, y, words, extra = {}) => svg.append(shape("text", { x, y, "font-size": 13, ...extra }, words));
  svg.append(shape("defs", {}, shape("pattern", { id: "hatch", width: 6, height: 6, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
    shape("line", { x1: 0, x2: 0, y1: 0, y2: 6, stroke: "#1b2330", "stroke-width": 1.2, opacity: 0.4 }))),
  shape("rect", { width, height, fill: "#ffffff" }));
  text(24, 38, `IPMerge · ${map.pack.name}`, { "font-size": 22, "font-weight": 700 });
  const sentence = map.dom.sum.textContent.split(" · ");
  text(24, 66, sentence.slice(0, 2).join(" · "), { "font-size": 15 });
  text(24, 88, sentence.slice(2).join(" · "), { "font-size": 15 });
  const [low, high] = map.domain;
  layers.forEach((layer, i) => {
    const y0 = top + Math.floor(i / columns) * bandHeight, x = left + (i % columns) * (size + 2);
    text(x + size / 2, y0 + 12, String(layer), { "text-anchor": "middle", "font-size": 11, fill: "#4a5364" });
    modules.forEach((module, j) => {
      const y = y0 + 22 + j * (rowHeight + 2), cell = map.index.at.get(layer + "." + module);
      if (i % columns === 0) text(left - 10, y + rowHeight / 2 + 4, module, { "text-anchor": "end", fill: "#4a5364" });
      if (cell) svg.append(...pictureCell(map, cell, x, y, size, rowHeight, (shownSimilarity(map, cell) - low) / (high - low)));
    });
    const bar = Math.min(1, map.result.layer_change[layer] / map.barTop) * 44, foot = y0 + 22 + modules.length * (rowHeight + 2) + 50;
    svg.append(shape("rect", { x: x + size * 0.14, y: foot - bar, width: size * 0.72, height: bar, fill: "#2b84bb" }));
    if (i % columns === 0) {
      svg.append(shape("line", { x1: left, x2: left + columns * (size + 2), y1: foot, y2: foot, stroke: "#ccd1da" }));
      text(left - 10, foot - 2, "change", { "text-anchor": "end", "font-size": 11, fill: "#4a5364" });
      text(left - 10, foot - 36, percent(map.barTop), { "text-anchor": "end", "font-size": 11, fill: "#4a5364" });
    }
  });
  pictureLegend(map, svg, text, height);
  return svg;
}

function pictureCell(map, cell, x, y, width, height, t) {
  const box = (extra) => shape("rect", { x, y, width, height, rx: 4, ...extra });
  const pin = map.plan.overrides[cell.name] ? [shape("circle", { cx: x + width / 2, cy: y + height / 2, r: 4, fill: "#1b2330", stroke: "#fff", "stroke-width": 2 })] : [];
  return merges(map, map.result, cell)
    ? [box({ fill: "#1b2330" }), shape("rect", { x: x + 2, y: y + 2, width: width - 4, height: height - 4, rx: 3, fill: rgb(t), stroke: "#fff", "stroke-width": 1.5 }), ...pin]
    : [box({ fill: rgb(t), opacity: 0.32 }), box({ fill: "url(#hatch)" }), ...pin];
}

function pictureLegend(map, svg, text, height) {
  const [low, high] = map.domain, y = height - 66;
  for (let i = 0; i < 60; i++) svg.append(shape("rect", { x: 64 + 2 * i, y: y - 10, width: 2.2, height: 12, fill: rgb(i / 59) }));
  text(24, y, fixed(low, 2));
  text(190, y, `${fixed(high, 2)}  ${MEASURE_LABELS[map.plan.similarity]}`);
  svg.append(shape("rect", { x: 360, y: y - 13, width: 24, height: 17, rx: 4, fill: "#1b2330" }), shape("rect", { x: 362, y: y - 11, width: 20, height: 13, rx: 3, fill: "#a59c74", stroke: "#fff" }),
    shape("rect", { x: 460, y: y - 13, width: 24, height: 17, rx: 4, fill: "#8a8678", opacity: 0.32 }), shape("rect", { x: 460, y: y - 13, width: 24, height: 17, rx: 4, fill: "url(#hatch)" }));
  text(390, y, "merges");
  text(490, y, "kept");
  text(24, height - 38, planWords(map.plan, true), { "font-size": 12 });
  text(24, height - 18, sourceWords(map), { "font-size": 11, fill: "#4a5364" });
}

function sourceWords(map) {
  const name = (source) => (source ? shortId(source.id) + (source.revision ? `@${String(source.revision).slice(0, 8)}` : "") : "?");
  const { mllm, base, math } = map.pack.sources;
  return `${name(mllm)} ← ${math.map(name).join(", ")} (base ${name(base)}); analysed ${String(map.pack.created).slice(0, 10)} with IPMerge ${map.pack.engine}${optionWords(map.pack.parameters)}. Geometry, not accuracy.`;
}

// How the pair was analysed, where not in the usual way; the plan merges with these, too.
function optionWords({ quick, rank, temperature = 32 }) {
  const words = [quick && "quick, approximate", rank && `rank ${rank}`, temperature !== 32 && `temperature ${temperature}`];
  return words.filter(Boolean).map((word) => `, ${word}`).join("");
}

const svgText = (map) => '<?xml version="1.0" encoding="UTF-8"?>\n' + new XMLSerializer().serializeToString(mapPicture(map));

function savePng(map) {
  const picture = mapPicture(map), [width, height] = ["width", "height"].map((side) => Number(picture.getAttribute(side)));
  const image = new Image();
  image.onload = () => {
    const canvas = node("canvas", { width: 2 * width, height: 2 * height });
    canvas.getContext("2d").drawImage(image, 0, 0, 2 * width, 2 * height);
    canvas.toBlob((blob) => saveBlob(fileStem(map) + ".png", blob), "image/png");
  };
  image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(new XMLSerializer().serializeToString(picture));
}
