// Layer map, the detail panel: the numbers of one matrix (or of two, when one is pinned), or of a
// layer, a range of layers or a module, and the buttons that merge or keep by hand.

function buildDetail(map) {
  const { dom, target } = map;
  map.live = [];  // functions that refresh text while a plan is being dragged
  if (!target) {
    dom.detail.replaceChildren(...nothingChosen(map));
    return;
  }
  dom.detail.replaceChildren(...(target.kind === "cell" ? cellDetail(map, target.cell) : groupDetail(map, target)));
}

// Before a choice: how to choose, and which matrices stand at the edge.
function nothingChosen(map) {
  const [across, down] = map.narrow ? ["parts of a layer", "layers"] : ["layers", "parts of a layer"];
  const edge = (label, pick) => node("tr", {}, node("th", { scope: "row" }, label),
    liveText(map, "td", {}, () => {
      const entry = pick(map.flips.findIndex(({ value }) => value < map.plan.s));
      return entry ? `layer ${entry.cell.layer} · ${entry.cell.module}, ${fixed(entry.value)}` : "–";
    }));
  if (map.layout === "simple") {
    return [node("p", { class: "lm-hint" }, `Choose a square to read what it is and why it merges or stays. Each one is a weight matrix of the language model: columns are ${across}, rows are ${down}.`)];
  }
  return [
    node("p", { class: "lm-hint" }, "Choose a matrix in the map, or press Enter on one, for its numbers, spectra and angles. Heads of rows and columns choose a whole module or layer; dragged across, a range of layers. Shift and click pins a second matrix."),
    node("h2", { class: "lm-minor" }, "At the threshold"),
    node("table", { class: "lm-numbers" }, node("tbody", {},
      edge("next to join", (first) => map.flips[first]),
      edge("next to leave", (first) => map.flips[(first < 0 ? map.flips.length : first) - 1]))),
    node("p", { class: "lm-hint" }, "Keys: [ and ] step to the next matrix that flips, F merges the chosen one always, K keeps it, A lets the threshold decide, 1 to 9 take a kept plan, Ctrl+Z undoes."),
  ];
}

function paintDetail(map, result) {
  for (const refresh of map.live) refresh(result);
}

// A text that follows the plan.
function liveText(map, tag, attributes, text) {
  const made = node(tag, attributes);
  map.live.push((result) => setText(made, text(result)));
  return made;
}

function expertInView(map, cell) {
  if (map.expert >= 0) return map.expert;
  const measure = map.plan.similarity;
  return cell.experts.reduce((best, r, k) => (r.similarity[measure] > cell.experts[best].similarity[measure] ? k : best), 0);
}

function cellDetail(map, cell) {
  const record = cell.experts[expertInView(map, cell)];
  const shownCells = map.pinned && map.pinned !== cell ? [cell, map.pinned] : [cell];
  const state = liveText(map, "span", { class: "lm-chip" }, (result) => (merges(map, result, cell) ? "merges" : "kept"));
  map.live.push((result) => { state.dataset.on = merges(map, result, cell) ? "1" : "0"; });
  const head = node("div", { class: "lm-detail-head" }, node("h2", {}, `Layer ${cell.layer} · ${cell.module}`), state);
  const why = whyBlock(map, cell, record, overrideButtons(map, [cell]));
  if (map.layout === "simple") {
    return [head, node("p", { class: "lm-hint" }, MODULE_MEANING[cell.module] || ""), liveText(map, "p", { class: "lm-verdict" }, () => plainText(map, cell)), why,
      node("p", {}, node("button", { type: "button", class: "lm-quiet", "data-act": "layout", "data-layout": "full" }, "All numbers and spectra"))];
  }
  return [
    head,
    node("p", { class: "lm-name" }, cell.name),
    liveText(map, "p", { class: "lm-verdict" }, () => verdictText(map, cell)),
    why,
    ...expertsTable(map, cell),
    numbersTable(map, shownCells),
    node("p", { class: "lm-acts" }, actionButton("cell-csv", "Numbers as CSV"),
      shownCells.length > 1 ? actionButton("unpin", "Unpin") : actionButton("pin", "Pin to compare")),
  ];
}

function overrideButtons(map, cells) {
  const group = node("div", { class: "lm-seg", role: "group", "aria-label": "Override" });
  for (const [value, label, key] of [["merge", "Merge", "F"], ["keep", "Keep", "K"], ["", "Auto", "A"]]) {
    const button = node("button", { type: "button", "data-act": "override", "data-value": value, title: `Key ${key}` }, label);
    map.live.push(() => button.setAttribute("aria-pressed",
      String(cells.every((cell) => (map.plan.overrides[cell.name] || "") === value))));
    group.append(button);
  }
  return group;
}

function actionButton(act, label) {
  return node("button", { type: "button", class: "lm-quiet", "data-act": act }, label);
}

// With several experts, each is selected by its own similarity.
function expertsTable(map, cell) {
  if (cell.experts.length < 2) return [];
  const rows = cell.experts.map((record, k) => node("tr", {}, node("th", { scope: "row" }, expertName(map, k)),
    liveText(map, "td", {}, () => fixed(record.similarity[map.plan.similarity])),
    liveText(map, "td", {}, (result) => (result.masks[cell.position].includes(k) ? "merges" : "kept"))));
  return [node("table", { class: "lm-numbers" }, node("thead", {}, node("tr", {}, node("td"), node("th", { scope: "col" }, "similarity"), node("th", { scope: "col" }, "state"))),
    node("tbody", {}, ...rows))];
}

