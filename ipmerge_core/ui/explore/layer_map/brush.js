// @ts-check
// A range of layers: drag across their heads, or Shift with a click or an arrow key. A range is a
// choice like a cell or a layer: details, histogram and counts speak of it, Escape clears it.

import { targetOf } from "../../web/grid.js";
import { rangeTo, sameTarget } from "../../web/targets.js";
import { choose } from "./choosing.js";

/** @import { LayerMap } from "./map.js" */

/**
 * The head of a layer around an element.
 *
 * @param {EventTarget | null} from
 */
function layerHead(from) {
  const button = from instanceof Element ? from.closest("button.lm-head") : null, target = targetOf(button);
  return button && target?.kind === "layer" ? { button, layer: target.layer } : null;
}

/** @param {LayerMap} map */
export function listenToBrush(map) {
  const { element } = map;
  /** @type {number | null} Where the brush was put down. */
  let from = null;
  let moved = false;

  element.addEventListener("pointerdown", (event) => {
    const head = layerHead(event.target);
    moved = false;
    from = head && !event.button && !event.shiftKey ? head.layer : null;
    if (head?.button.hasPointerCapture(event.pointerId)) head.button.releasePointerCapture(event.pointerId); // touch captures by itself
  });

  element.addEventListener("pointermove", (event) => {
    if (from === null || !event.buttons) return;
    const head = layerHead(document.elementFromPoint(event.clientX, event.clientY));
    if (!head || (head.layer === from && !moved)) return;
    const range = rangeTo(head.layer, from);
    if (moved && sameTarget(range, map.state.target)) return;
    moved = true;
    choose(map, range);
  });

  for (const end of /** @type {const} */ (["pointerup", "pointercancel"])) {
    element.addEventListener(end, () => { from = null; });
  }

  // The click that ends a drag chooses nothing more.
  element.addEventListener("click", (event) => {
    if (!moved || !layerHead(event.target)) return;
    moved = false;
    event.stopPropagation();
  }, true);
}
