// Compare, two plans in one grid or in two. Arithmetic and grid are the layer map's own files, which
// come before this one; B's layers stand at A's by relative depth. Nothing asks the server.

const find = (selector) => element.querySelector(selector);
const map = {
  expert: -1, mode: "mask", sides: {}, target: null, pinned: null,
  dom: { root: find(".lm"), sum: find(".sum"), grid: find(".cm-one .lm-grid-holder"), read: find(".lm-read"), twins: find(".lm-twins") },
};
const LOW = [90, 167, 214], HIGH = [240, 136, 62];

function open(value) {
  const content = typeof value === "string" && value ? JSON.parse(value) : value;
  if (!content || !content.a) { map.dom.root.hidden = true; return; }
  map.dom.root.hidden = false;
  map.sides.a = makeSide("a", content.a, content.a);
  map.sides.b = makeSide("b", content.b || content.a, content.a);
  map.index = map.sides.a.index;
  map.target = null;
  map.width = 0;  // drawn when the tab is in sight
  map.dom.sum.id = (element.id || "compare") + "-sum";
  buildCompareTwins();
  layOut();
}

// One plan with its pack. A follows Explore; B starts as the first preset that differs from A or, of
// another pair, with A's values, and keeps what was chosen for it while the tab is away.
function makeSide(letter, content, other) {
  const index = indexPack(content.pack), before = map.sides[letter], same = content.id === other.id;
  const side = { id: content.id, index, given: [], presets: [] };
  const own = same ? { label: "Plan of Explore", plan: content.plan } : { label: "As A in Explore", plan: { ...other.plan, overrides: {} } };
  side.given = [own, ...content.presets].map(({ label, plan }) => ({ label, plan: cleanPlan(plan, index) }));
  listPresets(letter, side);
  const { presets } = side;
  const differing = presets.findIndex(({ plan }) => !samePlan(plan, cleanPlan(other.plan, index)));
  const start = letter === "a" || !same ? 0 : Math.max(0, differing);
  const kept = letter === "b" && before?.id === content.id;
  for (const place of element.querySelectorAll(`[data-name=${letter}]`)) setText(place, content.pack.name);
  return Object.assign(side, { plan: kept ? before.plan : presets[start].plan });
}

// What can be chosen for a side: the presets and the plans that the visitor has kept.
function listPresets(letter, side) {
  side.presets = [...side.given, ...keptPlans(side.id, side.index).map(({ label, plan }) => ({ label: `Kept ${label}`, plan }))];
  find(`[data-preset=${letter}]`).replaceChildren(...side.presets.map(({ label }, i) => node("option", { value: i }, label)),
    node("option", { value: "edited" }, "Edited"));
}

function layOut() {
  const width = map.dom.root.clientWidth;
  if (!map.index || !width) return;
  map.width = width;
  map.narrow = width < 620;
  map.dom.root.dataset.narrow = String(map.narrow);
  const twice = map.mode === "side";
  find(".cm-one").hidden = twice;
  find(".cm-two").hidden = !twice;
  if (twice) buildSides(map);
  else buildGrid(map);
  paintAll();
}

// --- painting ---

function paintAll() {
  for (const side of Object.values(map.sides)) side.result = previewOf(side.index, side.plan);
  map.rows = compareCells(map.sides);
  map.differences = map.rows.filter(differs);
  for (const letter of ["a", "b"]) paintSide(letter, map.sides[letter]);
  paintWords();
  const top = niceTop(Math.max(...layerPairs(map.sides).flatMap((row) => [row["change A"], row["change B"]])));
  if (map.mode === "side") paintSides(map, top);
  else {
    paintCells();
    paintPairs(top);
    markTargets(map);
  }
  refreshTwins();
  describe();
}

function paintSide(letter, { presets, plan }) {
  const exact = presets.findIndex((preset) => samePlan(preset.plan, plan)), pick = find(`[data-preset=${letter}]`);
  pick.value = exact >= 0 ? String(exact) : "edited";
  pick.lastChild.hidden = exact >= 0;
  for (const [key, value] of [["s", fixed(plan.s)], ["lambda", lambdaText(plan.lambda)]]) {
    const field = find(`[data-${key}=${letter}]`);
    if (field !== document.activeElement) field.value = value;
  }
}

function paintWords() {
  const { a, b } = map.sides, number = (word) => map.rows.filter((row) => row["merges in"] === word).length;
  const both = number("both"), onlyA = number("only A"), onlyB = number("only B"), union = both + onlyA + onlyB;
  setText(map.dom.sum, `Jaccard ${union ? fixed(both / union, 2) : "– (neither merges anything)"} · ${both} in both · ` +
    `B adds +${onlyB} and drops −${onlyA} · change A ${percent(a.result.relative_change)}, B ${percent(b.result.relative_change)} of ‖W‖ · ` +
    `parameters A ${count(a.result.parameters_touched)}, B ${count(b.result.parameters_touched)}`);
  const depths = [a, b].map((side) => side.index.layers.length);
  setText(find(".lm-source"), depths[0] === depths[1] ? "" : `A has ${depths[0]} layers and B ${depths[1]}: each layer of A stands beside the one of B at the same relative depth.`);
  find("[data-act=first]").disabled = !map.differences.length;
}

