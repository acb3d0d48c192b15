// Compare, two whole maps with one choice and one scroll: each is the layer map's own grid, coloured
// on one scale and with bars on one axis, so that the eye may go from one to the other.

function buildSides(map) {
  for (const letter of ["a", "b"]) {
    const side = map.sides[letter], holder = find(`[data-grid=${letter}]`);
    Object.assign(side, { narrow: map.narrow, expert: -1, target: null, pinned: null,
      dom: { grid: holder, sum: map.dom.sum, low: find("[data-side=low]"), high: find("[data-side=high]") } });
    buildGrid(side);
    holder.querySelector("table").setAttribute("aria-label", `Matrices of ${letter.toUpperCase()} by layer and module`);
    find(".cm-both-maps").style.setProperty("--columns", map.narrow ? side.columns * 1.2 : side.columns);
  }
}

function paintSides(map, top) {
  const { a, b } = map.sides;
  const domain = colourDomain([a, b].flatMap((side) => side.index.cells.map((cell) => similarityOf(side, cell))));
  for (const side of [a, b]) {
    colourGrid(side, domain);
    side.barTop = top;
    for (const label of side.dom.grid.querySelectorAll(".lm-bars-top")) setText(label, percent(top));
    paintGrid(side, side.result);
    paintBars(side, side.result);
    markTargets(side);
  }
}

// The same choice in the other map, at the same relative depth.
function mirrored(target, from, to) {
  if (target.kind === "module") return target;
  if (target.kind === "layer") return { kind: "layer", layer: across(from, to, target.layer) };
  const cell = partnerOf(from, to, target.cell);
  return cell ? { kind: "cell", cell } : null;
}

function chooseInSide(map, button, letter) {
  const other = letter === "a" ? "b" : "a", side = map.sides[letter], place = locate(side, button);
  if (place) roving(side, ...place);
  side.target = button.target;
  map.sides[other].target = mirrored(button.target, side, map.sides[other]);
  map.target = map.sides.a.target;
  paintAll();
}

// One scroll for both, as a share of what there is to scroll; what is there already is left alone, so
// that the two do not chase each other.
function shareScroll(scrolled) {
  for (const letter of ["a", "b"]) {
    const other = find(`[data-grid=${letter}]`);
    const goal = (scrolled.scrollTop / Math.max(1, scrolled.scrollHeight - scrolled.clientHeight)) * (other.scrollHeight - other.clientHeight);
    if (other !== scrolled && Math.abs(other.scrollTop - goal) > 1.5) other.scrollTop = goal;
  }
}

for (const holder of element.querySelectorAll("[data-grid]")) {
  holder.addEventListener("scroll", () => shareScroll(holder), { passive: true });
}
