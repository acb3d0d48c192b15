// Layer map 6/10, the detail panel: the numbers of one matrix (or of two, when one is pinned), or of
// a whole layer or module, the three override buttons, and "Why?" answered from the live values.

function buildDetail(map) {
  const { dom, target } = map;
  map.live = [];  // functions that refresh text while a plan is being dragged
  if (!target) {
    dom.detail.replaceChildren(...nothingChosen(map));
    return;
  }
  dom.detail.replaceChildren(...(target.kind === "cell" ? cellDetail(map, target.cell) : groupDetail(map, target)));
}

// Before a choice: how to choose, which matrices stand at the edge, and how steep the edge is.
function nothingChosen(map) {
  const edge = (label, pick) => node("tr", {}, node("th", { scope: "row" }, label),
    liveText(map, "td", {}, () => {
      const entry = pick(flipValues(map.index, map.plan));
      return entry ? `layer ${entry.cell.layer} · ${entry.cell.module}, ${fixed(entry.value)}` : "–";
    }));
  const within = (width) => () => {
    const near = flipValues(map.index, map.plan).filter(({ value }) => Math.abs(value - map.plan.s) < width);
    return `${near.filter(({ value }) => value < map.plan.s).length} join below, ${near.filter(({ value }) => value >= map.plan.s).length} leave above`;
  };
  return [
    node("p", { class: "lm-hint" }, "Choose a matrix in the map, or press Enter on one, for its numbers, spectra and angles. Heads of rows and columns choose a whole module or layer. Shift and click pins a second matrix."),
    node("h2", { class: "lm-minor" }, "At the threshold"),
    node("table", { class: "lm-numbers" }, node("tbody", {},
      edge("next to join", (values) => values.find(({ value }) => value < map.plan.s)),
      edge("next to leave", (values) => values.filter(({ value }) => value >= map.plan.s).pop()),
      node("tr", {}, node("th", { scope: "row" }, "within 0.01"), liveText(map, "td", {}, within(0.01))),
      node("tr", {}, node("th", { scope: "row" }, "within 0.05"), liveText(map, "td", {}, within(0.05))))),
    node("p", { class: "lm-hint" }, "Keys: [ and ] step to the next matrix that flips, F merges the chosen one always, K keeps it, A lets the threshold decide, Ctrl+Z undoes."),
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
  const verdict = liveText(map, "p", { class: "lm-verdict" }, () => verdictText(map, cell));
  const state = liveText(map, "span", { class: "lm-chip" }, (result) => (merges(map, result, cell) ? "merges" : "kept"));
  map.live.push((result) => { state.dataset.on = merges(map, result, cell) ? "1" : "0"; });
  return [
    node("div", { class: "lm-detail-head" }, node("h2", {}, `Layer ${cell.layer} · ${cell.module}`), state),
    node("p", { class: "lm-name" }, cell.name),
    verdict,
    whyBlock(map, cell, record, overrideButtons(map, [cell])),
    numbersTable(map, shownCells),
    node("p", { class: "lm-acts" }, actionButton("cell-csv", "Numbers as CSV"),
      shownCells.length > 1 ? actionButton("unpin", "Unpin") : actionButton("pin", "Pin to compare")),
  ];
}

function verdictText(map, cell) {
  const { s, similarity, overrides } = map.plan, value = shownSimilarity(map, cell), text = fixed(value);
  if (overrides[cell.name] === "merge") return `Always merged, by your choice. Its similarity is ${text}.`;
  if (overrides[cell.name] === "keep") return `Always kept, by your choice. Its similarity is ${text}.`;
  return value >= s
    ? `Merges: ${MEASURE_LABELS[similarity]} is ${text}, at or above S_α ${fixed(s)}.`
    : `Kept: ${MEASURE_LABELS[similarity]} is ${text}. It needs S_α ≤ ${text} to merge.`;
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

function rankOf(map, cell) {
  const value = shownSimilarity(map, cell);
  return 1 + map.index.cells.filter((other) => shownSimilarity(map, other) > value).length;
}

function whyBlock(map, cell, record, buttons) {
  const text = node("div", { class: "lm-why", id: map.id + "why", hidden: "" });
  const button = node("button", { type: "button", class: "lm-quiet", "data-act": "why", "aria-expanded": "false",
    "aria-controls": text.id }, "Why?");
  const first = liveText(map, "p", {}, () => whyText(map, cell));
  const chance = record.chance?.[map.plan.similarity];
  text.append(first, node("p", {}, `Similarity is ${MEASURE_MEANING[map.plan.similarity]}.` +
    (Number.isFinite(chance) ? ` Two unrelated matrices of this size reach about ${fixed(chance, 2)}.` : "")),
  Number.isFinite(record.gap) && record.gap < 0.05 ? node("p", {}, `The first two singular values differ by only ${percent(record.gap)}, so which direction counts as the first is nearly a coin toss here.`) : null,
  actionButton("show-flip", "Show me the flip"));
  return node("div", { class: "lm-whybox" }, node("div", { class: "lm-acts" }, buttons, button), text);
}

function whyText(map, cell) {
  const value = shownSimilarity(map, cell), { s, overrides } = map.plan, text = fixed(value);
  const place = `It ranks ${rankOf(map, cell)} of ${map.index.cells.length}.`;
  if (overrides[cell.name]) return `${title(cell)} is set by hand; without that it would ${value >= s ? "merge" : "be kept"}, with ${text} against S_α ${fixed(s)}. ${place}`;
  return value >= s
    ? `${title(cell)} merges because ${text} ≥ S_α ${fixed(s)}. ${place} It would leave above ${text}.`
    : `${title(cell)} is kept because ${text} < S_α ${fixed(s)}. ${place} It would join at ${text}.`;
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
  row("stable rank, MLLM | math", (c, r) => `${fixed(r.mllm_ranks?.stable, 1)} | ${fixed(r.math_ranks?.stable, 1)}`);
  row("effective rank, MLLM | math", (c, r) => `${fixed(r.mllm_ranks?.effective, 1)} | ${fixed(r.math_ranks?.effective, 1)}`);
  row("shape", (c) => c.shape.join(" × "));
  const heads = cells.length > 1
    ? [node("thead", {}, node("tr", {}, node("td"), ...cells.map((c, i) => node("th", { scope: "col" }, `${c.layer} · ${c.module}${i ? " (pinned)" : ""}`))))] : [];
  return node("table", { class: "lm-numbers" }, ...heads, body);
}

function cellsOf(map, target) {
  if (!target) return [];
  if (target.kind === "cell") return [target.cell];
  return map.index.cells.filter((cell) => (target.kind === "layer" ? cell.layer === target.layer : cell.module === target.module));
}

function groupDetail(map, target) {
  const cells = cellsOf(map, target);
  const name = target.kind === "layer" ? `Layer ${target.layer}` : `All ${target.module} matrices`;
  const values = cells.map((cell) => shownSimilarity(map, cell)).sort((a, b) => a - b);
  const merging = liveText(map, "p", { class: "lm-verdict" }, (result) => {
    const n = cells.filter((cell) => merges(map, result, cell)).length;
    return `${n} of ${cells.length} merge. Similarity ${fixed(values[0], 2)} to ${fixed(values[values.length - 1], 2)}, median ${fixed(quantile(values, 0.5), 2)}.`;
  });
  const body = node("tbody");
  for (const cell of cells) {
    body.append(node("tr", {}, node("th", { scope: "row" }, target.kind === "layer" ? cell.module : `layer ${cell.layer}`),
      node("td", {}, fixed(shownSimilarity(map, cell))),
      liveText(map, "td", {}, (result) => {
        const experts = result.masks[cell.position];
        return experts.length ? percent(cellChange(cell, experts, map.plan)) : "kept";
      })));
  }
  return [node("div", { class: "lm-detail-head" }, node("h2", {}, name)), merging, overrideButtons(map, cells),
    node("table", { class: "lm-numbers" }, node("thead", {}, node("tr", {}, node("td"),
      node("th", { scope: "col" }, "similarity"), node("th", { scope: "col" }, "change"))), body)];
}
