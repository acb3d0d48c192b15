// @ts-check
// A number field that says beside it what is wrong, and leaves what was typed as it is.

import { setText } from "./dom.js";

/** @param {HTMLInputElement} field */
export function isUsable(field) {
  return field.value !== "" && field.validity.valid;
}

/**
 * Mark a field whose text is no number in its range; returns the sentence.
 *
 * @param {HTMLInputElement} field
 * @param {HTMLElement} note Beside the field.
 * @param {string} name Of the number.
 * @param {string} remains What stays in use.
 */
export function markWrong(field, note, name, remains) {
  const typed = field.value || (field.validity.badInput ? "no number" : "empty");
  const words = `${name} is ${typed}; expected a number from ${field.min} to ${field.max}. ${remains} stays in use.`;
  note.id ||= `${field.closest("[id]")?.id ?? ""}wrong-${name}`;
  field.setAttribute("aria-invalid", "true");
  field.setAttribute("aria-describedby", note.id);
  note.hidden = false;
  setText(note, words);
  return words;
}

/**
 * @param {HTMLInputElement} field
 * @param {HTMLElement} note
 */
export function markUsable(field, note) {
  if (!field.hasAttribute("aria-invalid")) return;
  field.removeAttribute("aria-invalid");
  field.removeAttribute("aria-describedby");
  note.hidden = true;
  setText(note, "");
}
