// @ts-check
// The layer map, the component. Runs once per mount; the HTML report mounts it as Gradio does. Nothing
// here talks to the server except trigger("commit"), trigger("cellselect"), trigger("packselect").

import { MEASURED_EVENT, recall } from "../../web/memory.js";
import { listenToTables } from "../../web/tables.js";
import { listenToBrush } from "./brush.js";
import { listen } from "./events.js";
import { listenToPlots } from "./inputs.js";
import { rememberLink, spokenPart } from "./link.js";
import { LayerMap } from "./map.js";
import { measureAgain } from "./measuring.js";
import { takePlan } from "./moves.js";
import { complain, open, problemWords } from "./opening.js";
import { layOut } from "./painting.js";
import { undo } from "./session.js";

/** @import { Host, RawPlan } from "../../web/types.d.ts" */
/** @import { State } from "./types.d.ts" */

/** @param {Host} host */
export function mount(host) {
  const map = new LayerMap(host), { dom } = map;
  for (const name of /** @type {const} */ (["s", "lambda"])) nameDial(map, name);
  map.find("[data-act=html]").hidden = !host.server?.report_file;
  map.find("[data-act=link]").hidden = window.location.protocol === "file:";
  dom.dragMe.hidden = map.state.onStage || Boolean(recall("dragged", false));
  reflect(dom.root, map.state);
  map.store.subscribe((state) => reflect(dom.root, state));
  listenToTables(host.element);
  listenToBrush(map);
  listen(map);
  listenToPlots(map);
  window.addEventListener(MEASURED_EVENT, () => measureAgain(map));
  Object.assign(host.element, { ipmerge: handle(map) });
  open(map);
  host.watch("value", () => open(map));
  new ResizeObserver(() => {
    const width = dom.root.clientWidth;
    if (width && width !== map.state.width) layOut(map);
  }).observe(dom.root);
  if (map.state.isOpen && map.tour.isWelcome) map.tour.offer();
}

/**
 * @param {LayerMap} map
 * @param {"s" | "lambda"} name
 */
function nameDial(map, name) {
  const range = map.dom.range[name];
  range.id = map.id + name;
  map.find(`[data-for=${name}]`).setAttribute("for", range.id);
  range.setAttribute("aria-describedby", map.dom.sum.id);
}

/**
 * What the style sheet needs to know, as attributes of the root.
 *
 * @param {HTMLElement} root
 * @param {State} state
 */
function reflect({ dataset }, { narrow, layout, onStage, dragging, after }) {
  /** @type {Record<string, string | undefined>} */
  const wanted = {
    narrow: String(narrow), layout, present: String(onStage),
    dragging: dragging ? "1" : undefined, after: after ? "1" : undefined,
  };
  for (const [name, value] of Object.entries(wanted)) {
    if (value === undefined) delete dataset[name];
    else if (dataset[name] !== value) dataset[name] = value;
  }
}

/**
 * What the rest of the page, tests and benchmarks may ask of a mounted map: every field of its state,
 * live and read-only, and a few functions. Python's event handlers use `isSettled` and `answered`,
 * `speakOf` and `complain`.
 *
 * @param {LayerMap} map
 */
function handle(map) {
  const fields = Object.keys(map.state).map((key) => [key, {
    enumerable: true, get: () => map.state[/** @type {keyof State} */ (key)] }]);
  return Object.defineProperties({
    isSettled: () => map.outbox.isSettled(),
    answered: () => map.outbox.answered(),
    /** @param {string} part Of the link: the method and the options of the chosen merge. */
    speakOf: (part) => {
      map.set({ spoken: spokenPart(part) });
      rememberLink(map.state);
    },
    /** @param {string} problems Of that part of the link. */
    complain: (problems) => complain(map, map.dom.notice.hidden ? problemWords([problems]) : `Also: ${problems}.`),
    isPainted: () => !map.painter.isWaiting,
    /**
     * @param {RawPlan} plan Of another tab, applied as a step that can be undone.
     * @param {string} words Announced before the sentence.
     */
    take: (plan, words) => takePlan(map, plan, words),
    undo: () => undo(map),
    timings: map.painter.timings,
  }, Object.fromEntries(fields));
}
