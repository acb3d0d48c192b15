// Layer map 8/8, the component: state, events and painting. Runs once per mount, in a scope where
// Gradio gives `element`, `trigger`, `props` and `watch`; the standalone report gives the same four.
// Nothing here talks to the server except trigger('commit') and trigger('cellselect').

const find = (selector) => element.querySelector(selector);

const map = {
  id: element.id || "ipmerge", pack: null, index: null, plan: null, committed: null,
  past: [], future: [], target: null, pinned: null, expert: -1, dragging: false, frame: 0,
  preset: null, paints: [], live: [],
  dom: {
    root: find(".lm"), sum: find(".sum"), grid: find(".lm-grid-holder"), detail: find(".lm-detail"), spectra: find(".lm-spectra"),
    hist: find(".lm-hist"), curve: find(".lm-curve"), read: find(".lm-read"), status: find(".lm-status"),
    source: find(".lm-source"), count: find(".lm-count"), foot: find(".lm-foot"),
    keep: find("[data-out=keep]"), absorb: find("[data-out=absorb]"),
    low: find("[data-out=low]"), high: find("[data-out=high]"),
    range: { s: find("[data-range=s]"), lambda: find("[data-range=lambda]") },
    number: { s: find("[data-number=s]"), lambda: find("[data-number=lambda]") },
    pick: Object.fromEntries(["preset", "similarity", "variant", "expert"].map((name) => [name, find(`[data-pick=${name}]`)])),
  },
};

// --- plan: set while dragging, commit when the hand lets go ---

function setPlan(patch) {
  map.plan = { ...map.plan, ...patch };
  if (patch.s !== undefined) map.plan.s = Number(Math.max(0, Math.min(1, patch.s)).toFixed(4));
  if (patch.lambda !== undefined) map.plan.lambda = Math.max(0, Math.min(LAMBDA_MAX, patch.lambda));
  if (!map.frame) map.frame = requestAnimationFrame(paint);
}

function startDrag() {
  if (map.dragging) return;
  map.dragging = true;
  map.dom.root.dataset.dragging = "1";
}

function commit(words) {
  map.dragging = false;
  delete map.dom.root.dataset.dragging;
  if (samePlan(map.plan, map.committed)) { repaint(); return; }
  map.past.push(map.committed);
  map.future = [];
  settle(words);
}

// Take the current plan as the committed one: axes, ghost, spoken sentence, one event to Python.
function settle(words) {
  const recolour = !map.committed || map.committed.similarity !== map.plan.similarity;
  map.committed = { ...map.plan, overrides: { ...map.plan.overrides } };
  if (recolour) rebuildColours();
  rescale();
  repaint();
  ghostGrid(map, map.result);
  setText(map.dom.status, (words ? words + " " : "") + map.dom.sum.textContent);
  post("commit", { s: map.plan.s, lambda: map.plan.lambda, similarity: map.plan.similarity,
    variant: map.plan.variant, overrides: { ...map.plan.overrides } });
}

// Events leave at once, but never two of a kind within a short while: a held-down key would send
// thirty a second. The last one always leaves.
const waiting = {};

function post(name, data) {
  if (waiting[name]) { waiting[name].data = data; return; }
  if (name === "commit") trigger("commit", data);
  else trigger("cellselect", data);
  waiting[name] = {};
  setTimeout(() => {
    const { data: last } = waiting[name];
    waiting[name] = null;
    if (last) post(name, last);
  }, 150);
}

function travel(from, to, words) {
  if (!from.length) { setText(map.dom.status, `Nothing to ${words}.`); return; }
  to.push(map.committed);
  map.plan = from.pop();
  settle(words === "undo" ? "Undone." : "Redone.");
}

const undo = () => travel(map.past, map.future, "undo");
const redo = () => travel(map.future, map.past, "redo");

function flip(direction) {
  const values = flipValues(map.index, map.plan), { s } = map.plan;
  const ahead = direction > 0
    ? values.filter((entry) => entry.value >= s && entry.value < 1).pop()   // raising S_alpha: who leaves next
    : values.find((entry) => entry.value < s);                              // lowering it: who joins next
  if (!ahead) { setText(map.dom.status, direction > 0 ? "No matrix leaves above." : "No matrix joins below."); return; }
  const at = direction > 0 ? Math.min(1, Math.floor(ahead.value * 1e4) / 1e4 + 1e-4) : Math.floor(ahead.value * 1e4) / 1e4;
  setPlan({ s: at });
  commit(`${title(ahead.cell)} ${direction > 0 ? "leaves" : "joins"}.`);
}

