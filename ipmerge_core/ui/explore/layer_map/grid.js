// Layer map, the picture: a grid of modules by layers with one button per matrix.
// Colour tells the similarity; frame and full colour against hatch and dimmed tell what merges.
// Wide pages lay layers out as columns, in bands when there are many; narrow pages turn the grid.

const BAND = 44;

// The similarity a cell shows: of the expert in view, or the highest of all.
function shownSimilarity(map, cell) {
  const values = cell.experts.map((record) => record.similarity[map.plan.similarity]);
  return map.expert >= 0 ? values[map.expert] : Math.max(...values);
}

function merges(map, result, cell) {
  const mask = result.masks[cell.position];
  return map.expert >= 0 ? mask.includes(map.expert) : mask.length > 0;
}

function buildGrid(map) {
  const { index, dom } = map;
  map.buttons = new Array(index.cells.length);
  map.bars = [];
  map.focusables = [];
  map.holes = new Map();  // where matrices will stand that are not analysed yet
  const table = node("table", { role: "grid", class: "lm-grid", "aria-describedby": dom.sum.id,
    "aria-label": "Decoder matrices by layer and module" });
  dom.grid.replaceChildren(table);
  if (map.narrow) buildTurned(map, table);
  else buildBands(map, table);
  dom.grid.dataset.turned = String(map.narrow);
  dom.grid.dataset.values = String(!map.narrow && (dom.grid.clientWidth - 50) / map.columns > 42);
  map.roving = [1, 1];
  roving(map, 1, 1, false);
}

function buildBands(map, table) {
  const { layers, modules } = map.index;
  const nBands = Math.ceil(layers.length / BAND);
  map.columns = Math.ceil(layers.length / nBands);
  table.append(node("colgroup", {}, node("col", { class: "lm-heads" }),
    ...Array.from({ length: map.columns }, () => node("col"))));
  for (let start = 0; start < layers.length; start += map.columns) {
    const band = layers.slice(start, start + map.columns);
    addRow(map, table, null, band.map((layer) => ({ kind: "layer", layer })));
    for (const module of modules) {
      const row = addRow(map, table, { kind: "module", module }, band.map((layer) => ({ kind: "cell", layer, module })));
      if (module === "gate") row.classList.add("lm-gap");
    }
    table.append(barsRow(map, band));
  }
}

function buildTurned(map, table) {
  const { layers, modules } = map.index;
  map.columns = modules.length;
  table.append(node("colgroup", {}, node("col", { class: "lm-heads" }),
    ...modules.map(() => node("col")), node("col", { class: "lm-bars-col" })));
  const head = addRow(map, table, null, modules.map((module) => ({ kind: "module", module })));
  head.append(node("td", { class: "lm-bars-name", "aria-hidden": "true" }, node("span", { class: "lm-bars-top" })));
  const svg = shape("svg", { viewBox: `0 0 100 ${layers.length}`, preserveAspectRatio: "none", "aria-hidden": "true" });
  layers.forEach((layer, i) => {
    const row = addRow(map, table, { kind: "layer", layer }, modules.map((module) => ({ kind: "cell", layer, module })));
    if (i === 0) row.append(node("td", { rowspan: layers.length, class: "lm-bars", "aria-hidden": "true" }, svg));
  });
  map.bars.push(barPaths(svg, layers));
}

function barsRow(map, band) {
  const svg = shape("svg", { viewBox: `0 0 ${map.columns} 100`, preserveAspectRatio: "none", "aria-hidden": "true" });
  map.bars.push(barPaths(svg, band));
  const name = node("td", { class: "lm-bars-name" }, node("span", { class: "lm-bars-top" }), node("span", {}, "change"));
  return node("tr", { class: "lm-bars-row", "aria-hidden": "true" }, name,
    node("td", { colspan: map.columns, class: "lm-bars" }, svg));
}

function barPaths(svg, layers) {
  const all = shape("path", { class: "lm-bar" }), marked = shape("path", { class: "lm-bar lm-bar-marked" });
  svg.append(all, marked);
  return { layers, all, marked };
}

