// @ts-check
// Opening a pair: the content that Python sent, and the plan of the address or the history.

import { setText } from "../../web/dom.js";
import { measuredKnockout } from "../../web/memory.js";
import { cleanPlan, samePlan } from "../../web/plan.js";
import { indexPack } from "../../web/preview.js";
import { findQuantity, withKnockout } from "../../web/quantities.js";
import { buildPicks } from "./choices.js";
import { choose } from "./choosing.js";
import { growLater } from "./growing.js";
import { linkSearch, readLink, rememberLink } from "./link.js";
import { layOut } from "./painting.js";
import { begin, here, settle } from "./session.js";

/** @import { Content, Index, LinkContent, RawPlan, Target } from "../../web/types.d.ts" */
/** @import { LayerMap } from "./map.js" */

/**
 * Show a content: a pack and a plan; on the first one, the address may contain another plan or pair.
 *
 * @param {LayerMap} map
 */
export function open(map) {
  const { value } = map.host.props;
  /** @type {Content | null} */
  const content = typeof value === "string" && value ? JSON.parse(value) : value;
  map.dom.root.hidden = !content?.pack;
  if (!content?.pack) {
    map.set({ isOpen: false });
    return;
  }
  delete map.dom.root.dataset.growing;
  map.set({ reading: null });
  if (map.state.linkRead) openAgain(map, content);
  else openFirst(map, content);
  growLater(map);
}

/**
 * A change of the pair, or a step of the history that led to another pair.
 *
 * @param {LayerMap} map
 * @param {Content} content
 */
function openAgain(map, content) {
  const journey = takeContent(map, content);
  map.set({ spoken: "" }); // Python says it again where a merge is still chosen
  draw(map, "");
  if (journey) arrive(map, journey);
  else rememberLink(map.state);
  setText(map.dom.note, "");
  map.dom.notice.hidden = true;
}

/**
 * The first content, for which the address is read; and again where it named another pair.
 *
 * @param {LayerMap} map
 * @param {Content} content
 */
function openFirst(map, content) {
  takeContent(map, content);
  const link = readLink(content.link ?? linkSearch(map.arrival), map.state.index), elsewhere = linkElsewhere(map, link);
  if (elsewhere) {
    draw(map, "");
    setText(map.dom.note, "");
    map.set({ linkAsked: elsewhere });
    map.host.trigger("packselect", { pack: elsewhere });
    return;
  }
  const words = link ? followLink(map, link) : "";
  draw(map, words);
  if (link?.plan) {
    settle(map, words, true);
    if (map.state.target) choose(map, map.state.target);
  }
  complain(map, words);
  map.set({ linkRead: true });
}

/**
 * Show at the top what is wrong with a link, beside what was said before.
 *
 * @param {LayerMap} map
 * @param {string} words
 */
export function complain({ dom: { notice } }, words) {
  if (!words) return;
  setText(notice, [notice.hidden ? "" : notice.textContent, words].filter(Boolean).join(" "));
  notice.hidden = false;
}

/**
 * @param {string[]} problems
 */
export function problemWords(problems) {
  return problems.length ? `Some values of the link are invalid and were replaced by defaults: ${problems.join("; ")}.` : "";
}

/**
 * @param {LayerMap} map
 * @param {string} words The message of the status line.
 */
function draw(map, words) {
  buildPicks(map);
  layOut(map);
  setText(map.dom.status, words);
}

/**
 * Take over pack, presets and plan, and return the step of the history that led here, if one did. What
 * was on show before goes to the past, so that a change of the pair can be undone.
 *
 * @param {LayerMap} map
 * @param {Content} content
 */
function takeContent(map, content) {
  const before = map.state, isSame = content.id === before.packId;
  const records = withKnockout(content.pack.records, measuredKnockout(content.id) ?? content.knockout);
  const pack = { ...content.pack, records }, index = indexPack(pack);
  const journey = before.journey?.pack === content.id ? before.journey : null;
  const plan = cleanPlan(content.plan, index);
  map.set({
    isOpen: true, pack, packId: content.id, home: content.home ?? "", index, presets: content.presets, plan,
    journey: null, pinned: null, expert: -1, preset: null, target: isSame ? targetAgain(index, before.target) : null,
  });
  const isStep = before.isOpen && before.linkRead && !journey;
  if (isStep && !(isSame && samePlan(before.committed, plan))) map.set({ past: [...before.past, here(before)], future: [] });
  begin(map);
  return journey;
}

/**
 * The matrix that was chosen, in the pack that has come again.
 *
 * @param {Index} index
 * @param {Target | null} target
 * @returns {Target | null}
 */
function targetAgain(index, target) {
  const cell = target?.kind === "cell" ? index.byName.get(target.cell.name) : undefined;
  return cell ? { kind: "cell", cell } : null;
}

/**
 * The pair that a link asks for, where it is another one and has not been asked for yet.
 *
 * @param {LayerMap} map
 * @param {LinkContent | null} link
 */
function linkElsewhere({ state: { packId, linkAsked } }, link) {
  const pack = link?.pack;
  return pack && pack !== packId && pack !== linkAsked ? pack : null;
}

/**
 * Apply the content of a link; returns the message about it.
 *
 * @param {LayerMap} map
 * @param {LinkContent} link
 */
function followLink(map, { pack, plan, target, pinned, expert, quantity, problems }) {
  if (pack && pack !== map.state.packId) return "The pair of the link is not available; this pair is shown with its default plan.";
  if (plan) {
    map.set({ plan });
    begin(map);
  }
  map.set({
    target: target ?? null, pinned: pinned ?? null, expert: expert ?? -1,
    quantity: findQuantity(quantity) ?? map.state.quantity,
  });
  return problemWords(problems);
}

/**
 * The end of an undo or redo that led to another pair.
 *
 * @param {LayerMap} map
 * @param {{ plan: RawPlan, words: string }} journey
 */
function arrive(map, { plan, words }) {
  map.set({ plan: cleanPlan(plan, map.state.index) });
  begin(map);
  settle(map, words);
}
