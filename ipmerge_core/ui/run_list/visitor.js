// @ts-check
// The secret from which the keys of this browser's runs derive. All its windows use the same one; where
// storage is refused it lasts as long as the page.

import { recall, remember } from "../web/memory.js";

const NAME = "visitor";
const BYTES = 32;

/** @returns {string} */
export function visitorSecret() {
  const known = recall(NAME, "");
  if (typeof known === "string" && known.length >= BYTES) return known;
  const bytes = crypto.getRandomValues(new Uint8Array(BYTES));
  const made = [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  remember(NAME, made);
  return made;
}