function setOverride(cells, value) {
  const overrides = { ...map.plan.overrides };
  for (const cell of cells) {
    if (value) overrides[cell.name] = value;
    else delete overrides[cell.name];
  }
  setPlan({ overrides });
  commit();
}

// --- painting ---

function paint() {
  map.frame = 0;
  if (!map.index) return;
  const start = performance.now();
  const result = map.result = previewOf(map.index, map.plan);
  paintGrid(map, result);
  paintHistogram(map);
  paintCurve(map, result);
  paintBars(map, result);
  paintSentence(result);
  paintInputs();
  paintDetail(map, result);
  map.paints.push(performance.now() - start);
  if (map.paints.length > 500) map.paints.shift();
}

function repaint() {
  if (map.frame) cancelAnimationFrame(map.frame);
  paint();
}

function paintInputs() {
  const { range, number, pick } = map.dom, { s, lambda } = map.plan, active = document.activeElement;
  range.s.value = s;
  range.lambda.value = Math.round(lambdaPosition(lambda));
  if (active !== number.s) number.s.value = fixed(s, Number.isInteger(Math.round(s * 1e6) / 1e3) ? 3 : 4);
  if (active !== number.lambda) number.lambda.value = lambdaText(lambda);
  range.s.setAttribute("aria-valuetext", `${fixed(s)}, ${map.result.selected.length} of ${map.result.n_matrices} matrices merge`);
  range.lambda.setAttribute("aria-valuetext", lambdaText(lambda) + (lambda === 1 ? ", as the paper writes it" : ""));
  pick.similarity.value = map.plan.similarity;
  pick.variant.value = map.plan.variant;
  paintPreset();
  find("[data-act=undo]").disabled = !map.past.length;
  find("[data-act=redo]").disabled = !map.future.length;
}

function paintSentence(result) {
  const { sum } = map.dom, { totals } = map.pack, n = result.selected.length;
  const strong = (text) => node("strong", {}, text);
  const parts = n === 0 ? emptyWords() : [
    strong(`${n} of ${result.n_matrices}`), " matrices merge", dot(),
    strong(count(result.parameters_touched)), ` of ${count(totals.llm_parameters)} language-model parameters (`,
    strong(percent(result.parameters_touched / totals.llm_parameters)), ")", dot(),
    "change ", strong(percent(result.relative_change)), " of ‖W‖", dot(),
    `${bytes(result.bytes_rewritten)} rewritten`, dot(), "vision tower untouched",
  ];
  if (n === result.n_matrices) parts.push(node("em", {}, " Every matrix merges: no selection step is left."));
  else if (n && map.plan.lambda === 0) parts.push(node("em", {}, " λ is 0, so the merged model equals the multimodal model."));
  setText(map.dom.count, `${n} of ${result.n_matrices}`);
  const drift = map.dragging ? driftWords() : null;
  sum.replaceChildren(...parts, ...(drift ? [drift] : []));
}

const dot = () => node("span", { class: "lm-dot", "aria-hidden": "true" }, " · ");

function emptyWords() {
  const best = Math.max(...map.index.cells.map((cell) => Math.max(...cell.experts.map((r) => r.similarity[map.plan.similarity]))));
  return [node("strong", {}, "Nothing merges"), best < map.plan.s
    ? ` above ${fixed(best)}, the highest similarity of this pair. The merged model equals the multimodal model.`
    : ": every matrix is kept by hand. The merged model equals the multimodal model."];
}

// What the drag has added and removed since the last committed plan.
function driftWords() {
  const before = previewOf(map.index, map.committed).selected, now = new Set(map.result.selected);
  const removed = before.filter((name) => !now.has(name)).length;
  return node("span", { class: "lm-drift" }, ` +${now.size - (before.length - removed)} −${removed}`);
}

// --- building ---

