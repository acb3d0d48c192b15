// Layer map, a range of layers: drag across their heads, or Shift with a click or an arrow key. A
// range is a choice like a cell or a layer: details, histogram and counts speak of it, Escape clears.

const brush = { from: null, moved: false };

function rangeTo(layer, start) {
  const [from, to] = [start, layer].sort((a, b) => a - b);
  return from === to ? { kind: "layer", layer } : { kind: "range", from, to };
}

// Stretch the layer or range that is chosen to another layer. False where neither is.
function stretch(layer) {
  const { target } = map;
  if (target?.kind !== "layer" && target?.kind !== "range") return false;
  const start = target.kind === "layer" ? target.layer : target.anchor;
  choose({ ...rangeTo(layer, start), anchor: start });
  return true;
}

const layerHead = (from) => { const button = from?.closest?.("button.lm-head"); return button?.target?.kind === "layer" ? button : null; };

element.addEventListener("pointerdown", (event) => {
  const head = layerHead(event.target);
  brush.moved = false;
  brush.from = head && !event.button && !event.shiftKey ? head.target.layer : null;
  if (head?.hasPointerCapture?.(event.pointerId)) head.releasePointerCapture(event.pointerId);  // touch captures by itself
});

element.addEventListener("pointermove", (event) => {
  if (brush.from === null || !event.buttons) return;
  const head = layerHead(document.elementFromPoint(event.clientX, event.clientY));
  if (!head || (head.target.layer === brush.from && !brush.moved)) return;
  const range = { ...rangeTo(head.target.layer, brush.from), anchor: brush.from };
  if (brush.moved && map.target?.from === range.from && map.target?.to === range.to && map.target?.layer === range.layer) return;
  brush.moved = true;
  choose(range);
});

for (const end of ["pointerup", "pointercancel"]) {
  element.addEventListener(end, () => { brush.from = null; });
}

// The click that ends a drag chooses nothing more.
element.addEventListener("click", (event) => {
  if (!brush.moved || !layerHead(event.target)) return;
  brush.moved = false;
  event.stopPropagation();
}, true);
