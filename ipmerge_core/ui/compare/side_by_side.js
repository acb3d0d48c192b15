// @ts-check
// Two whole maps with one choice and one scroll: each is a grid of its own, coloured on one scale and
// with bars on one axis, so that the eye may go from one to the other.

import { part, setText } from "../web/dom.js";
import { fixed, percent } from "../web/format.js";
import { Grid } from "../web/grid.js";
import { colourDomain } from "../web/scales.js";
import { coversLayer } from "../web/targets.js";
import { similarityOf } from "./pairs.js";

/** @import { Letter, Sides, State } from "./types.d.ts" */

/** @type {Letter[]} */
export const LETTERS = ["a", "b"];

export class SideBySide {
  /**
   * @param {HTMLElement} element The component.
   * @param {string} describedBy
   */
  constructor(element, describedBy) {
    this.element = element;
    /** @param {Letter} letter */
    const grid = (letter) => new Grid(part(element, `[data-grid=${letter}]`), describedBy, `Matrices of ${letter.toUpperCase()} by layer and module`);
    this.grids = { a: grid("a"), b: grid("b") };
    for (const { holder } of Object.values(this.grids)) {
      holder.addEventListener("scroll", () => this.#shareScroll(holder), { passive: true });
    }
  }

  /**
   * @param {Sides} sides
   * @param {boolean} narrow
   */
  build(sides, narrow) {
    for (const letter of LETTERS) {
      const grid = this.grids[letter];
      grid.build(sides[letter].index, narrow);
      part(this.element, ".cm-both-maps").style.setProperty("--columns", String(narrow ? grid.columns * 1.2 : grid.columns));
    }
  }

  /**
   * @param {Sides} sides
   * @param {Pick<State, "target" | "otherTarget">} chosen
   * @param {number} top The end of the bars' axis.
   */
  paint(sides, { target, otherTarget }, top) {
    const domain = colourDomain(LETTERS.flatMap((letter) => sides[letter].index.cells.map((cell) => similarityOf(sides[letter], cell))));
    setText(part(this.element, "[data-side=low]"), fixed(domain[0], 2));
    setText(part(this.element, "[data-side=high]"), fixed(domain[1], 2));
    for (const letter of LETTERS) {
      const grid = this.grids[letter], { plan, result } = sides[letter], view = { plan, expert: -1 };
      const chosen = letter === "a" ? target : otherTarget;
      grid.colour(view, domain);
      grid.nameBarsTop(percent(top));
      grid.paint(view, result);
      grid.paintBars((layer) => Math.min(1, result.layer_change[layer] / top), (layer) => coversLayer(chosen, layer));
      grid.mark(chosen);
    }
  }

  /**
   * One scroll for both, as a share of what there is to scroll; what is there already is left alone,
   * so that the two do not chase each other.
   *
   * @param {HTMLElement} scrolled
   */
  #shareScroll(scrolled) {
    const share = scrolled.scrollTop / Math.max(1, scrolled.scrollHeight - scrolled.clientHeight);
    for (const { holder } of Object.values(this.grids)) {
      const goal = share * (holder.scrollHeight - holder.clientHeight);
      if (holder !== scrolled && Math.abs(holder.scrollTop - goal) > 1.5) holder.scrollTop = goal;
    }
  }
}
