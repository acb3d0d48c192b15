// Layer map, a pair that is still being analysed: asks now and then for the matrices that have come
// since, and puts them where they belong. Plan, choice and history stay; nothing moves while a hand
// drags; what has the focus keeps it.

const ASK_AGAIN = 2000;
let asking = 0;

function growLater() {
  clearTimeout(asking);
  if (map.pack?.growing) map.dom.root.dataset.growing = "true";
  if (map.pack?.growing && server?.grown) asking = setTimeout(askForMore, ASK_AGAIN);
}

async function askForMore() {
  const { pack, packId, index } = map;
  if (element.offsetParent && !document.hidden && !map.dragging) {
    try {
      const news = await server.grown(packId, index.cells.length);
      if (map.pack === pack && !map.dragging) takeNews(news);
    } catch { /* no answer: the same question next time */ }
  }
  growLater();
}

function takeNews({ pack, records, growing, presets, again, gone }) {
  if (again) { trigger("packselect", { pack: map.packId }); return; }
  if (gone) {
    map.pack.growing = null;
    tell(gone);
    return;
  }
  const wasKnown = map.index.cells.length;
  Object.assign(map.pack, pack, { records: [...map.pack.records, ...records],
    growing: growing && { ...map.pack.growing, ...growing } });
  const added = addRecords(map.index, records);
  if (added.length) takeCells(added, wasKnown);
  if (!growing) {  // the sentence keeps the height that it had: nothing jumps at the end
    map.presets = presets;
    buildPicks();
    tell(`The analysis is finished: all ${map.index.cells.length} matrices are there.`);
  }
  map.sentence = null;
  repaint();
}

function takeCells(added, wasKnown) {
  fillHoles(map, added);
  map.flips = flipValues(map.index, map.plan);
  map.result = map.before = previewOf(map.index, map.plan);
  // The plan before is known by its mask alone; a matrix that has just come has neither joined nor left.
  map.ghost = { ...map.ghost, masks: [...map.ghost.masks.slice(0, wasKnown), ...map.result.masks.slice(wasKnown)] };
  rebuildColours();
  rescale();
  markTargets(map);
  if (touches(added)) showChosen();
  ghostGrid(map, map.ghost);
  describeDials(map);
  refreshTwins();
}

// Whether what is chosen speaks of matrices that have just come, and nobody stands in its texts.
function touches(added) {
  const { target, dom } = map, busy = [dom.detail, dom.spectra].some((part) => part.contains(document.activeElement));
  if (!target || busy) return false;
  return added.some((cell) => (target.kind === "layer" || target.kind === "range" ? coversLayer(target, cell.layer)
    : cell.module === (target.cell || target).module));
}

// What stands before the sentence, so that nobody takes a part for the whole.
function growingWords({ growing }) {
  const done = `${Math.floor(100 * growing.done)} %`;
  return growing.running ? `analysis running, ${done}` : `analysis stopped at ${done}`;
}
