// @ts-check
// The items that a merge has fixed or broken: a list with small images; a row opens its item in the chat.

import { node } from "../web/dom.js";

/** @import { Content, Flip, State } from "./types.d.ts" */

/**
 * @param {Content} content
 * @param {State} state
 */
export function flipList(content, { filter }) {
  const { flips, flipped } = content;
  if (!flips.length) return [];
  const count = { fixed: 0, broken: 0 };
  for (const { outcome } of flips) count[outcome] += 1;
  const shown = flips.filter(({ outcome }) => !filter || outcome === filter);
  const left = flipped > flips.length ? ` The first ${flips.length} of ${flipped} are listed; the JSON file has all.` : "";
  return [
    node("h3", {}, "Items that differ"),
    node("p", { class: "lm-source" }, `Fixed: only the merged model is right. Broken: only the first model is right.${left}`),
    node("span", { class: "lm-seg", role: "group", "aria-label": "Items to list" },
      ...[["", `All ${flips.length}`], ["fixed", `Fixed ${count.fixed}`], ["broken", `Broken ${count.broken}`]].map(([key, label]) => (
        node("button", { type: "button", "data-filter": key, "aria-pressed": String(filter === key) }, label)))),
    node("ul", { class: "ev-items" }, ...shown.map((flip) => row(flip, flips.indexOf(flip)))),
  ];
}

/**
 * @param {Flip} flip
 * @param {number} i
 */
function row(flip, i) {
  const { outcome, skill, question, answer, first, second, image } = flip;
  const isFixed = outcome === "fixed";
  return node("li", {}, node("button", { type: "button", class: "ev-item", "data-flip": i },
    image ? node("img", { src: image, alt: "", loading: "lazy", width: 56, height: 56 }) : node("span", { class: "ev-no-image" }),
    node("span", { class: `ev-outcome ${isFixed ? "ev-is-fixed" : "ev-is-broken"}` }, isFixed ? "✓ fixed" : "✕ broken", node("small", {}, skill)),
    node("span", { class: "ev-item-words" }, node("b", {}, question),
      node("span", {}, `Reference: ${answer}`),
      node("span", {}, `Before: ${first || "(nothing)"}`), node("span", {}, `After: ${second || "(nothing)"}`))));
}
