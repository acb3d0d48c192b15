// @ts-check
// The tour: a minute, five steps, a card in the corner that takes nothing away. A step ends when its
// thing is done or Next is pressed, Escape ends them all. It is offered at the first visit only, and
// never for a visit by a link, on a stage, or in a report.

import { node, setText } from "../../web/dom.js";
import { recall, remember } from "../../web/memory.js";
import { tryTab } from "./try_tab.js";

/** @import { Attributes } from "../../web/types.d.ts" */
/** @import { LayerMap } from "./map.js" */
/** @typedef {"read" | "s" | "choose" | "lambda" | "answer"} Deed */
/** @typedef {{ at: string, done: Deed, title: string, words: string }} Step */

/** @type {Step[]} */
const STEPS = [
  { at: ".lm-map", done: "read", title: "One square is one weight matrix",
    words: "The map shows the language model: layers on one axis, the modules of a layer on the other. The colour shows how similar the math model's change is to the vision model's. Hover over a few squares, or move with the arrow keys." },
  { at: ".lm-dial-s", done: "s", title: "Drag the threshold",
    words: "Matrices with a similarity of at least Sα are merged (framed, in full colour). The others are kept (hatched)." },
  { at: ".lm-map", done: "choose", title: "Select a square",
    words: "The details show its similarity and why it is merged or kept. You can override the decision for this matrix." },
  { at: ".lm-dial-l", done: "lambda", title: "Change the scale λ",
    words: "λ scales the update. Larger values turn the merged model's task vector away from the vision model's (solid) and toward the math update (dashed). The curves are cosines of directions, not accuracies." },
  { at: ".lm-answer", done: "answer", title: "Ask both models",
    words: "Compare the answers of the vision model and the merged model to the same question." },
];
const PAUSE = 900; // to see the tick before the next step
const ENOUGH_READ = 3; // squares

/**
 * @param {string} act
 * @param {string} label
 * @param {Attributes} [more]
 */
function tourButton(act, label, more = {}) {
  return node("button", { type: "button", "data-act": act, ...more }, label);
}

export class Tour {
  /** @type {Step[]} Those whose thing can be seen. */
  #steps = [];
  #step = -1;
  /** @type {Set<unknown>} */
  #seen = new Set();
  /** @type {HTMLElement | null} */
  #lit = null;
  #timer = 0;

  /** @param {LayerMap} map */
  constructor(map) {
    this.map = map;
    this.card = map.find(".lm-tour");
  }

  /** Whether a visitor who has just come may be offered the tour. */
  get isWelcome() {
    const { host, state, arrival } = this.map;
    return Boolean(host.server) && !state.onStage && !arrival.has("v") && !recall("toured", false);
  }

  /** The first visit: a card that asks, so that nothing moves and nothing is covered unasked. */
  offer() {
    remember("toured", true);
    document.addEventListener("keydown", this.#leave, true);
    this.card.replaceChildren(
      node("h2", {}, "New here?"),
      node("p", {}, "A one-minute tour explains this map and its controls."),
      node("p", { class: "lm-acts" }, tourButton("tour-end", "No, thanks", { class: "lm-quiet" }), tourButton("tour", "Start the tour", { class: "lm-next" })));
    this.card.hidden = false;
  }

  start() {
    this.#steps = STEPS.filter(({ at }) => this.map.find(at).offsetParent);
    document.addEventListener("keydown", this.#leave, true);
    this.#show(0);
    this.map.find(".lm-tour h2").focus({ preventScroll: true });
  }

  next() {
    const isLast = this.#step === this.#steps.length - 1, { done } = this.#steps[this.#step] ?? {};
    this.#show(this.#step + 1);
    if (isLast && done === "answer") tryTab()?.click();
  }

  end() {
    const inside = this.card.contains(document.activeElement);
    clearTimeout(this.#timer);
    this.#step = -1;
    this.#light(null);
    this.card.hidden = true;
    this.card.replaceChildren();
    document.removeEventListener("keydown", this.#leave, true);
    if (inside) this.map.find("[data-act=tour]").focus();
  }

  /**
   * Something was done: the step that waited for it gets its tick, and the next one comes.
   *
   * @param {Deed} deed
   * @param {unknown} [which]
   */
  tick(deed, which) {
    if (this.#steps[this.#step]?.done !== deed) return;
    this.#seen.add(which);
    if (deed === "read" && this.#seen.size < ENOUGH_READ) return;
    this.map.find(".lm-tour-tick").textContent = " ✓ done";
    clearTimeout(this.#timer);
    this.#timer = window.setTimeout(() => this.next(), PAUSE);
  }

  /** @param {KeyboardEvent} event */
  #leave = (event) => {
    if (event.key !== "Escape" || !this.map.element.offsetParent) return;
    event.preventDefault();
    event.stopPropagation();
    this.end();
  };

  /** @param {HTMLElement | null} found */
  #light(found) {
    this.#lit?.classList.remove("lm-lit-up");
    this.#lit = found;
    found?.classList.add("lm-lit-up");
  }

  /** @param {number} number */
  #show(number) {
    const step = this.#steps[number], { map } = this, inside = this.card.contains(document.activeElement);
    clearTimeout(this.#timer);
    if (!step) {
      this.end();
      return;
    }
    this.#step = number;
    this.#seen = new Set();
    this.card.hidden = false;
    this.card.replaceChildren(...this.#content(step, number));
    const found = map.find(step.at);
    this.#light(found);
    if (inside) map.find(".lm-tour [data-act=tour-next]").focus();
    const still = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
    found.scrollIntoView({ block: map.state.narrow ? "start" : "nearest", behavior: still ? "auto" : "smooth" });
    setText(map.dom.status, `Tour, step ${number + 1} of ${this.#steps.length}. ${step.title}. ${step.words}`);
  }

  /**
   * @param {Step} step
   * @param {number} number
   */
  #content({ title, words }, number) {
    const all = this.#steps.length;
    return [
      node("p", { class: "lm-tour-count" }, `Step ${number + 1} of ${all}`, node("span", { class: "lm-tour-tick", "aria-hidden": "true" })),
      node("h2", { tabindex: "-1" }, title),
      node("p", {}, words),
      node("p", { class: "lm-acts" }, tourButton("tour-end", "End tour", { class: "lm-quiet" }),
        tourButton("tour-next", number === all - 1 ? "Done" : "Next", { class: "lm-next" })),
    ];
  }
}
