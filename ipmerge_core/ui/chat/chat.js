// @ts-check
// The Try it tab in the page: names and roles that Gradio leaves out, one column at a time on a narrow
// page, linked scrolling, keys, and the texts that Python hands over to copy or save.

import { saveFile, showText } from "./handing_over.js";

const FIELDS = "input, textarea, select, [contenteditable=true]";
const USER_SCROLL = 1000; // milliseconds after the last wheel, touch or key in a chat
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
  linkScrolling();
  document.addEventListener("ipmerge-copy", (event) => {
    const { detail } = /** @type {CustomEvent<string>} */ (event);
    if (detail) copy(detail).catch(() => showText(detail));
  });
  document.addEventListener("ipmerge-save", (event) => {
    const { detail } = /** @type {CustomEvent<string>} */ (event);
    if (detail) saveFile(detail);
  });
}

/** Show the selected column after a change of the page. */
export function repairChat() {
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

// --- linked scrolling ---

function linkScrolling() {
  /** @type {Element | null} */
  let moved = null; // the chat that the visitor scrolls
  let when = 0;
  const note = (/** @type {Event} */ { target }) => {
    const chat = target instanceof Element ? target.closest("#chats [id^=chat-]") : null;
    if (chat) [moved, when] = [chat, performance.now()];
  };
  for (const name of ["wheel", "touchmove", "pointerdown", "keydown"]) {
    document.addEventListener(name, note, { capture: true, passive: true });
  }
  document.addEventListener("scroll", ({ target }) => {
    if (!(target instanceof Element) || !moved?.contains(target) || !isLinked()) return;
    if (performance.now() - when > USER_SCROLL) return;
    when = performance.now();
    follow(moved, target);
  }, { capture: true, passive: true });
}

function isLinked() {
  const box = document.querySelector("#chat-scrolling input");
  return !(box instanceof HTMLInputElement) || box.checked; // settings that were never opened
}

/**
 * Scroll the other chats to the same share of their height.
 *
 * @param {Element} moved
 * @param {Element} scroller
 */
function follow(moved, scroller) {
  const share = scroller.scrollTop / Math.max(1, scroller.scrollHeight - scroller.clientHeight);
  const log = moved.querySelector("[role=log]");
  let levels = 0; // between the list of messages and what scrolls
  for (let at = log; at && at !== scroller; at = at.parentElement) levels += 1;
  for (const other of document.querySelectorAll("#chats [id^=chat-]")) {
    if (other === moved) continue;
    let at = other.querySelector("[role=log]");
    for (let level = 0; at && level < levels; level += 1) at = at.parentElement;
    if (at) at.scrollTop = share * (at.scrollHeight - at.clientHeight);
  }
}
