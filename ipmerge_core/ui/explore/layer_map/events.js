// Layer map, what a hand does: choosing, buttons, keys, sliders, and the start at the end.
// One listener of each kind sits on the element, so that a rebuilt part needs none of its own.

// --- choosing ---

function choose(target) {
  const ranged = map.target?.kind === "range" || target?.kind === "range";
  map.target = target;
  if (ranged) buildHistogram(map);
  showChosen();
  rememberLink(map);
  drawLarge();
  if (target?.kind === "cell") toured("choose");
}

function pin(cell) {
  map.pinned = map.pinned === cell ? null : cell;
  showChosen();
  drawLarge();
}

function showChosen() {
  buildDetail(map);
  buildSpectra(map);
  markTargets(map);
  repaint();
}

// The chosen matrix and, where there is one, the pinned one.
const chosenCells = () => [map.target?.cell, map.pinned].filter((cell, i, all) => cell && all.indexOf(cell) === i);

// The large figure is drawn by the server, so only where it has been asked for.
function drawLarge() {
  const cell = map.target?.kind === "cell" ? map.target.cell : null, shown = Boolean(map.large && cell && map.layout === "full");
  map.dom.root.dataset.large = String(shown);
  find(".lm-large-line").hidden = !shown;
  if (!shown) return;
  setText(find("[data-out=large]"), `Large figure of ${chosenCells().map((one) => `layer ${one.layer} · ${one.module}`).join(" and ")}`);
  const named = (one) => ({ name: one.name, expert: expertInView(map, one) });
  post("cellselect", { ...named(cell), pinned: chosenCells().slice(1).map(named)[0] || null,
    dark: document.body.classList.contains("dark"), narrow: map.narrow });
}

function setLayout(layout) {
  map.layout = layout;
  remember("layout", layout);
  layOut();
  drawLarge();
}

const tryTab = () => document.getElementById("tab-try-button");

function readOut(target) {
  if (target.kind === "cell") toured("read", target.cell);
  const text = !target ? "" : target.kind === "cell"
    ? `${title(target.cell)}: similarity ${fixed(shownSimilarity(map, target.cell))}, ${map.buttons[target.cell.position].dataset.on === "1" ? "merges" : "kept"}, change if merged ${percent(cellChange(target.cell, [expertInView(map, target.cell)], map.plan))}`
    : !cellsOf(map, target).length ? "Not analysed yet"
    : target.kind === "layer" ? `Layer ${target.layer}: predicted change ${percent(map.result.layer_change[target.layer])}` : `All ${target.module} matrices`;
  setText(map.dom.read, text || " ");
}

// --- actions of buttons, by their data-act ---

