// @ts-check
// Texts that Python made: saved as a file, or shown to be copied where there is no clipboard.

import { node } from "../web/dom.js";

/** @type {Record<string, string>} */
const KINDS = { json: "application/json", html: "text/html", md: "text/markdown", csv: "text/csv" };

/** @param {string} file The name and the text of a file, as JSON. */
export function saveFile(file) {
  const [name, text] = JSON.parse(file);
  const type = KINDS[name.split(".").at(-1)] ?? "text/plain";
  const address = URL.createObjectURL(new Blob([text], { type }));
  const link = node("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

/**
 * Show a text, selected, to be copied by hand.
 *
 * @param {string} text
 */
export function showText(text) {
  const area = node("textarea", { "aria-label": "Text to copy", readonly: "" });
  area.value = text;
  const close = node("button", { type: "button" }, "Close");
  const dialog = node("dialog", { id: "text-to-copy", "aria-label": "Copy the text" },
    node("p", {}, "This browser blocks the clipboard. Copy the text from here."), area, close);
  close.addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
  area.select();
}
