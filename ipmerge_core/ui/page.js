// @ts-check
// Names and roles that Gradio leaves out, set as soon as a tab is mounted: the prompt's text box has
// no accessible name, a message is named by its own markup, and two streaming chats would each be read
// aloud word by word. One status line speaks for both, and the list of runs for all runs. A message is
// copied as it was written.

import { CHAT_ATTRIBUTES, repairChat, watchChat } from "./chat/chat.js";

/** @type {[selector: string, attributes: Record<string, string>][]} */
const ATTRIBUTES = [
  ...CHAT_ATTRIBUTES,
  ["#analyse-status, #start-note", { role: "status", "aria-live": "polite" }],
];
// What KaTeX cannot set, or sets in red as unknown.
const FAILED_FORMULAS = "#chats .formula:has(.katex-error, mstyle[mathcolor='#cc0000'])";

/** Repair the page now and after every change of it. */
export function watchPage() {
  let waiting = false;
  new MutationObserver(() => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      repair();
    });
  }).observe(document.body, { childList: true, subtree: true });
  repair();
  watchChat(copyAsWritten());
}

function repair() {
  for (const [selector, attributes] of ATTRIBUTES) set(selector, attributes);
  for (const failed of document.querySelectorAll(FAILED_FORMULAS)) {
    failed.textContent = failed.getAttribute("title"); // as it was written
  }
  const isOpen = document.querySelector("#analyse-panel") !== null;
  repairChat();
  set("#analyse-open", { "aria-expanded": String(isOpen), "aria-controls": "analyse-panel" });
}

/**
 * @param {string} selector
 * @param {Record<string, string>} attributes
 */
function set(selector, attributes) {
  for (const found of document.querySelectorAll(selector)) {
    for (const [name, value] of Object.entries(attributes)) {
      if (found.getAttribute(name) !== value) found.setAttribute(name, value);
    }
  }
}

/**
 * Gradio's copy buttons take the markup of messages. Returns what copies a text unchanged.
 *
 * @returns {(text: string) => Promise<void>}
 */
function copyAsWritten() {
  const write = navigator.clipboard?.writeText.bind(navigator.clipboard) ?? (() => Promise.reject(new Error("No clipboard.")));
  if (navigator.clipboard) navigator.clipboard.writeText = (text) => write(asWritten(text));
  document.addEventListener("copy", (event) => { // where there is no clipboard, Gradio copies from a text area
    const { target } = event;
    if (!(target instanceof HTMLTextAreaElement) || asWritten(target.value) === target.value) return;
    event.clipboardData?.setData("text/plain", asWritten(target.value));
    event.preventDefault();
  });
  return write;
}

/**
 * Each message carries its text in a field.
 *
 * @param {string} text
 */
function asWritten(text) {
  if (!text.includes('<div class="written">')) return text;
  const { body } = new DOMParser().parseFromString(text, "text/html");
  for (const message of body.querySelectorAll(".written")) message.replaceWith(message.querySelector("input")?.value ?? "");
  return body.textContent ?? "";
}
