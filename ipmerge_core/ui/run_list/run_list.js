// @ts-check
// The list of runs, the component: a button in the frame of all tabs and a drawer below it. It asks
// Python for the state of all runs at once; the answer updates the tabs too.

import { closest, part, setText } from "../web/dom.js";
import { Poll } from "./poll.js";
import { makeRow, paintRow } from "./rows.js";
import { changesBetween, shareOf, summaryOf } from "./summary.js";
import { visitorSecret } from "./visitor.js";

/** @import { Host } from "../web/types.d.ts" */
/** @import { Content, Run } from "./types.d.ts" */

const page = {
  isHidden: () => document.hidden,
  now: () => performance.now(),
  later: (/** @type {() => void} */ wake, /** @type {number} */ ms) => window.setTimeout(wake, ms),
  cancel: (/** @type {number} */ timer) => window.clearTimeout(timer),
};

class RunList {
  /** @param {Host} host */
  constructor(host) {
    const { element } = host;
    this.host = host;
    this.dom = {
      root: part(element, ".rl"), open: part(element, ".rl-open"), drawer: part(element, ".rl-drawer"),
      none: part(element, ".rl-none"), list: part(element, ".rl-list"), more: part(element, ".rl-more"),
      said: part(element, ".rl-said"), failed: part(element, ".rl-failed"),
    };
    this.visitor = visitorSecret();
    /** @type {Run[] | null} */
    this.runs = null; // before the first answer
    /** @type {Map<string, string>} Why the last action on a run failed. */
    this.failures = new Map();
    /** @type {Map<string, number>} Runs whose action has not been answered, with its number. */
    this.pending = new Map();
    this.poll = new Poll((n, first) => this.host.trigger("tick", { n, first, visitor: this.visitor }), page);
  }

  /** Take the content that Python has sent. */
  read() {
    const { value } = this.host.props;
    if (typeof value !== "string" || !value) return;
    const content = /** @type {Content} */ (JSON.parse(value));
    for (const [run, n] of this.pending) if (content.n >= n) this.pending.delete(run);
    if (content.run) this.note(content);
    const changes = this.runs && changesBetween(this.runs, content.runs);
    if (changes?.length) setText(this.dom.said, changes.join(" "));
    this.runs = content.runs;
    this.paint(content);
    this.poll.answered(content.n, content.runs.some((run) => run.running));
  }

  /** @param {Content} content The answer to an action. */
  note({ run, failed, runs }) {
    if (failed) this.failures.set(run, failed);
    else this.failures.delete(run);
    const isGone = failed !== "" && runs.every((each) => each.id !== run); // so no row can say it
    setText(this.dom.failed, isGone ? `✕ ${failed}` : "");
    this.dom.failed.hidden = !isGone;
  }

  /** @param {Content} content */
  paint({ runs, more }) {
    const { open, none, list } = this.dom;
    setText(open, summaryOf(runs));
    if (runs.some((run) => run.running)) {
      open.dataset.running = "true";
      open.style.setProperty("--rl-share", `${Math.floor(100 * shareOf(runs))}%`);
    } else delete open.dataset.running;
    none.hidden = runs.length > 0;
    setText(this.dom.more, `${more} older runs are not listed.`);
    this.dom.more.hidden = !more;
    const rows = new Map([...list.querySelectorAll("li")].map((row) => [row.dataset.run, row]));
    runs.forEach((run, i) => {
      const row = rows.get(run.id) ?? makeRow(run);
      rows.delete(run.id);
      if (list.children[i] !== row) moveTo(list, row, i);
      paintRow(row, run, this.failures.get(run.id) ?? "");
    });
    for (const row of rows.values()) this.remove(row);
  }

  /** @param {HTMLElement} row A row whose run is gone; the focus goes to the next one. */
  remove(row) {
    const next = row.nextElementSibling ?? row.previousElementSibling;
    const hadFocus = row.contains(document.activeElement);
    row.remove();
    const button = next?.querySelector("button:not([hidden])") ?? this.dom.drawer.querySelector("button");
    if (hadFocus && button instanceof HTMLElement) button.focus();
  }

  /** @param {boolean} isOpen */
  toggle(isOpen) {
    this.dom.drawer.hidden = !isOpen;
    this.dom.open.setAttribute("aria-expanded", String(isOpen));
    if (isOpen) this.poll.ask();
  }

  /**
   * @param {string} action
   * @param {HTMLElement} row
   */
  act(action, row) {
    const run = row.dataset.run ?? "", confirm = part(row, ".rl-confirm");
    if (action === "delete" || action === "keep") {
      confirm.hidden = action === "keep";
      part(row, action === "keep" ? "[data-act=delete]" : "[data-act=keep]").focus();
      return;
    }
    if (this.pending.has(run)) return; // a second press
    const asked = { n: this.poll.next(), visitor: this.visitor, run, action };
    if (action === "show" || action === "try") {
      this.host.trigger("open", asked);
      this.toggle(false);
      this.dom.open.focus();
      return;
    }
    this.pending.set(run, asked.n);
    this.host.trigger("act", action === "confirm" ? { ...asked, action: "delete" } : asked);
  }
}

/** @param {Host} host */
export function mount(host) {
  const list = new RunList(host);
  Object.assign(host.element, { ipmerge: { ask: () => list.poll.ask() } });
  host.watch("value", () => list.read());
  listen(list);
  window.setTimeout(() => list.poll.ask(), 0); // what the browser remembers is in place by then
}

/** @param {RunList} list */
function listen(list) {
  const { root, open, drawer } = list.dom;
  root.addEventListener("click", (event) => {
    const button = closest(event, "button");
    if (!button) return;
    const row = button.closest("li"), { act } = button.dataset;
    if (button === open) list.toggle(Boolean(drawer.hidden));
    else if (row && act) list.act(act, row);
    else if (act === "close") close();
  });
  function close() {
    list.toggle(false);
    open.focus();
  }
  root.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !drawer.hidden) close();
  });
  document.addEventListener("pointerdown", (event) => {
    if (event.target instanceof Node && !root.contains(event.target)) list.toggle(false);
  });
  document.addEventListener("visibilitychange", () => { if (!document.hidden) list.poll.ask(); });
  window.addEventListener("focus", () => list.poll.ask());
}

/**
 * Move a row, unless that would take the focus away from it.
 *
 * @param {HTMLElement} list
 * @param {HTMLElement} row
 * @param {number} i
 */
function moveTo(list, row, i) {
  const focused = row.contains(document.activeElement) ? document.activeElement : null;
  list.insertBefore(row, list.children[i] ?? null);
  if (focused instanceof HTMLElement) focused.focus();
}
