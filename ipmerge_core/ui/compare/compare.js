// Compare: two plans side by side in one grid. Arithmetic and grid are the layer map's own files,
// which come before this one; B's layers stand at A's by relative depth. Nothing asks the server.

const find = (selector) => element.querySelector(selector);
const map = {
  expert: -1, mode: "mask", sides: {}, sort: { key: "layer", down: false }, target: null, pinned: null,
  dom: { root: find(".lm"), sum: find(".sum"), grid: find(".lm-grid-holder"), read: find(".lm-read"), table: find(".lm-table-holder") },
};
const LOW = [90, 167, 214], HIGH = [240, 136, 62];
const COLUMNS = [["layer", String], ["module", String], ["merges in", (v) => v], ["similarity A", (v) => fixed(v)], ["similarity B", (v) => fixed(v)],
  ["B − A", (v) => signed(v, 3)], ["change A", percent], ["change B", percent]];

const STATE_WORDS = { both: "merges in both", "only A": "merges only in A", "only B": "merges only in B", neither: "merges in neither" };

const signed = (x, digits) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(digits);

function open(value) {
  const content = typeof value === "string" && value ? JSON.parse(value) : value;
  if (!content || !content.a) { map.dom.root.hidden = true; return; }
  map.dom.root.hidden = false;
  map.sides.a = makeSide("a", content.a, content.a);
  map.sides.b = makeSide("b", content.b || content.a, content.a);
  map.index = map.sides.a.index;
  map.dom.sum.id = (element.id || "compare") + "-sum";
  layOut();
}

// One plan with its pack. A follows Explore; B starts as the first preset that differs from A or, of
// another pair, with A's values, and keeps what was chosen for it while the tab is away.
function makeSide(letter, content, other) {
  const index = indexPack(content.pack), before = map.sides[letter], same = content.id === other.id;
  const own = same ? { label: "Plan of Explore", plan: content.plan } : { label: "As A in Explore", plan: { ...other.plan, overrides: {} } };
  const presets = [own, ...content.presets].map(({ label, plan }) => ({ label, plan: cleanPlan(plan, index) }));
  const differs = presets.findIndex(({ plan }) => !samePlan(plan, cleanPlan(other.plan, index)));
  const start = letter === "a" || !same ? 0 : Math.max(0, differs);
  const kept = letter === "b" && before?.id === content.id;
  const side = { id: content.id, index, presets, plan: kept ? before.plan : presets[start].plan };
  setText(find(`[data-name=${letter}]`), content.pack.name);
  find(`[data-preset=${letter}]`).replaceChildren(...presets.map(({ label }, i) => node("option", { value: i }, label)),
    node("option", { value: "edited" }, "Edited"));
  return side;
}

function layOut() {
  const width = map.dom.root.clientWidth;
  if (!map.index || !width) return;
  map.width = width;
  map.narrow = width < 620;
  map.dom.root.dataset.narrow = String(map.narrow);
  buildGrid(map);
  paintAll();
}

// B's cell at the place of one of A's: the same module at the same relative depth.
function partner(cell) {
  const { a, b } = map.sides, last = a.index.layers.length - 1;
  const depth = last ? a.index.layers.indexOf(cell.layer) / last : 0;
  return b.index.at.get(b.index.layers[Math.round(depth * (b.index.layers.length - 1))] + "." + cell.module);
}

function compareCells() {
  const { a, b } = map.sides;
  const value = (side, cell) => shownSimilarity({ plan: side.plan, expert: -1 }, cell);
  return a.index.cells.filter(partner).map((cell) => {
    const other = partner(cell), ofA = a.result.masks[cell.position], ofB = b.result.masks[other.position];
    return { cell, layer: cell.layer, module: cell.module, other,
      "merges in": ofA.length ? (ofB.length ? "both" : "only A") : ofB.length ? "only B" : "neither",
      "similarity A": value(a, cell), "similarity B": value(b, other), "B − A": value(b, other) - value(a, cell),
      "change A": cellChange(cell, ofA, a.plan), "change B": cellChange(other, ofB, b.plan) };
  });
}

