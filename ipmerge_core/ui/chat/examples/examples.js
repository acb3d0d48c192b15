// @ts-check
// The recorded examples, the component: one button each, which shows the answers without a model.

import { node, part } from "../../web/dom.js";

/** @import { Host } from "../../web/types.d.ts" */

/** @typedef {{ question: string, outcome: string, image: string }} Example */

/** @param {Host} host */
export function mount(host) {
  const list = part(host.element, ".ex-list");
  const show = () => {
    const { value } = host.props;
    /** @type {{ examples: Example[] }} */
    const { examples } = typeof value === "string" && value ? JSON.parse(value) : { examples: [] };
    list.replaceChildren(...examples.map(makeButton));
  };
  list.addEventListener("click", ({ target }) => {
    const button = target instanceof Element ? target.closest("button") : null;
    if (button) host.trigger("pick", { number: Number(button.dataset.number) });
  });
  host.watch("value", show);
  show();
}

/**
 * @param {Example} example
 * @param {number} number
 */
function makeButton({ question, outcome, image }, number) {
  const text = node("span", {}, question, node("b", {}, outcome));
  const picture = image ? node("img", { src: image, alt: "", width: 40, height: 40 }) : null;
  return node("button", { type: "button", id: `example-${number}`, "data-number": number }, picture, text);
}
