// @ts-check
// The layer map's parts: its state, the elements of its template, and what draws into them.

import { part } from "../../web/dom.js";
import { Grid } from "../../web/grid.js";
import { recall } from "../../web/memory.js";
import { DEFAULT_PLAN } from "../../web/plan.js";
import { emptyIndex, previewOf } from "../../web/preview.js";
import { QUANTITIES } from "../../web/quantities.js";
import { createStore } from "../../web/store.js";
import { Curve } from "./curve.js";
import { DetailPanel } from "./detail.js";
import { Histogram } from "./histogram.js";
import { linkSearch, spokenPart } from "./link.js";
import { Outbox } from "./outbox.js";
import { Painter } from "./painting.js";
import { Tour } from "./tour.js";

/** @import { Host } from "../../web/types.d.ts" */
/** @import { State } from "./types.d.ts" */

export class LayerMap {
  /** @param {Host} host */
  constructor(host) {
    this.host = host;
    this.element = host.element;
    this.id = host.element.id || "ipmerge";
    this.arrival = new URLSearchParams(window.location.search); // before we write there
    this.dom = findDom(host.element);
    this.dom.sum.id = `${this.id}sum`;
    this.store = createStore(firstState(this.arrival, Boolean(host.server)));
    this.grid = new Grid(this.dom.grid, this.dom.sum.id, "Decoder matrices by layer and module");
    this.histogram = new Histogram(this);
    this.curve = new Curve(this);
    this.detail = new DetailPanel(this);
    this.painter = new Painter(this);
    this.outbox = new Outbox(host.trigger);
    this.tour = new Tour(this);
  }

  get state() {
    return this.store.get();
  }

  /** @param {Partial<State>} patch */
  set(patch) {
    this.store.set(patch);
  }

  /**
   * @param {string} selector
   * @returns {HTMLElement}
   */
  find(selector) {
    return part(this.element, selector);
  }
}

/**
 * @param {URLSearchParams} arrival
 * @param {boolean} isServed Whether a server answers; the HTML report has none.
 * @returns {State}
 */
function firstState(arrival, isServed) {
  const index = emptyIndex(), nothing = previewOf(index, DEFAULT_PLAN);
  return {
    isOpen: false, pack: index.pack, packId: "", home: "", index, presets: [], kept: [], preset: null,
    plan: DEFAULT_PLAN, committed: DEFAULT_PLAN, past: [], future: [], journey: null,
    dragging: false, after: false, typing: null,
    spoken: spokenPart(linkSearch(arrival)), target: null, reading: null, pinned: null, expert: -1,
    quantity: QUANTITIES[0], quantityDomain: [0, 1],
    layout: recall("layout", isServed ? "simple" : "full") === "simple" ? "simple" : "full",
    onStage: arrival.get("present") === "1", narrow: false, width: 0, sigmaScale: "log", large: false,
    result: nothing, before: nothing, ghost: nothing, flips: [],
    domain: [0, 1], barTop: 1, curveLow: 0,
    linkRead: false, linkAsked: null,
  };
}

/** @param {HTMLElement} element */
function findDom(element) {
  /** @param {string} selector */
  const html = (selector) => part(element, selector);
  /** @param {string} selector */
  const svg = (selector) => part(element, selector, SVGSVGElement);
  /** @param {string} selector */
  const input = (selector) => part(element, selector, HTMLInputElement);
  /** @param {string} selector */
  const select = (selector) => part(element, selector, HTMLSelectElement);
  return {
    root: html(".lm"), sum: html(".sum"), grid: html(".lm-grid-holder"), detail: html(".lm-detail"),
    spectra: html(".lm-spectra"), hist: svg(".lm-hist"), curve: svg(".lm-curve"), read: html(".lm-read"),
    status: html(".lm-status"), source: html(".lm-source"), twins: html(".lm-twins"), link: input(".lm-link"),
    count: html(".lm-count"), note: html(".lm-note-line"), notice: html(".lm-notice"), drift: html(".lm-drift"), dragMe: html(".lm-drag-me"),
    keep: html("[data-out=keep]"), absorb: html("[data-out=absorb]"), low: html("[data-out=low]"),
    high: html("[data-out=high]"), quantity: html("[data-out=quantity]"), sense: html("[data-out=sense]"),
    range: { s: input("[data-range=s]"), lambda: input("[data-range=lambda]") },
    number: { s: input("[data-number=s]"), lambda: input("[data-number=lambda]"), budget: input("[data-number=budget]") },
    wrong: { s: html("[data-wrong=s]"), lambda: html("[data-wrong=lambda]"), budget: html("[data-wrong=budget]") },
    energy: input("[data-energy]"), leftOut: html("[data-out=energy]"), energyLabel: html("[data-out=energy-label]"), advice: html(".lm-advice"),
    pick: {
      preset: select("[data-pick=preset]"), similarity: select("[data-pick=similarity]"),
      variant: select("[data-pick=variant]"), expert: select("[data-pick=expert]"),
      quantity: select("[data-pick=quantity]"),
    },
  };
}