// One table row: a head (a button for a whole layer or module, or the empty corner) and its cells.
function addRow(map, table, head, targets) {
  const line = [];
  const row = node("tr", { role: "row" });
  row.append(head
    ? node("th", { role: "rowheader", scope: "row" }, headButton(head, line))
    : node("td", { class: "lm-corner", role: "presentation" }));
  if (!head) line.push(null);
  for (const target of targets) {
    if (target.kind === "cell") row.append(cellBox(map, target, line));
    else row.append(node("th", { role: "columnheader", scope: "col" }, headButton(target, line)));
  }
  map.focusables.push(line);
  table.append(row);
  return row;
}

function headButton(target, line) {
  const text = target.kind === "layer" ? String(target.layer) : target.module;
  const button = node("button", { type: "button", class: "lm-head", tabindex: "-1",
    "aria-label": target.kind === "layer" ? `All of layer ${target.layer}` : `All ${text} matrices` }, text);
  button.target = target;
  line.push(button);
  return button;
}

function cellBox(map, { layer, module }, line) {
  const cell = map.index.at.get(layer + "." + module);
  if (!cell) {
    const box = node("td", { role: "gridcell", "aria-label": `Layer ${layer}, ${module}, not analysed` },
      node("span", { class: "lm-missing" }, "?"));
    map.holes.set(layer + "." + module, { box, line, at: line.length });
    line.push(null);
    return box;
  }
  const button = node("button", { type: "button", class: "c", tabindex: "-1" }, node("span", { class: "v" }));
  button.target = { kind: "cell", cell };
  map.buttons[cell.position] = button;
  line.push(button);
  return node("td", { role: "gridcell" }, button);
}

// Put new cells where they belong, and leave all others, with the focus on them, alone.
function fillHoles(map, cells) {
  for (const { layer, module } of cells) {
    const { box, line, at } = map.holes.get(layer + "." + module), made = [];
    box.replaceWith(cellBox(map, { layer, module }, made));
    [line[at]] = made;
  }
}

// Colours and printed values: needed when the pack, the measure or the expert in view changes.
function colourGrid(map, domain) {
  const values = map.index.cells.map((cell) => shownSimilarity(map, cell));
  const [low, high] = map.domain = domain || colourDomain(values);
  map.index.cells.forEach((cell, i) => {
    const t = (values[i] - low) / (high - low), button = map.buttons[i];
    button.style.setProperty("--c", rgb(t));
    button.style.setProperty("--t", readableOn(t));
    setText(button.firstChild, fixed(values[i], 2).replace(/^0\./, "."));
    delete button.dataset.on;
  });
  setText(map.dom.low, fixed(low, 2));
  setText(map.dom.high, fixed(high, 2));
}

// Merge states: touches only the buttons that changed since the last frame.
function paintGrid(map, result) {
  const { overrides } = map.plan;
  for (const cell of map.index.cells) {
    const button = map.buttons[cell.position];
    const on = merges(map, result, cell) ? "1" : "0", pin = overrides[cell.name] || "";
    if (button.dataset.on === on && button.dataset.pin === pin) continue;
    button.dataset.on = on;
    button.dataset.pin = pin;
    const forced = pin === "merge" ? ", always merged" : pin === "keep" ? ", always kept" : "";
    button.setAttribute("aria-label", `${title(cell)}, similarity ${fixed(shownSimilarity(map, cell), 2)}, ` +
      (forced ? forced.slice(2) : on === "1" ? "merges" : "kept"));
  }
}

// The mask of an earlier plan, for corner marks: while something is being dragged of the last
// committed one, and after a commit, where it differs, of the one before.
function ghostGrid(map, result) {
  for (const cell of map.index.cells) {
    const { dataset } = map.buttons[cell.position], was = merges(map, result, cell) ? "1" : "0";
    if (dataset.was !== was) dataset.was = was;
  }
}

