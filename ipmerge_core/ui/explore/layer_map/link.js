// @ts-check
// The permalink: ?v=1&pack=..&s=..&l=..&m=..&u=..&o=..&c=..&q=.. in at most 300 characters. `o` packs the
// cells set by hand, five to a byte, so that any number of them fits. A link is untrusted input:
// invalid values are replaced by their defaults, with a message.

import { lambdaText } from "../../web/format.js";
import { MEMORY } from "../../web/memory.js";
import { cleanPlan, DEFAULT_PLAN } from "../../web/plan.js";
import { cellAt } from "../../web/preview.js";
import { findQuantity } from "../../web/quantities.js";

/** @import { Index, LinkContent, Override, Plan, Quantity, RawPlan, Target } from "../../web/types.d.ts" */
/** @typedef {{ packId: string, home: string, index: Index, plan: Plan, target: Target | null, quantity?: Quantity }} Linked */

const LINK_VERSION = "1";
const LINK_KEYS = ["v", "pack", "s", "l", "m", "u", "o", "c", "q"];
/** @type {(Override | "")[]} */
const BY_HAND = ["", "merge", "keep"];
const PER_BYTE = 5;
const LARGEST_BYTE = BY_HAND.length ** PER_BYTE - 1;

/**
 * @param {Index} index
 * @param {Plan["overrides"]} overrides
 */
export function packOverrides(index, overrides) {
  const digits = index.cells.map((cell) => BY_HAND.indexOf(overrides[cell.name] || ""));
  while (digits[digits.length - 1] === 0) digits.pop();
  const packed = [];
  for (let at = 0; at < digits.length; at += PER_BYTE) {
    packed.push(digits.slice(at, at + PER_BYTE).reduceRight((sum, digit) => BY_HAND.length * sum + digit, 0));
  }
  return btoa(String.fromCharCode(...packed)).replace(/\+/g, "-").replace(/\//g, "_").replace(/=+$/, "");
}

/**
 * @param {Index} index
 * @param {string | null} text
 * @param {string[]} problems
 */
export function unpackOverrides(index, text, problems) {
  /** @type {Record<string, Override>} */
  const overrides = {};
  if (!text) return overrides;
  if (!/^[A-Za-z0-9_-]{1,400}$/.test(text) || text.length % 4 === 1) {
    problems.push("o is damaged");
    return overrides;
  }
  const packed = [...atob(text.replace(/-/g, "+").replace(/_/g, "/"))].map((letter) => letter.charCodeAt(0));
  if (packed.some((value) => value > LARGEST_BYTE) || (packed.length - 1) * PER_BYTE >= index.cells.length) {
    problems.push("o belongs to another pair");
    return overrides;
  }
  index.cells.forEach((cell, i) => {
    const rest = Math.floor((packed[Math.floor(i / PER_BYTE)] || 0) / BY_HAND.length ** (i % PER_BYTE));
    const value = BY_HAND[rest % BY_HAND.length];
    if (value) overrides[cell.name] = value;
  });
  return overrides;
}

/** @param {Linked} state */
export function linkQuery({ packId, plan, index, target, quantity }) {
  const query = new URLSearchParams({ v: LINK_VERSION, pack: packId, s: String(plan.s), l: lambdaText(plan.lambda) });
  if (plan.similarity !== DEFAULT_PLAN.similarity) query.set("m", plan.similarity);
  if (plan.variant !== DEFAULT_PLAN.variant) query.set("u", plan.variant);
  if (Object.keys(plan.overrides).length) query.set("o", packOverrides(index, plan.overrides));
  if (target?.kind === "cell") query.set("c", `${target.cell.layer}.${target.cell.module}`);
  if (quantity && quantity.key !== "similarity") query.set("q", quantity.key);
  return query;
}

/**
 * The whole address: of the Space's page where there is one, else of this page, other keys kept.
 *
 * @param {Linked} state
 * @param {string} here The address of this page.
 */
export function linkAddress(state, here) {
  if (state.home) return `${state.home}?${linkQuery(state)}`;
  const address = withLink(state, here);
  address.hash = "";
  return address.href;
}

/**
 * @param {Linked} state
 * @param {string} here
 */
function withLink(state, here) {
  const address = new URL(here);
  for (const key of LINK_KEYS) address.searchParams.delete(key);
  for (const [key, value] of linkQuery(state)) address.searchParams.set(key, value);
  return address;
}

/**
 * The query to read: the address's own or, in a frame whose page keeps its own address, what this tab
 * remembers, so that a reload brings the plan back there too.
 *
 * @param {URLSearchParams} arrival
 */
export function linkSearch(arrival) {
  if (arrival.has("v") || window.top === window) return window.location.search;
  try {
    return window.sessionStorage.getItem(MEMORY) || "";
  } catch {
    return "";
  }
}

/**
 * The content of a link about a pair, or null if there is none.
 *
 * @param {string} search
 * @param {Index} index
 * @returns {LinkContent | null}
 */
export function readLink(search, index) {
  const query = new URLSearchParams(search), version = query.get("v");
  if (version === null) return null;
  if (version !== LINK_VERSION) {
    return { pack: null, problems: [`version ${version.slice(0, 12)} of the link is not supported`] };
  }
  /** @type {string[]} */
  const problems = [];
  /** @param {string} key */
  const given = (key) => query.get(key) ?? undefined;
  /** @type {RawPlan} */
  const raw = {
    s: given("s"), lambda: given("l"), similarity: given("m"), variant: given("u"),
    overrides: unpackOverrides(index, query.get("o"), problems),
  };
  const [layer, module] = (query.get("c") || "").split(".");
  const cell = cellAt(index, Number(layer), module) || null;
  const plan = cleanPlan(raw, index, problems), quantity = findQuantity(query.get("q"));
  if (query.has("q") && !quantity) problems.push("q must be one of the quantities of the map");
  return { pack: query.get("pack"), plan, cell, problems, ...(quantity ? { quantity: quantity.key } : {}) };
}

/**
 * Write the state into the page's address.
 *
 * @param {Linked} state
 */
export function rememberLink(state) {
  if (!state.packId || window.location.protocol === "file:") return;
  window.history.replaceState(window.history.state, "", withLink(state, window.location.href));
  try {
    window.sessionStorage.setItem(MEMORY, `?${linkQuery(state)}`);
  } catch { /* closed: the address has it */ }
}
