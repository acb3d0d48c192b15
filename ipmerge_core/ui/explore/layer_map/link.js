// @ts-check
// The permalink: ?v=1&pack=..&s=..&l=..&m=..&u=..&b=..&o=..&c=..&p=..&e=..&q=.. in at most 300 characters
// for models of up to 700 matrices: the pair, the plan with all its digits, what is selected and
// pinned, the expert in view, and what the colours of the map show. `o` packs the cells set by hand,
// five to a byte, so that any number of them fits. The method and the options of the chosen merge
// follow (method, p.NAME, o.NAME), which Python writes and reads. A link is untrusted input: invalid values are replaced by their defaults,
// with a message.

import { MEMORY } from "../../web/memory.js";
import { cleanPlan, DEFAULT_PLAN } from "../../web/plan.js";
import { cellAt } from "../../web/preview.js";
import { findQuantity } from "../../web/quantities.js";

/** @import { Cell, Index, LinkContent, Override, Plan, Quantity, RawPlan, Target } from "../../web/types.d.ts" */
/**
 * @typedef {{ packId: string, home: string, index: Index, plan: Plan, target: Target | null,
 *   pinned?: Cell | null, expert?: number, quantity?: Quantity, spoken?: string }} Linked
 */

const LINK_VERSION = "1";
const LINK_KEYS = ["v", "pack", "s", "l", "m", "u", "b", "o", "c", "p", "e", "q"];
const SPOKEN = /^(?:method|[po]\..{1,60})$/, OPTION = /^o\..{1,60}$/;
const PAGE_KEYS = /^(?:_|utm_|present$|view$|logs$|footer$|embed)/; // of Gradio, the hub and the stage
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
  if (!/^[A-Za-z0-9_-]+$/.test(text) || text.length % 4 === 1) {
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
export function linkQuery({ packId, plan, index, target, pinned, expert, quantity, spoken }) {
  const query = new URLSearchParams({ v: LINK_VERSION, pack: packId, s: String(plan.s), l: String(plan.lambda) });
  if (plan.similarity !== DEFAULT_PLAN.similarity) query.set("m", plan.similarity);
  if (plan.variant !== DEFAULT_PLAN.variant) query.set("u", plan.variant);
  if (plan.budget) query.set("b", String(plan.budget));
  if (Object.keys(plan.overrides).length) query.set("o", packOverrides(index, plan.overrides));
  if (target) query.set("c", targetText(target));
  if (pinned) query.set("p", targetText({ kind: "cell", cell: pinned }));
  if (expert !== undefined && expert >= 0) query.set("e", String(expert));
  if (quantity && quantity.key !== "similarity") query.set("q", quantity.key);
  for (const [key, value] of new URLSearchParams(spoken)) query.set(key, value);
  return query;
}

/**
 * What is selected: a matrix as 5.q, a layer as 5, a range of layers as 5-9, a module as q.
 *
 * @param {Target} target
 */
function targetText(target) {
  switch (target.kind) {
    case "cell": return `${target.cell.layer}.${target.cell.module}`;
    case "layer": return String(target.layer);
    case "range": return `${target.from}-${target.to}`;
    default: return target.module;
  }
}

/**
 * @param {Index} index
 * @param {string} text
 * @returns {Target | null}
 */
function readTarget(index, text) {
  const found = /^(?:(\d{1,6})(?:\.([\w.-]+)|-(\d{1,6}))?|([a-z][\w.]*))$/.exec(text);
  if (!found) return null;
  const [, first, module, last, name] = found, from = Number(first), to = Number(last);
  if (name) return index.modules.includes(name) ? { kind: "module", module: name } : null;
  if (module) {
    const cell = cellAt(index, from, module);
    return cell ? { kind: "cell", cell } : null;
  }
  if (!index.layers.includes(from)) return null;
  if (last === undefined) return { kind: "layer", layer: from };
  return index.layers.includes(to) && from < to ? { kind: "range", from, to, anchor: from } : null;
}

/**
 * The part of a link that names the method, its parameters and the options of the chosen merge; without
 * the method, what also applies to the plan of the map: the options, and the parameters of no other
 * method.
 *
 * @param {string} search
 * @param {boolean} [withMethod]
 */
export function spokenPart(search, withMethod = true) {
  const query = new URLSearchParams(search), drops = !withMethod && query.has("method");
  return new URLSearchParams([...query].filter(([key]) => (drops ? OPTION : SPOKEN).test(key))).toString();
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
  for (const key of [...address.searchParams.keys()]) {
    if (LINK_KEYS.includes(key) || SPOKEN.test(key)) address.searchParams.delete(key);
  }
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
    s: given("s"), lambda: given("l"), similarity: given("m"), variant: given("u"), budget: given("b"),
    overrides: unpackOverrides(index, query.get("o"), problems),
  };
  for (const key of query.keys()) {
    if (!LINK_KEYS.includes(key) && !SPOKEN.test(key) && !PAGE_KEYS.test(key)) problems.push(`${key.slice(0, 40)} is not part of a link`);
  }
  const plan = cleanPlan(raw, index, problems);
  const target = selected(query, index, problems), pinned = pinnedCell(query, index, problems);
  const expert = expertOf(query, index, problems), quantity = quantityOf(query, problems);
  return { pack: query.get("pack"), plan, target, pinned, expert, ...(quantity ? { quantity } : {}), problems };
}

/**
 * @param {URLSearchParams} query
 * @param {Index} index
 * @param {string[]} problems
 */
function selected(query, index, problems) {
  const text = query.get("c"), target = text ? readTarget(index, text) : null;
  if (text && !target) problems.push(`c is ${text.slice(0, 40)}, which is no matrix, layer or module of this pair`);
  return target;
}

/**
 * @param {URLSearchParams} query
 * @param {Index} index
 * @param {string[]} problems
 */
function pinnedCell(query, index, problems) {
  const text = query.get("p"), target = text ? readTarget(index, text) : null;
  if (target?.kind === "cell") return target.cell;
  if (text) problems.push(`p is ${text.slice(0, 40)}, which is no matrix of this pair`);
  return null;
}

/**
 * @param {URLSearchParams} query
 * @param {Index} index
 * @param {string[]} problems
 */
function expertOf(query, index, problems) {
  const text = query.get("e");
  if (text === null) return -1;
  const expert = /^\d+$/.test(text) ? Number(text) : NaN;
  if (expert < index.nExperts) return expert;
  problems.push(`e is ${text.slice(0, 40)}, which is no expert of this pair`);
  return -1;
}

/**
 * @param {URLSearchParams} query
 * @param {string[]} problems
 */
function quantityOf(query, problems) {
  const text = query.get("q"), quantity = findQuantity(text);
  if (text !== null && !quantity) problems.push(`q is ${text.slice(0, 40)}, which is no quantity of the map`);
  return quantity?.key;
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