function open(value) {
  const content = typeof value === "string" && value ? JSON.parse(value) : value;
  if (!content || !content.pack) { map.index = null; map.dom.root.hidden = true; return; }
  map.dom.root.hidden = false;
  Object.assign(map, { pack: content.pack, index: indexPack(content.pack), presets: content.presets || [],
    past: [], future: [], target: null, pinned: null, expert: -1 });
  const problems = [];
  map.plan = cleanPlan(content.plan || {}, map.index, problems);
  map.committed = { ...map.plan, overrides: { ...map.plan.overrides } };
  buildPicks();
  layOut();
  setText(map.dom.status, problems.length ? `Some values were not usable and took their defaults: ${problems.join("; ")}.` : "");
}

// Everything that depends on the width; also after a resize or a turn of the phone.
function layOut() {
  if (!map.index) return;
  const width = map.dom.root.clientWidth;
  map.width = width;
  map.narrow = width > 0 && width < 620;
  map.dom.root.dataset.narrow = String(map.narrow);
  const columns = map.index.layers.length;
  map.dom.root.dataset.shape = width < 900 ? "stacked" : columns <= 9 ? "few" : columns <= 36 ? "many" : "banded";
  map.dom.root.style.setProperty("--map-width", `${52 + 118 * columns}px`);
  buildGrid(map);
  rebuildColours();
  rescale();
  showChosen();
  ghostGrid(map, previewOf(map.index, map.committed));
}

function rebuildColours() {
  colourGrid(map);
  buildHistogram(map);
}

function rescale() {
  scaleBars(map);
  scaleCurve(map);
  buildCurve(map);
}

function buildPicks() {
  const { pick } = map.dom;
  const options = (select, entries) => select.replaceChildren(...entries.map(([value, text]) => node("option", { value }, text)));
  options(pick.preset, [...map.presets.map((preset, i) => [String(i), preset.label]), ["edited", "Edited"]]);
  options(pick.similarity, MEASURES.map((value) => [value, MEASURE_LABELS[value]]));
  options(pick.variant, VARIANTS.map((value) => [value, VARIANT_LABELS[value]]));
  const experts = map.pack.sources?.math || [];
  options(pick.expert, [["-1", "all, highest"], ...Array.from({ length: map.index.nExperts }, (_, k) => [String(k), shortId(experts[k]?.id, k)])]);
  pick.expert.parentNode.hidden = map.index.nExperts < 2;
  buildTicks(find("[data-ticks=s]"), [0, 0.2, 0.4, 0.6, 0.8, 1].map((v) => [v, v === 0 || v === 1 ? String(v) : v.toFixed(1)]));
  buildTicks(find("[data-ticks=lambda]"), LAMBDA_TICKS.map(([v, text]) =>
    [lambdaPosition(v) / LAMBDA_STEPS, v === 1 ? "1 paper" : text, v === 1]));
}

const shortId = (id, k) => (id ? String(id).replace(/\/+$/, "").split("/").pop() : `expert ${k + 1}`);

function presetPlan(preset) {
  return cleanPlan({ ...preset.plan, overrides: {} }, map.index);
}

function paintPreset() {
  const { preset } = map.dom.pick;
  const exact = map.presets.findIndex((entry) => samePlan(presetPlan(entry), map.plan));
  if (exact >= 0) map.preset = exact;
  preset.value = exact >= 0 ? String(exact) : "edited";
  const base = map.preset !== null ? map.presets[map.preset] : null;
  const edited = preset.querySelector("[value=edited]");
  setText(edited, base && exact < 0 ? `${base.label}, edited` : "Edited");
  edited.hidden = exact >= 0;
  setText(map.dom.source, base ? base.source : "");
}

// --- choosing ---

function choose(target) {
  map.target = target;
  showChosen();
  if (target && target.kind === "cell") {
    post("cellselect", { name: target.cell.name, expert: expertInView(map, target.cell),
      dark: document.body.classList.contains("dark"), narrow: map.narrow });
  }
}

function pin(cell) {
  map.pinned = map.pinned === cell ? null : cell;
  showChosen();
}

function showChosen() {
  buildDetail(map);
  buildSpectra(map);
  markTargets(map);
  repaint();
}

