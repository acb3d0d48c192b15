// @ts-check
// The rows of the list. A row is made once and then only changed where it says something else, so that
// the focus stays and nothing jumps.

import { node, part, setText } from "../web/dom.js";

/** @import { Run } from "./types.d.ts" */

const BUTTONS = { show: "Show", try: "Try it", cancel: "Cancel", resume: "Resume" };

/**
 * @param {Run} run
 * @returns {HTMLLIElement}
 */
export function makeRow(run) {
  const button = (/** @type {string} */ act, /** @type {string} */ label) =>
    node("button", { type: "button", "data-act": act, "aria-label": `${label}: ${run.kind} ${run.name}` }, label);
  const buttons = Object.entries(BUTTONS).map(([act, label]) => button(act, label));
  const link = node("a", { class: "rl-button", "data-act": "download", download: "", "aria-label": `Download: ${run.kind} ${run.name}` }, "Download");
  const confirm = node("div", { class: "rl-confirm", role: "group", "aria-label": "Confirm", hidden: "" },
    node("p"),
    node("div", { class: "rl-actions" },
      node("button", { type: "button", "data-act": "confirm" }, "Delete"),
      node("button", { type: "button", "data-act": "keep" }, "Keep")));
  return node("li", { class: "rl-run", "data-run": run.id },
    node("h3", { class: "rl-title" }, `${run.kind} ${run.name} `, node("span", { class: "rl-state" })),
    node("progress", { max: "1", "aria-label": `Progress: ${run.kind} ${run.name}` }),
    node("p", { class: "rl-words" }),
    node("p", { class: "rl-error", role: "alert", hidden: "" }),
    node("dl"),
    node("div", { class: "rl-actions rl-buttons" }, ...buttons, link, button("delete", "Delete")),
    confirm);
}

/**
 * @param {HTMLElement} row
 * @param {Run} run
 * @param {string} failed Why the last action on the run failed; empty if it did not.
 */
export function paintRow(row, run, failed) {
  row.dataset.state = run.state;
  setText(part(row, ".rl-state"), `· ${run.label}`);
  const bar = part(row, "progress", HTMLProgressElement);
  if (bar.value !== run.share) bar.value = run.share;
  bar.hidden = run.state === "finished";
  setText(part(row, ".rl-words"), run.words);
  const error = part(row, ".rl-error"), text = failed || run.error;
  setText(error, text && `✕ ${text}`);
  error.hidden = !text;
  paintFacts(part(row, "dl"), run.facts);
  for (const button of row.querySelectorAll("button")) {
    const { act } = button.dataset;
    if (act === "delete" || (act && act in BUTTONS)) button.hidden = !run.actions.includes(act);
  }
  const link = part(row, "a", HTMLAnchorElement);
  link.hidden = !run.download;
  if (run.download && link.getAttribute("href") !== run.download) link.setAttribute("href", run.download);
  setText(part(row, ".rl-confirm p"), run.deletes);
  if (!run.actions.includes("delete")) part(row, ".rl-confirm").hidden = true;
}

/**
 * @param {HTMLElement} list
 * @param {[string, string][]} facts
 */
function paintFacts(list, facts) {
  const known = JSON.stringify(facts);
  if (list.dataset.facts === known) return;
  list.dataset.facts = known;
  list.replaceChildren(...facts.flatMap(([name, text]) => [
    node("dt", {}, name),
    node("dd", {}, name === "Started" ? new Date(text).toLocaleString() : text),
  ]));
}
