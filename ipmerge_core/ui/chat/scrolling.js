// @ts-check
// Scrolling of the chats: an answer is followed to its end until the visitor scrolls up, and the chats
// scroll together. Gradio's own following scrolls down 300 ms after every piece of an answer, also when
// the visitor has scrolled up since, so `layout.py` turns it off.

const CHATS = "#chats [id^=chat-]";
const LOG = "[role=log]"; // what scrolls in a chat
const USER_SCROLL = 1000; // milliseconds after the last wheel, touch or key in a chat
const AT_END = 40; // pixels above the end that still count as the end

/**
 * What is known of a scroller: where it was, how many questions it had, and whether it follows.
 *
 * @typedef {{ top: number, questions: number, follows: boolean }} Known
 */

/** @type {WeakMap<Element, Known>} */
const known = new WeakMap();

/** Listen to scrolling in the chats, which may not be mounted yet. */
export function watchScrolling() {
  /** @type {Element | null} */
  let moved = null; // the chat that the visitor scrolls
  let when = 0;
  const note = (/** @type {Event} */ { target }) => {
    const chat = target instanceof Element ? target.closest(CHATS) : null;
    if (chat) [moved, when] = [chat, performance.now()];
  };
  for (const name of ["wheel", "touchmove", "pointerdown", "keydown"]) {
    document.addEventListener(name, note, { capture: true, passive: true });
  }
  document.addEventListener("scroll", ({ target }) => {
    if (!(target instanceof Element) || !target.matches(`${CHATS} ${LOG}`)) return;
    read(target);
    if (!moved?.contains(target) || performance.now() - when > USER_SCROLL || !isLinked()) return;
    when = performance.now();
    scrollOthers(moved, target);
  }, { capture: true, passive: true });
  document.addEventListener("load", followAnswers, { capture: true, passive: true }); // images
}

/** Scroll the chats to their end after a change of the page, unless the visitor has scrolled up. */
export function followAnswers() {
  for (const log of document.querySelectorAll(`${CHATS} ${LOG}`)) {
    const now = read(log);
    const questions = log.querySelectorAll("[data-testid=user]").length;
    if (questions !== now.questions) now.follows = true;
    now.questions = questions;
    if (now.follows && endOf(log) - log.scrollTop > 1) scrollTo(log, endOf(log));
  }
}

/**
 * Stop following where it was scrolled up, and follow again at the end. Growth of an answer may move
 * the end away before an event arrives, so only the direction counts.
 *
 * @param {Element} log
 */
function read(log) {
  const now = known.get(log) ?? { top: log.scrollTop, questions: 0, follows: true };
  known.set(log, now);
  if (endOf(log) - log.scrollTop <= AT_END) now.follows = true;
  else if (log.scrollTop < now.top) now.follows = false;
  now.top = log.scrollTop;
  return now;
}

/**
 * @param {Element} log
 * @param {number} top
 */
function scrollTo(log, top) {
  log.scrollTop = top;
  read(log); // now, because the event comes with the next frame
}

/** @param {Element} log */
function endOf(log) {
  return log.scrollHeight - log.clientHeight;
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
function scrollOthers(moved, scroller) {
  const share = scroller.scrollTop / Math.max(1, endOf(scroller));
  for (const log of document.querySelectorAll(`${CHATS} ${LOG}`)) {
    if (!moved.contains(log)) scrollTo(log, share * endOf(log));
  }
}