function paintBars(map, result) {
  for (const { layers, all, marked } of map.bars) {
    let path = "", focus = "";
    layers.forEach((layer, i) => {
      const size = Math.min(1, result.layer_change[layer] / map.barTop) * 100;
      if (!(size > 0)) return;
      const bar = map.narrow
        ? `M0 ${i + 0.2}h${size.toFixed(2)}v.6H0Z`
        : `M${i + 0.14} 100v${(-size).toFixed(2)}h.72V100Z`;
      if (coversLayer(map.target, layer)) focus += bar;
      else path += bar;
    });
    all.setAttribute("d", path);
    marked.setAttribute("d", focus);
  }
}

// The bars' axis: what changes when every matrix merges at the committed lambda, so that no
// movement of the threshold rescales it; called between drags only.
function scaleBars(map) {
  const { plan, index } = map;
  const everything = previewOf(index, { ...plan, s: 0, overrides: {}, lambda: plan.lambda || 1 });
  map.barTop = niceTop(Math.max(...Object.values(everything.layer_change)));
  for (const label of map.dom.grid.querySelectorAll(".lm-bars-top")) setText(label, percent(map.barTop));
}

// Whether a target is in this layer: a cell of it, the layer itself, or a range of layers around it.
function coversLayer(target, layer) {
  if (!target || target.kind === "module") return false;
  return target.kind === "range" ? target.from <= layer && layer <= target.to : (target.cell || target).layer === layer;
}

// The cells that a target stands for.
function cellsOf(map, target) {
  if (!target) return [];
  if (target.kind === "cell") return [target.cell];
  return map.index.cells.filter((cell) => (target.kind === "module" ? cell.module === target.module : coversLayer(target, cell.layer)));
}

function markTargets(map) {
  const { target } = map;
  const isChosen = (own) => target && (own.kind === "layer" && target.kind === "range" ? coversLayer(target, own.layer)
    : own.kind === target.kind && own.cell === target.cell && own.layer === target.layer && own.module === target.module);
  for (const line of map.focusables) {
    for (const button of line) {
      if (!button) continue;
      const chosen = isChosen(button.target);
      button.classList.toggle("chosen", Boolean(chosen));
      button.classList.toggle("pinned", button.target.cell !== undefined && button.target.cell === map.pinned);
      if (button.target.kind === "cell") button.parentNode.setAttribute("aria-selected", String(Boolean(chosen)));
      else button.setAttribute("aria-pressed", String(Boolean(chosen)));
    }
  }
}

// One tab stop for the whole grid; arrows move it over heads and cells alike.
function roving(map, r, c, focus = true) {
  const button = map.focusables[r] && map.focusables[r][c];
  if (!button) return false;
  const [r0, c0] = map.roving;
  const before = map.focusables[r0] && map.focusables[r0][c0];
  if (before) before.tabIndex = -1;
  button.tabIndex = 0;
  map.roving = [r, c];
  if (focus) button.focus();
  return true;
}

function locate(map, button) {
  for (let r = 0; r < map.focusables.length; r++) {
    const c = map.focusables[r].indexOf(button);
    if (c >= 0) return [r, c];
  }
  return null;
}

// Arrow, Home and End keys inside the grid. Returns true when the key was used.
function gridKey(map, event) {
  const [r, c] = map.roving, last = map.focusables[r].length - 1;
  const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  if (moves[event.key]) {
    const [dr, dc] = moves[event.key];
    for (let i = r + dr, j = c + dc; map.focusables[i] && j >= 0 && j <= map.columns; i += dr, j += dc) {
      if (roving(map, i, Math.min(j, map.focusables[i].length - 1))) return true;
    }
    return true;
  }
  if (event.key === "Home") return event.ctrlKey ? roving(map, 1, 1) : roving(map, r, 1);
  if (event.key === "End") {
    const row = event.ctrlKey ? map.focusables.length - 1 : r;
    return roving(map, row, event.ctrlKey ? map.focusables[row].length - 1 : last);
  }
  return false;
}
