// @ts-check
// What the buttons do, by their data-act.

import { parts } from "../../web/dom.js";
import { cellsOf } from "../../web/targets.js";
import { chosenCells, pin, setLayout, setSigmaScale, toggleLarge } from "./choosing.js";
import { matrixRows, spectrumRows } from "./map_tables.js";
import { flipBack, flipOn, keepPlan, reset, setOverride, showFlip, takeBudget } from "./moves.js";
import { redo, undo } from "./session.js";
import { copyLink, fileStem, saveCsv, saveJson, savePng, saveReport, saveSvg } from "./takeaway.js";
import { tryTab } from "./try_tab.js";

/** @import { LayerMap } from "./map.js" */

/** @type {Record<string, (map: LayerMap, button: HTMLElement) => unknown>} */
const ACTIONS = {
  undo,
  redo,
  reset,
  "keep-plan": keepPlan,
  layout: (map, button) => setLayout(map, button.dataset.layout),
  budget: takeBudget,
  tour: ({ tour }) => tour.start(),
  "tour-next": ({ tour }) => tour.next(),
  "tour-end": ({ tour }) => tour.end(),
  answer: ({ tour }) => {
    tour.tick("answer");
    tryTab()?.click();
  },
  "sigma-scale": (map, button) => setSigmaScale(map, button.dataset.scale),
  large: toggleLarge,
  "flip-on": flipOn,
  "flip-back": flipBack,
  override: (map, button) => {
    const { value } = button.dataset;
    setOverride(map, cellsOf(map.state.index, map.state.target), value === "merge" || value === "keep" ? value : null);
  },
  pin: (map) => pin(map, chosenCells(map.state)[0]),
  unpin: (map) => pin(map, map.state.pinned),
  why: toggleWhy,
  "show-flip": (map) => showFlip(map, chosenCells(map.state)[0]),
  "cell-csv": ({ state }) => {
    const cells = chosenCells(state);
    saveCsv(cells.map(({ name }) => name).join("-and-"), spectrumRows(cells));
  },
  csv: ({ state }) => saveCsv(fileStem(state.pack), matrixRows(state)),
  json: saveJson,
  svg: saveSvg,
  png: savePng,
  html: saveReport,
  link: copyLink,
};

/**
 * Do what a button is for. Returns false for a button without an action.
 *
 * @param {LayerMap} map
 * @param {HTMLElement} button
 */
export function act(map, button) {
  const action = Object.hasOwn(ACTIONS, button.dataset.act ?? "") && ACTIONS[button.dataset.act ?? ""];
  if (!action) return false;
  action(map, button);
  return true;
}

/**
 * @param {LayerMap} map
 * @param {HTMLElement} button
 */
function toggleWhy(map, button) {
  const [text] = parts(map.element, `#${CSS.escape(button.getAttribute("aria-controls") ?? "")}`);
  text.hidden = !text.hidden;
  button.setAttribute("aria-expanded", String(!text.hidden));
  map.painter.now();
}
