// @ts-check
// The Try it tab in the page: names and roles that Gradio leaves out, one column at a time on a narrow
// page, keys, and the texts that Python hands over to copy or save.

import { saveFile, showText } from "./handing_over.js";
import { watchPrompt } from "./prompt.js";
import { followAnswers, watchScrolling } from "./scrolling.js";

const FIELDS = "input, textarea, select, [contenteditable=true]";
/** @type {Record<string, string>} */
const VOTES = { a: "#vote-a", b: "#vote-b", c: "#vote-c", d: "#vote-d", t: "#vote-tie", 0: "#vote-bad" };

/** @type {[selector: string, attributes: Record<string, string>][]} */
export const CHAT_ATTRIBUTES = [
  ["#prompt textarea", { "aria-label": "Question" }],
  ...["a", "b", "c", "d"].map((letter) => /** @type {[string, Record<string, string>]} */ ([
    `#chat-${letter} [role=log]`, { "aria-live": "off", "aria-label": `Answers of model ${letter.toUpperCase()}` }])),
  ["#answers-status", { role: "status", "aria-live": "polite" }],
  ["#chats [data-testid=user]", { "aria-label": "Question" }],
  ["#chats [data-testid=bot]", { "aria-label": "Answer" }],
];

let column = 0; // shown on a narrow page

/**
 * Listen to the tab, which may not be mounted yet.
 *
 * @param {(text: string) => Promise<void>} copy
 */
export function watchChat(copy) {
  document.addEventListener("click", ({ target }) => {
    const tab = target instanceof Element ? target.closest("#column-tabs [role=tab]") : null;
    if (tab instanceof HTMLElement) showColumn(Number(tab.dataset.column));
  });
  document.addEventListener("keydown", pressed);
  watchPrompt();
  watchScrolling();
  document.addEventListener("ipmerge-copy", (event) => {
    const { detail } = /** @type {CustomEvent<string>} */ (event);
    if (detail) copy(detail).catch(() => showText(detail));
  });
  document.addEventListener("ipmerge-save", (event) => {
    const { detail } = /** @type {CustomEvent<string>} */ (event);
    if (detail) saveFile(detail);
  });
}

/** Show the selected column and the end of the answers after a change of the page. */
export function repairChat() {
  followAnswers();
  const tabs = tabsOfColumns();
  if (!tabs.length) return;
  column = Math.min(column, tabs.length - 1);
  for (const [number, tab] of tabs.entries()) {
    const isSelected = String(number === column);
    if (tab.getAttribute("aria-selected") !== isSelected) tab.setAttribute("aria-selected", isSelected);
    const index = number === column ? "0" : "-1";
    if (tab.getAttribute("tabindex") !== index) tab.setAttribute("tabindex", index);
  }
  const chats = document.querySelector("#chats");
  if (chats instanceof HTMLElement && chats.dataset.column !== String(column)) chats.dataset.column = String(column);
}

/** @returns {HTMLElement[]} */
function tabsOfColumns() {
  return [.../** @type {NodeListOf<HTMLElement>} */ (document.querySelectorAll("#column-tabs [role=tab]"))];
}

/** @param {number} number */
function showColumn(number) {
  const tabs = tabsOfColumns();
  if (!tabs.length) return;
  column = (number + tabs.length) % tabs.length;
  repairChat();
}

// --- keys ---

/** @param {KeyboardEvent} event */
function pressed(event) {
  const { key, target } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || !isOpen() || !(target instanceof Element)) return;
  if (key === "Escape") press("#stop");
  else if (target.closest("#column-tabs [role=tab]") && key.startsWith("Arrow")) moveTab(key);
  else if (!target.closest(FIELDS)) pressedOutsideOfFields(key);
}

/** @param {string} key */
function pressedOutsideOfFields(key) {
  if (key === "]") showColumn(column + 1);
  if (key === "[") showColumn(column - 1);
  const vote = VOTES[key.toLowerCase()];
  if (vote && document.querySelector("#vote")) press(vote);
}

/** @param {string} key */
function moveTab(key) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[key];
  if (!step) return;
  showColumn(column + step);
  tabsOfColumns()[column]?.focus();
}

function isOpen() {
  return document.querySelector("#prompt")?.checkVisibility() ?? false;
}

/** @param {string} selector */
function press(selector) {
  const button = document.querySelector(selector);
  if (button instanceof HTMLButtonElement && !button.disabled && button.checkVisibility()) button.click();
}
