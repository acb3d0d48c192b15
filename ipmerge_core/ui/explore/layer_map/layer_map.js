// Layer map, the component: state, plan and painting. Runs once per mount, in a scope where Gradio
// gives `element`, `trigger`, `props`, `server` and `watch`; the standalone report gives the same.
// Nothing here talks to the server except trigger('commit'), trigger('cellselect'), trigger('packselect').

const find = (selector) => element.querySelector(selector);
const arrival = new URLSearchParams(window.location.search);  // how the visitor came, before we write there

const map = {
  id: element.id || "ipmerge", pack: null, index: null, plan: null, committed: null,
  past: [], future: [], journey: null, target: null, pinned: null, expert: -1, dragging: false, typing: null, frame: 0,
  preset: null, presets: [], kept: [], flips: [], before: null, ghost: null, paints: [], live: [], packId: "", home: "", unanswered: 0,
  onStage: arrival.get("present") === "1", layout: "full",
  dom: {
    root: find(".lm"), sum: find(".sum"), grid: find(".lm-grid-holder"), detail: find(".lm-detail"), spectra: find(".lm-spectra"),
    hist: find(".lm-hist"), curve: find(".lm-curve"), read: find(".lm-read"), status: find(".lm-status"),
    source: find(".lm-source"), twins: find(".lm-twins"), link: find(".lm-link"), count: find(".lm-count"),
    note: find(".lm-note-line"), drift: find(".lm-drift"), dragMe: find(".lm-drag-me"),
    ...Object.fromEntries(["keep", "absorb", "low", "high", "sense"].map((name) => [name, find(`[data-out=${name}]`)])),
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

const copyOf = (plan) => ({ ...plan, overrides: { ...plan.overrides } });

function startDrag() {
  if (map.dragging) return;
  map.dragging = true;
  map.ghost = map.before;
  ghostGrid(map, map.ghost);
  map.dom.root.dataset.dragging = "1";
  delete map.dom.root.dataset.after;
}

function commit(words) {
  map.dragging = false;
  map.typing = null;
  delete map.dom.root.dataset.dragging;
  if (samePlan(map.plan, map.committed)) { repaint(); return; }
  map.past.push(place());
  map.future = [];
  for (const name of ["s", "lambda"]) if (map.plan[name] !== map.committed[name]) toured(name);
  settle(words);
}

// Take the current plan as the committed one: axes, ghost, spoken sentence, one event to Python.
function settle(words) {
  const recolour = map.committed.similarity !== map.plan.similarity;
  map.committed = copyOf(map.plan);
  map.flips = flipValues(map.index, map.plan);
  map.ghost = map.before;
  if (recolour) rebuildColours();
  rescale();
  repaint();
  ghostGrid(map, map.ghost);
  map.dom.root.dataset.after = "1";
  map.before = map.result;
  describeDials(map);
  refreshTwins();
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
  if (name === "commit") { map.unanswered += 1; trigger("commit", data); }
  else trigger("cellselect", data);
  waiting[name] = {};
  setTimeout(() => {
    const { data: last } = waiting[name];
    waiting[name] = null;
    if (last) post(name, last);
  }, 150);
}

// Whether the server knows the plan on show: other tabs wait for that before they ask about it.
map.isSettled = () => map.unanswered <= 0 && !waiting.commit?.data;

// Say something where it is seen and where it is heard.
function tell(words) {
  setText(map.dom.note, words);
  setText(map.dom.status, words);
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
  paintSense(result);
  paintDrift(result);
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
  const { range, number, dragMe } = map.dom, { s, lambda } = map.plan;
  range.s.value = s;
  range.lambda.value = Math.round(lambdaPosition(lambda));
  if (map.typing !== number.s) number.s.value = fixed(s, Number.isInteger(Math.round(s * 1e6) / 1e3) ? 3 : 4);
  if (map.typing !== number.lambda) number.lambda.value = lambdaText(lambda);
  range.s.setAttribute("aria-valuetext", `${fixed(s)}, ${map.result.selected.length} of ${map.result.n_matrices} matrices merge`);
  range.lambda.setAttribute("aria-valuetext", lambdaText(lambda) + (lambda === 1 ? ", as the paper writes it" : ""));
  if (!dragMe.hidden) dragMe.style.setProperty("--at", s);
  if (!map.dragging) paintChoices();
}

// --- building ---

// The content that Python sent: a pack and a plan; on the first one, the address may say another. What
// was on show before goes to the past, so that a change of the pair can be undone.
function open(value) {
  const content = typeof value === "string" && value ? JSON.parse(value) : value;
  if (!content || !content.pack) { map.index = null; map.dom.root.hidden = true; return; }
  map.dom.root.hidden = false;
  delete map.dom.root.dataset.growing;
  setText(map.dom.read, " ");
  const left = map.index ? place() : null, again = content.id === map.packId, cell = again && map.target?.cell?.name;
  Object.assign(map, { pack: content.pack, index: indexPack(content.pack), presets: content.presets || [],
    packId: content.id || "", home: content.home || "", target: null, pinned: null, expert: -1, preset: null });
  const journey = map.journey?.pack === map.packId ? map.journey : null;
  map.journey = null;
  map.plan = cleanPlan(content.plan || {}, map.index);
  if (left && map.linkRead && !journey && !(again && samePlan(left.plan, map.plan))) { map.past.push(left); map.future = []; }
  begin();
  if (map.index.byName.has(cell)) map.target = { kind: "cell", cell: map.index.byName.get(cell) };
  const link = map.linkRead ? null : readLink(linkSearch(), map);
  const elsewhere = link?.pack && link.pack !== map.packId && link.pack !== map.linkAsked;
  const words = link && !elsewhere ? followLink(link) : "";
  buildPicks();
  layOut();
  setText(map.dom.status, words);
  if (journey) { map.plan = cleanPlan(journey.plan, map.index); begin(); settle(journey.words); }
  else if (link && !elsewhere && link.plan) { settle(words); if (map.target) choose(map.target); }
  else if (map.linkRead) rememberLink(map);
  setText(map.dom.note, words);
  map.linkRead = !elsewhere;
  growLater();
  if (elsewhere) {
    map.linkAsked = link.pack;
    trigger("packselect", { pack: link.pack });
  }
}

// The plan on show is where everything starts from: committed, with nothing joined or left.
function begin() {
  map.committed = copyOf(map.plan);
  map.before = map.ghost = map.result = previewOf(map.index, map.plan);
  map.flips = flipValues(map.index, map.plan);
  map.sentence = null;
}

// Take over what a link says; returns what to tell about it.
function followLink({ pack, plan, cell, problems }) {
  if (pack && pack !== map.packId) return "The link names a pair that is not here, so this one is shown as it starts.";
  if (plan) { map.plan = plan; begin(); }
  if (cell) map.target = { kind: "cell", cell };
  return problems.length ? `Some of the link was not usable and took its default: ${problems.join("; ")}.` : "";
}

// Everything that depends on the width; also after a resize or a turn of the phone.
function layOut() {
  if (!map.index) return;
  const { root } = map.dom, width = root.clientWidth, columns = map.index.layers.length;
  map.width = width;
  map.narrow = width > 0 && width < 620;
  root.dataset.narrow = String(map.narrow);
  root.dataset.layout = map.layout;
  root.dataset.shape = width < 1020 ? "stacked" : columns <= 9 ? "few" : columns <= 36 ? "many" : "banded";
  root.style.setProperty("--map-width", `${52 + 118 * columns}px`);
  find("[data-act=answer]").hidden = !tryTab();
  buildGrid(map);
  rebuildColours();
  rescale();
  showChosen();
  ghostGrid(map, map.ghost);
  describeDials(map);
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