function readOut(target) {
  const text = !target ? "" : target.kind === "cell"
    ? `${title(target.cell)}: similarity ${fixed(shownSimilarity(map, target.cell))}, ${map.buttons[target.cell.position].dataset.on === "1" ? "merges" : "kept"}, change if merged ${percent(cellChange(target.cell, [expertInView(map, target.cell)], map.plan))}`
    : target.kind === "layer" ? `Layer ${target.layer}: predicted change ${percent(map.result.layer_change[target.layer])}` : `All ${target.module} matrices`;
  setText(map.dom.read, text || " ");
}

// --- events: one listener of each kind on the element, so that a rebuilt part needs none ---

const actions = {
  undo, redo,
  reset: () => { map.plan = presetPlan(map.presets[0] || { plan: {} }); commit("Reset."); },
  "flip-on": () => flip(1),
  "flip-back": () => flip(-1),
  override: (button) => setOverride(cellsOf(map, map.target), button.dataset.value),
  pin: () => pin(map.target.cell),
  unpin: () => pin(map.pinned),
  why: (button) => {
    const text = find("#" + CSS.escape(button.getAttribute("aria-controls")));
    text.hidden = !text.hidden;
    button.setAttribute("aria-expanded", String(!text.hidden));
  },
  "show-flip": () => showFlip(map.target.cell),
  "cell-csv": () => saveCellNumbers(map.target.cell),
};

// Move the threshold to where this matrix flips and back, so that the eye can follow.
function showFlip(cell) {
  const home = map.plan.s, away = Math.min(1, shownSimilarity(map, cell) + (shownSimilarity(map, cell) >= home ? 0.001 : 0));
  const still = window.matchMedia("(prefers-reduced-motion: reduce)").matches, start = performance.now();
  startDrag();
  const step = (now) => {
    if (!map.dragging) return;
    const t = Math.min(1, (now - start) / 2400);
    const there = still ? (t < 1 ? 1 : 0) : Math.sin(Math.PI * t) ** 0.5;
    setPlan({ s: t >= 1 ? home : home + (away - home) * there });
    if (t < 1) requestAnimationFrame(step);
    else commit();
  };
  requestAnimationFrame(step);
}

function saveCellNumbers(cell) {
  const rows = [["expert", "index", "mllm_sigma", "math_sigma", "angle"]];
  for (const record of cell.experts) {
    record.index.forEach((i, at) => rows.push([record.expert, i, record.mllm_sigma[at], record.math_sigma[at], record.angles[at]]));
  }
  saveText(`${cell.name}.csv`, rows.map((row) => row.join(",")).join("\n") + "\n", "text/csv");
}