function paintAll() {
  for (const side of Object.values(map.sides)) side.result = previewOf(side.index, side.plan);
  map.rows = compareCells();
  map.differences = map.rows.filter((row) => row["merges in"].startsWith("only"));
  for (const letter of ["a", "b"]) paintSide(letter, map.sides[letter]);
  paintWords();
  paintCells();
  paintPairs();
  paintTable();
  markTargets(map);
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
  map.jaccard = union ? both / union : null;
  setText(map.dom.sum, `Jaccard ${union ? fixed(map.jaccard, 2) : "– (neither merges anything)"} · ${both} in both · ` +
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
  for (const button of map.buttons) Object.assign(button.dataset, { state: "none" });
  for (const row of map.rows) {
    const button = map.buttons[row.cell.position], state = row["merges in"], t = value(row) / top;
    button.dataset.state = isMask ? { both: "both", "only A": "a", "only B": "b", neither: "none" }[state] : "value";
    button.style.setProperty("--d", `rgb(${(t < 0 ? LOW : HIGH).map((c) => Math.round(255 + Math.abs(t) * (c - 255))).join(",")})`);
    setText(button.firstChild, isMask ? "" : words(value(row)).replace(/^(.)0\./, "$1.").replace(" %", ""));
    button.setAttribute("aria-label", `${title(row.cell)}, ${isMask ? STATE_WORDS[state] : words(value(row))}`);
  }
}

// Two bars a layer on one axis: the left (on phones the upper) half is A's.
function paintPairs() {
  const { a, b } = map.sides, changes = (layer) => {
    const other = map.rows.find((row) => row.layer === layer)?.other;
    return [a.result.layer_change[layer], other ? b.result.layer_change[other.layer] : 0];
  };
  const top = niceTop(Math.max(...map.index.layers.flatMap(changes)));
  for (const label of map.dom.grid.querySelectorAll(".lm-bars-top")) setText(label, percent(top));
  for (const { layers, all, marked } of map.bars) {
    const path = (which) => layers.map((layer, i) => {
      const size = (changes(layer)[which] / top) * 100, from = i + 0.12 + 0.4 * which;
      if (!(size > 0)) return "";
      return map.narrow ? `M0 ${from}h${size.toFixed(2)}v.36H0Z` : `M${from} 100v${(-size).toFixed(2)}h.36V100Z`;
    }).join("");
    all.setAttribute("d", path(0));
    marked.setAttribute("d", path(1));
  }
}

function paintTable() {
  const rows = sortRows(map.differences, map.sort);
  map.dom.table.replaceChildren(rows.length
    ? node("table", { class: "lm-numbers lm-table" }, node("caption", {}, `${rows.length} matrices that only one plan merges`),
      sortHeads(COLUMNS.map(([name]) => name), map.sort),
      node("tbody", {}, ...rows.map((row) => node("tr", {}, ...COLUMNS.map(([name, words]) => node("td", {}, words(row[name])))))))
    : node("p", {}, "Both plans merge the same matrices."));
}

function describe() {
  const { target } = map;
  if (!target) { setText(map.dom.read, "Choose a matrix, a layer or a module to read its values."); return; }
  const rows = map.rows.filter((row) => (target.cell ? row.cell === target.cell : row[target.kind] === target[target.kind]));
  if (!rows.length) { setText(map.dom.read, "B has no such matrix."); return; }
  const [row] = rows, number = (word) => rows.filter((each) => each["merges in"] === word).length;
  setText(map.dom.read, target.cell
    ? `${title(row.cell)} ${STATE_WORDS[row["merges in"]]}. Similarity A ${fixed(row["similarity A"])}, B ${fixed(row["similarity B"])}. Change A ${percent(row["change A"])}, B ${percent(row["change B"])}.` +
      (row.other.layer === row.layer ? "" : ` B's layer ${row.other.layer}.`)
    : `${target.kind === "layer" ? "Layer " + target.layer : "All " + target.module}: ${number("both")} in both, ${number("only A")} only in A, ${number("only B")} only in B, ${number("neither")} in neither.`);
}

function choose(button) {
  const place = locate(map, button);
  map.target = button.target;
  if (place) roving(map, ...place);
  markTargets(map);
  describe();
}

element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.target) choose(button);
  else if (button.dataset.mode) {
    map.mode = button.dataset.mode;
    for (const each of element.querySelectorAll("[data-mode]")) each.setAttribute("aria-pressed", String(each === button));
    paintCells();
  } else if (button.dataset.key) {
    const { key } = button.dataset;
    map.sort = { key, down: map.sort.key === key && !map.sort.down };
    paintTable();
    map.dom.table.querySelector(`[data-key="${key}"]`).focus();
  } else if (button.dataset.act === "first") choose(map.buttons[map.differences[0].cell.position]);
});

element.addEventListener("change", ({ target }) => {
  const letter = target.dataset.preset || target.dataset.s || target.dataset.lambda, side = map.sides[letter];
  if (!side) return;
  if (target.dataset.preset) side.plan = side.presets[Number(target.value)]?.plan || side.plan;
  else side.plan = cleanPlan({ ...side.plan, [target.dataset.s ? "s" : "lambda"]: target.value }, side.index);
  paintAll();
});

element.addEventListener("keydown", (event) => {
  if (event.target.target && gridKey(map, event)) event.preventDefault();
});

open(props.value);
watch("value", () => open(props.value));
new ResizeObserver(() => { if (map.index && map.dom.root.clientWidth !== map.width) layOut(); }).observe(map.dom.root);