const actions = {
  undo, redo,
  reset, "keep-plan": keepPlan,
  layout: (button) => setLayout(button.dataset.layout),
  tour: startTour,
  "tour-next": () => showStep(tour.step + 1),
  "tour-end": endTour,
  answer: () => { toured("answer"); tryTab().click(); },
  "sigma-scale": (button) => {
    map.sigmaScale = button.dataset.scale;
    buildSpectra(map);
    find(`[data-scale=${map.sigmaScale}]`).focus();
  },
  large: () => { map.large = !map.large; drawLarge(); buildSpectra(map); find(".lm-spectra [data-act=large]").focus(); },
  "flip-on": () => flip(1),
  "flip-back": () => flip(-1),
  override: (button) => setOverride(cellsOf(map, map.target), button.dataset.value),
  pin: () => pin(map.target.cell),
  unpin: () => pin(map.pinned),
  why: (button) => {
    const text = find("#" + CSS.escape(button.getAttribute("aria-controls")));
    text.hidden = !text.hidden;
    button.setAttribute("aria-expanded", String(!text.hidden));
    repaint();
  },
  "show-flip": () => showFlip(map.target.cell),
  "cell-csv": () => saveCellNumbers(chosenCells()),
  csv: () => saveText(fileStem(map) + ".csv", csvText(tableRows(map)), "text/csv"),
  json: () => saveText(fileStem(map) + ".json", planJson(map), "application/json"),
  svg: () => saveText(fileStem(map) + ".svg", svgText(map), "image/svg+xml"),
  png: () => savePng(map),
  html: saveReport,
  link: copyLink,
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

function saveCellNumbers(cells) {
  const rows = cells.flatMap((cell) => cell.experts.flatMap((record) => record.index.map((rank, at) => ({ name: cell.name, expert: record.expert, rank,
    mllm_sigma: record.mllm_sigma[at], math_sigma: record.math_sigma[at], angle: record.angles[at] }))));
  saveText(`${cells.map((cell) => cell.name).join("-and-")}.csv`, csvText(rows), "text/csv");
}

// Copy the address of exactly this state; where the clipboard is closed, show it, selected.
async function copyLink() {
  const address = linkAddress(map), { link } = map.dom;
  try {
    await navigator.clipboard.writeText(address);
    tell("Link copied.");
  } catch {
    link.hidden = false;
    link.value = address;
    link.focus();
    link.select();
    setText(map.dom.note, "Copy the link from the field.");
  }
}

// One HTML file that needs no server: this component with the pack inside, put together in Python.
async function saveReport() {
  setText(map.dom.note, "Writing the report …");
  try {
    saveText(fileStem(map) + ".html", await server.report_file(map.packId, map.plan), "text/html");
    setText(map.dom.note, "Report saved.");
  } catch {
    setText(map.dom.note, "The report could not be written. Reload the page and try again.");
  }
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

// --- listeners ---

element.addEventListener("input", ({ target }) => {
  if (target.dataset.range) { startDrag(); used(target.dataset.range); setPlan({ [target.dataset.range]: valueOf(target) }); }
  else if (target.dataset.number && target.value !== "" && target.validity.valid) { startDrag(); map.typing = target; setPlan({ [target.dataset.number]: Number(target.value) }); }
});

element.addEventListener("change", ({ target }) => {
  if (target.dataset.range) { setPlan({ [target.dataset.range]: valueOf(target) }); commit(); }
  else if (target.dataset.number) numberDone(target);
  else if (target.dataset.pick === "expert") { map.expert = Number(target.value); rebuildColours(); showChosen(); ghostGrid(map, map.ghost); }
  else if (target.dataset.pick === "preset") takePreset(entries()[Number(target.value)]);
  else if (target.dataset.pick) { setPlan({ [target.dataset.pick]: target.value }); commit(); showChosen(); }
});

element.addEventListener("dblclick", ({ target }) => {
  if (!target.closest(".lm-range, .lm-hist, .lm-curve")) return;
  const name = target.closest("[data-dial]").dataset.dial;
  setPlan({ [name]: presetPlan(entries()[map.preset || 0] || { plan: {} })[name] });
  commit();
});

element.addEventListener("click", (event) => {
  const panel = event.target.closest(".lm-panel");
  if (panel) { choose({ kind: "cell", cell: panel.cell }); return; }
  const button = event.target.closest("button");
  if (!button || !element.contains(button)) return;
  if (twinAction(button)) return;
  if (button.dataset.act && actions[button.dataset.act]) { actions[button.dataset.act](button); return; }
  if (!button.target) return;
  const at = locate(map, button);
  if (at) roving(map, ...at);
  if (event.shiftKey && button.target.kind === "layer" && stretch(button.target.layer)) return;
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
  if (key === "Enter" && target.dataset.number) numberDone(target);  // no change event comes where the field held this value before
  if (typing) return false;
  if (/^[1-9]$/.test(key)) return numberKey(Number(key));
  if (key === "[") { flip(-1); return true; }
  if (key === "]") { flip(1); return true; }
  if (target.dataset.range === "s" && event.shiftKey && /^Arrow/.test(key)) {
    setPlan({ s: map.plan.s + (key === "ArrowRight" || key === "ArrowUp" ? 0.01 : -0.01) });
    commit();
    return true;
  }
  if (!target.target) return false;
  const override = { f: "merge", k: "keep", a: "" }[letter];
  if (override !== undefined) { setOverride(cellsOf(map, inChosenRange(target.target) ? map.target : target.target), override); return true; }
  const moved = gridKey(map, event), { target: reached } = document.activeElement;
  if (event.shiftKey && target.target.kind === "layer" && reached?.kind === "layer") {
    if (map.target?.kind !== "layer" && map.target?.kind !== "range") map.target = target.target;
    stretch(reached.layer);
  }
  return moved;
}

// A head inside the brushed range stands for the range.
const inChosenRange = (target) => target.kind === "layer" && map.target?.kind === "range" && coversLayer(map.target, target.layer);

// "Drag me" has done its work once the threshold has been moved.
function used(name) {
  if (name !== "s" || map.dom.dragMe.hidden) return;
  map.dom.dragMe.hidden = true;
  remember("dragged", true);
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
    used(name);
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
find("[data-act=html]").hidden = !server?.report_file;
find("[data-act=link]").hidden = window.location.protocol === "file:";
map.dom.root.dataset.present = String(map.onStage);
map.layout = recall("layout", server ? "simple" : "full") === "simple" ? "simple" : "full";
map.dom.dragMe.hidden = map.onStage || recall("dragged", false);
element.ipmerge = map;
open(props.value);
watch("value", () => open(props.value));
new ResizeObserver(() => {
  if (map.index && map.dom.root.clientWidth && map.dom.root.clientWidth !== map.width) layOut();
}).observe(map.dom.root);
if (map.index && mayInvite(arrival)) inviteToTour();
