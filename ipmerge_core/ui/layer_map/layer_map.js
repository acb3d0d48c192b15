// Layer map 9/10, the component: state, plan and painting. Runs once per mount, in a scope where
// Gradio gives `element`, `trigger`, `props` and `watch`; the standalone report gives the same four.
// Nothing here talks to the server except trigger('commit') and trigger('cellselect').

const find = (selector) => element.querySelector(selector);

const map = {
  id: element.id || "ipmerge", pack: null, index: null, plan: null, committed: null,
  past: [], future: [], target: null, pinned: null, expert: -1, dragging: false, frame: 0,
  preset: null, paints: [], live: [], packId: "", home: "", sort: null,
  dom: {
    root: find(".lm"), sum: find(".sum"), grid: find(".lm-grid-holder"), detail: find(".lm-detail"), spectra: find(".lm-spectra"),
    hist: find(".lm-hist"), curve: find(".lm-curve"), read: find(".lm-read"), status: find(".lm-status"),
    source: find(".lm-source"), table: find(".lm-table-holder"), link: find(".lm-link"), count: find(".lm-count"),
    note: find(".lm-note-line"), keep: find("[data-out=keep]"), absorb: find("[data-out=absorb]"),
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
  buildTable(map);
  rememberLink(map);
  setText(map.dom.note, "");
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

// The content that Python sent: a pack and a plan; on the first one, the address may say another.
function open(value) {
  const content = typeof value === "string" && value ? JSON.parse(value) : value;
  if (!content || !content.pack) { map.index = null; map.dom.root.hidden = true; return; }
  map.dom.root.hidden = false;
  Object.assign(map, { pack: content.pack, index: indexPack(content.pack), presets: content.presets || [],
    packId: content.id || "", home: content.home || "", past: [], future: [], target: null, pinned: null, expert: -1, preset: null });
  map.plan = cleanPlan(content.plan || {}, map.index);
  map.committed = { ...map.plan, overrides: { ...map.plan.overrides } };
  const first = !map.linkRead, link = first ? readLink(window.location.search, map) : null;
  const elsewhere = link?.pack && link.pack !== map.packId && link.pack !== map.linkAsked;
  map.linkRead = !elsewhere;
  const words = link && !elsewhere ? followLink(link) : "";
  buildPicks();
  layOut();
  setText(map.dom.status, words);
  if (link && !elsewhere && link.plan) { settle(words); if (map.target) choose(map.target); }
  else if (!first) rememberLink(map);
  setText(map.dom.note, words);
  if (elsewhere) {
    map.linkAsked = link.pack;
    trigger("packselect", { pack: link.pack });
  }
}

// Take over what a link says; returns what to tell about it.
function followLink({ pack, plan, cell, problems }) {
  if (pack && pack !== map.packId) return "The link names a pair that is not here, so this one is shown as it starts.";
  if (plan) map.plan = plan;
  if (cell) map.target = { kind: "cell", cell };
  return problems.length ? `Some of the link was not usable and took its default: ${problems.join("; ")}.` : "";
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
