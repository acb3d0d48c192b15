// @ts-check
// The strip, the component: the answers to one question at eight values of lambda. A cell takes its
// lambda to Explore.

import { node, part, setText } from "../../web/dom.js";

/** @import { Host } from "../../web/types.d.ts" */

/**
 * @typedef {{
 *   gain: number, label: string, state: string, text: string, answer: string,
 *   verdict: "" | "right" | "wrong", facts: string, note: string, chosen: boolean,
 * }} Cell
 * @typedef {{ question: string, note: string, running: boolean, cells: Cell[] }} Content
 */

const VERDICTS = { right: "✓ correct", wrong: "✕ wrong" };

/** @param {Host} host */
export function mount(host) {
  const { element } = host;
  const root = part(element, ".st"), list = part(element, ".st-cells");
  const title = part(element, ".st-title"), note = part(element, ".st-note");
  const show = () => {
    const { value } = host.props;
    /** @type {Content | null} */
    const content = typeof value === "string" && value ? JSON.parse(value) : null;
    root.hidden = !content;
    if (!content) return;
    setText(title, `Over λ: ${content.question}`);
    setText(note, content.note);
    for (const [number, cell] of content.cells.entries()) {
      paint(list.children[number] ?? list.appendChild(node("li", {}, makeButton())), cell);
    }
    while (list.children.length > content.cells.length) list.lastChild?.remove();
  };
  list.addEventListener("click", ({ target }) => {
    const button = target instanceof Element ? target.closest("button") : null;
    if (button) host.trigger("take", { gain: Number(button.dataset.gain) });
  });
  host.watch("value", show);
  show();
}

function makeButton() {
  const line = (/** @type {string} */ name) => node("span", { class: `st-${name}` });
  return node("button", { type: "button" }, line("gain"), line("answer"), line("verdict"), line("text"), line("facts"));
}

/**
 * Fill a cell; its button stays the same, so that the focus does too.
 *
 * @param {Element} item
 * @param {Cell} cell
 */
function paint(item, cell) {
  const button = part(item, "button", HTMLButtonElement);
  button.dataset.gain = String(cell.gain);
  button.setAttribute("aria-current", String(cell.chosen));
  button.title = `Set λ to ${cell.label} in Explore`;
  const shown = cell.state === "failed" ? cell.note : cell.text || (cell.state === "finished" ? "(empty answer)" : "…");
  const lines = {
    gain: `λ ${cell.label}${cell.chosen ? " · chosen" : ""}`, answer: cell.answer,
    verdict: cell.verdict ? VERDICTS[cell.verdict] : "", text: shown, facts: cell.facts,
  };
  for (const [name, text] of Object.entries(lines)) setText(part(button, `.st-${name}`), text);
}
