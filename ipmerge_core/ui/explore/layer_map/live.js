// @ts-check
// Texts that follow the plan while it is being dragged.

import { node, setText } from "../../web/dom.js";

/** @import { Attributes, Preview } from "../../web/types.d.ts" */

export class LiveTexts {
  /** @type {((result: Preview) => void)[]} */
  #refreshers = [];

  /** @param {(result: Preview) => void} refresher */
  add(refresher) {
    this.#refreshers.push(refresher);
  }

  /**
   * An element whose text follows the plan.
   *
   * @template {keyof HTMLElementTagNameMap} Tag
   * @param {Tag} tag
   * @param {Attributes} attributes
   * @param {(result: Preview) => string} words
   */
  text(tag, attributes, words) {
    const made = node(tag, attributes);
    this.add((result) => setText(made, words(result)));
    return made;
  }

  /** @param {Preview} result */
  refresh(result) {
    for (const refresher of this.#refreshers) refresher(result);
  }
}