function numbersTable(map, cells) {
  const body = node("tbody");
  const row = (label, value, hint) => {
    body.append(node("tr", { title: hint }, node("th", { scope: "row" }, label),
      ...cells.map((cell) => {
        const record = cell.experts[expertInView(map, cell)];
        return typeof value(cell, record) === "function"
          ? liveText(map, "td", {}, value(cell, record)) : node("td", {}, value(cell, record));
      })));
  };
  const ratio = (a, b) => percent(Math.sqrt(a / b));
  for (const measure of MEASURES) row(MEASURE_LABELS[measure], (c, r) => fixed(r.similarity[measure]));
  row("best angle at rank", (c, r) => String(r.best_index ?? "–"));
  if (cells.every((cell) => cell.experts[0].principal)) {
    for (const top of Object.keys(cells[0].experts[0].principal)) {
      row(`subspaces of the first ${top}`, (c, r) => fixed(r.principal[top]), "mean cosine of the principal angles between the leading right directions");
    }
  }
  row("change if merged", (c, r) => () => percent(cellChange(c, [r.expert], map.plan)), "‖λP‖ / ‖W‖ at the current λ");
  row("MLLM moved by", (c, r) => ratio(r.mllm_norm2, r.base_norm2), "‖W_mllm − W₀‖ / ‖W₀‖");
  row("math moved by", (c, r) => ratio(r.math_norm2, r.base_norm2), "‖W_math − W₀‖ / ‖W₀‖");
  row("cosine of the two moves", (c, r) => fixed(r.inner / Math.sqrt(r.mllm_norm2 * r.math_norm2)));
  row("rescaling ρ", (c, r) => fixed(r.rho, 2), "ratio of nuclear norms, MLLM over math");
  row("gap (σ₁ − σ₂) / σ₁", (c, r) => percent(r.gap), "of the MLLM's task vector");
  row("directions above rounding, MLLM | math", (c, r) => `${r.mllm_directions ?? "–"} | ${r.math_directions ?? "–"}`, `of ${Math.min(...cells[0].shape)}: only these take part; the others may be rounding of the stored weights`);
  row("stable rank, MLLM | math", (c, r) => `${fixed(r.mllm_ranks?.stable, 1)} | ${fixed(r.math_ranks?.stable, 1)}`);
  row("effective rank, MLLM | math", (c, r) => `${fixed(r.mllm_ranks?.effective, 1)} | ${fixed(r.math_ranks?.effective, 1)}`);
  row("ranks for 90 % energy, MLLM | math", (c, r) => `${r.mllm_ranks?.energy ?? "–"} | ${r.math_ranks?.energy ?? "–"}`);
  row("shape", (c) => c.shape.join(" × "));
  const heads = cells.length > 1
    ? [node("thead", {}, node("tr", {}, node("td"), ...cells.map((c, i) => node("th", { scope: "col" }, `${c.layer} · ${c.module}${i ? " (pinned)" : ""}`))))] : [];
  return node("table", { class: "lm-numbers" }, ...heads, body);
}

function groupDetail(map, target) {
  const cells = cellsOf(map, target);
  const name = { layer: `Layer ${target.layer}`, module: `All ${target.module} matrices`, range: `Layers ${target.from} to ${target.to}` }[target.kind];
  const heading = node("div", { class: "lm-detail-head" }, node("h2", {}, name));
  if (!cells.length) return [heading, node("p", { class: "lm-hint" }, "Not analysed yet.")];
  const values = cells.map((cell) => shownSimilarity(map, cell)).sort((a, b) => a - b);
  const merging = liveText(map, "p", { class: "lm-verdict" }, (result) => {
    const n = cells.filter((cell) => merges(map, result, cell)).length;
    return `${n} of ${cells.length} merge. Similarity ${fixed(values[0], 2)} to ${fixed(values[values.length - 1], 2)}, median ${fixed(quantile(values, 0.5), 2)}.`;
  });
  const rows = target.kind === "range" ? layersInRange(map, target) : cells.map((cell) => [
    target.kind === "layer" ? cell.module : `layer ${cell.layer}`, () => fixed(shownSimilarity(map, cell)),
    (result) => (result.masks[cell.position].length ? percent(cellChange(cell, result.masks[cell.position], map.plan)) : "kept")]);
  const body = rows.map(([head, ...values]) => node("tr", {}, node("th", { scope: "row" }, head), ...values.map((words) => liveText(map, "td", {}, words))));
  return [heading, merging, overrideButtons(map, cells),
    node("table", { class: "lm-numbers" }, node("thead", {}, node("tr", {}, node("td"),
      node("th", { scope: "col" }, target.kind === "range" ? "merge" : "similarity"), node("th", { scope: "col" }, "change"))), node("tbody", {}, ...body))];
}

function layersInRange(map, target) {
  return map.index.layers.filter((layer) => coversLayer(target, layer)).map((layer) => {
    const cells = map.index.cells.filter((cell) => cell.layer === layer);
    return [`layer ${layer}`, (result) => `${cells.filter((cell) => merges(map, result, cell)).length} of ${cells.length}`,
      (result) => percent(result.layer_change[layer])];
  });
}