function saveText(name, text, type) {
  const link = node("a", { download: name, href: URL.createObjectURL(new Blob([text], { type })) });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// A number field: what cannot be used is put back, with a sentence.
function numberDone(input) {
  const name = input.dataset.number, usable = input.value !== "" && input.validity.valid;
  if (!usable) {
    const [label, low, high] = name === "s" ? ["S_α", 0, 1] : ["λ", 0, LAMBDA_MAX];
    input.value = name === "s" ? fixed(map.plan.s) : lambdaText(map.plan.lambda);
    setText(map.dom.status, `${label} must be a number from ${low} to ${high}; it is still ${input.value}.`);
  }
  commit();
}

const valueOf = (input) => (input.dataset.range === "lambda" ? lambdaAt(Number(input.value)) : Number(input.value));

element.addEventListener("input", ({ target }) => {
  if (target.dataset.range) { startDrag(); setPlan({ [target.dataset.range]: valueOf(target) }); }
  else if (target.dataset.number && target.value !== "" && target.validity.valid) { startDrag(); setPlan({ [target.dataset.number]: Number(target.value) }); }
});

element.addEventListener("change", ({ target }) => {
  if (target.dataset.range) { setPlan({ [target.dataset.range]: valueOf(target) }); commit(); }
  else if (target.dataset.number) numberDone(target);
  else if (target.dataset.pick === "expert") { map.expert = Number(target.value); rebuildColours(); showChosen(); ghostGrid(map, map.result); }
  else if (target.dataset.pick === "preset") {
    const preset = map.presets[Number(target.value)];
    if (preset) { map.plan = presetPlan(preset); commit(preset.label + "."); }
  } else if (target.dataset.pick) { setPlan({ [target.dataset.pick]: target.value }); commit(); showChosen(); }
});

element.addEventListener("dblclick", ({ target }) => {
  const name = target.dataset.range;
  if (!name) return;
  setPlan({ [name]: presetPlan(map.presets[map.preset || 0] || { plan: {} })[name] });
  commit();
});

element.addEventListener("click", (event) => {
  const panel = event.target.closest(".lm-panel");
  if (panel) { choose({ kind: "cell", cell: panel.cell }); return; }
  const button = event.target.closest("button");
  if (!button || !element.contains(button)) return;
  if (button.dataset.act && actions[button.dataset.act]) { actions[button.dataset.act](button); return; }
  if (!button.target) return;
  const at = locate(map, button);
  if (at) roving(map, ...at);
  if (event.shiftKey && button.target.kind === "cell" && map.target?.kind === "cell" && map.target.cell !== button.target.cell) pin(button.target.cell);
  else choose(button.target);
});

element.addEventListener("pointerover", ({ target }) => { const button = target.closest?.("button"); if (button?.target) readOut(button.target); });
element.addEventListener("focusin", ({ target }) => { if (target.target) readOut(target.target); });

element.addEventListener("keydown", (event) => {
  const { target, key } = event, typing = target.matches("input[type=number], select, textarea");
  if (!map.index) return;
  const used = keyPressed(event, target, key, typing);
  if (used) { event.preventDefault(); event.stopPropagation(); }
});

function keyPressed(event, target, key, typing) {
  const command = event.ctrlKey || event.metaKey, letter = key.toLowerCase();
  if (command && !typing && (letter === "z" || letter === "y")) { (letter === "y" || event.shiftKey ? redo : undo)(); return true; }
  if (command && !(target.target && (key === "Home" || key === "End"))) return false;
  if (key === "Escape" && (map.target || map.pinned)) { map.pinned = null; choose(null); return true; }
  if (typing) return false;
  if (key === "[") { flip(-1); return true; }
  if (key === "]") { flip(1); return true; }
  if (target.dataset.range === "s" && event.shiftKey && /^Arrow/.test(key)) {
    setPlan({ s: map.plan.s + (key === "ArrowRight" || key === "ArrowUp" ? 0.01 : -0.01) });
    commit();
    return true;
  }
  if (!target.target) return false;
  const override = { f: "merge", k: "keep", a: "" }[letter];
  if (override !== undefined) { setOverride(cellsOf(map, target.target), override); return true; }
  return gridKey(map, event);
}

// The two plots are handles as well: press and move anywhere on them.
function plotHandle(svg, name, convert) {
  const move = (event) => {
    const box = svg.getBoundingClientRect();
    setPlan({ [name]: convert(Math.max(0, Math.min(1, (event.clientX - box.left - INSET) / (box.width - 2 * INSET)))) });
  };
  svg.addEventListener("pointerdown", (event) => {
    if (event.button || !map.index) return;
    svg.setPointerCapture(event.pointerId);
    startDrag();
    move(event);
  });
  svg.addEventListener("pointermove", (event) => { if (svg.hasPointerCapture(event.pointerId)) move(event); });
  for (const end of ["pointerup", "pointercancel"]) {
    svg.addEventListener(end, (event) => { if (svg.hasPointerCapture(event.pointerId)) { svg.releasePointerCapture(event.pointerId); commit(); } });
  }
}
plotHandle(map.dom.hist, "s", (t) => Math.round(t * 1000) / 1000);
plotHandle(map.dom.curve, "lambda", (t) => lambdaAt(Math.round(t * LAMBDA_STEPS)));

// --- start ---

map.dom.sum.id = map.id + "sum";
for (const name of ["s", "lambda"]) {
  const range = map.dom.range[name];
  range.id = map.id + name;
  find(`[data-for=${name}]`).setAttribute("for", range.id);
  range.setAttribute("aria-describedby", map.dom.sum.id);
}
element.ipmerge = map;
open(props.value);
watch("value", () => open(props.value));
new ResizeObserver(() => {
  if (map.index && map.dom.root.clientWidth && map.dom.root.clientWidth !== map.width) layOut();
}).observe(map.dom.root);