function paintCells() {
  const isMask = map.mode === "mask", value = (row) => (map.mode === "change" ? row["change B"] - row["change A"] : row["B − A"]);
  const top = Math.max(1e-9, ...map.rows.map((row) => Math.abs(value(row))));
  find(".cm-mask-key").hidden = !isMask;
  find(".cm-value-key").hidden = isMask;
  const words = (x) => (map.mode === "change" ? (x < 0 ? "−" : "+") + percent(Math.abs(x)) : signed(x, 2));
  setText(find("[data-out=low]"), words(-top));
  setText(find("[data-out=high]"), words(top));
  for (const button of map.buttons) button.dataset.state = "none";
  for (const row of map.rows) {
    const button = map.buttons[row.cell.position], state = row["merges in"], t = value(row) / top;
    button.dataset.state = isMask ? { both: "both", "only A": "a", "only B": "b", neither: "none" }[state] : "value";
    button.style.setProperty("--d", `rgb(${(t < 0 ? LOW : HIGH).map((c) => Math.round(255 + Math.abs(t) * (c - 255))).join(",")})`);
    setText(button.firstChild, isMask ? "" : words(value(row)).replace(/^(.)0\./, "$1.").replace(" %", ""));
    button.setAttribute("aria-label", `${title(row.cell)}, ${isMask ? STATE_WORDS[state] : words(value(row))}`);
  }
}

// Two bars a layer on one axis: the left (on phones the upper) half is A's.
function paintPairs(top) {
  const pairs = new Map(layerPairs(map.sides).map((row) => [row.layer, [row["change A"], row["change B"]]]));
  for (const label of map.dom.grid.querySelectorAll(".lm-bars-top")) setText(label, percent(top));
  for (const { layers, all, marked } of map.bars) {
    const path = (which) => layers.map((layer, i) => {
      const size = (pairs.get(layer)[which] / top) * 100, from = i + 0.12 + 0.4 * which;
      if (!(size > 0)) return "";
      return map.narrow ? `M0 ${from}h${size.toFixed(2)}v.36H0Z` : `M${from} 100v${(-size).toFixed(2)}h.36V100Z`;
    }).join("");
    all.setAttribute("d", path(0));
    marked.setAttribute("d", path(1));
  }
}

function buildCompareTwins() {
  map.dom.twins.replaceChildren(
    twin({ title: "Table of differences", stem: "ipmerge-differences", columns: COLUMNS, rows: () => map.differences.map(plain) }),
    twin({ title: "Table of all matrices", stem: "ipmerge-comparison", columns: COLUMNS, rows: () => map.rows.map(plain) }),
    twin({ title: "Table of layers", stem: "ipmerge-comparison-layers", rows: () => layerPairs(map.sides),
      columns: [["layer", String], ["layer of B", String], ["change A", percent], ["change B", percent]] }));
}

function describe() {
  const { target, sides: { a, b } } = map;
  if (!target) { setText(map.dom.read, "Choose a matrix, a layer or a module to read its values."); return; }
  if (target.cell) {
    const other = map.mode === "side" ? b.target?.cell : partnerOf(a, b, target.cell);
    const row = map.rows.find((each) => each.cell === target.cell && each.other === other);
    const where = other && other.layer !== target.cell.layer ? ` (layer ${other.layer})` : "";
    setText(map.dom.read, `${title(target.cell)}${row ? " " + STATE_WORDS[row["merges in"]] : ""}. A: ${cellWords(a, target.cell)}. B${where}: ${cellWords(b, other)}.`);
    return;
  }
  const rows = map.rows.filter((row) => row[target.kind] === target[target.kind]), number = (word) => rows.filter((each) => each["merges in"] === word).length;
  setText(map.dom.read, `${target.kind === "layer" ? "Layer " + target.layer : "All " + target.module}: ${number("both")} in both, ` +
    `${number("only A")} only in A, ${number("only B")} only in B, ${number("neither")} in neither.`);
}

// --- what a hand does ---

function choose(button) {
  const letter = button.closest("[data-grid]")?.dataset.grid;
  if (letter) { chooseInSide(map, button, letter); return; }
  const place = locate(map, button);
  map.target = button.target;
  if (place) roving(map, ...place);
  markTargets(map);
  describe();
}

function setMode(button) {
  map.mode = button.dataset.mode;
  map.target = null;
  for (const each of element.querySelectorAll("[data-mode]")) each.setAttribute("aria-pressed", String(each === button));
  layOut();
}

element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button || twinAction(button)) return;
  if (button.target) choose(button);
  else if (button.dataset.mode) setMode(button);
  else if (button.dataset.act === "first") {
    const { position } = map.differences[0].cell;
    choose(map.mode === "side" ? map.sides.a.buttons[position] : map.buttons[position]);
  }
});

element.addEventListener("change", ({ target }) => {
  const letter = target.dataset.preset || target.dataset.s || target.dataset.lambda, side = map.sides[letter];
  if (!side) return;
  if (target.dataset.preset) side.plan = side.presets[Number(target.value)]?.plan || side.plan;
  else side.plan = cleanPlan({ ...side.plan, [target.dataset.s ? "s" : "lambda"]: target.value }, side.index);
  paintAll();
});

element.addEventListener("keydown", (event) => {
  const letter = event.target.closest("[data-grid]")?.dataset.grid;
  if (event.target.target && gridKey(letter ? map.sides[letter] : map, event)) event.preventDefault();
});

window.addEventListener(KEPT_EVENT, () => {
  for (const [letter, side] of Object.entries(map.sides)) { listPresets(letter, side); if (side.result) paintSide(letter, side); }
});

open(props.value);
watch("value", () => open(props.value));
new ResizeObserver(() => { if (map.index && map.dom.root.clientWidth !== map.width) layOut(); }).observe(map.dom.root);
