// @ts-check
// The prompt in the page. Enter and the Submit button clear it before the next key can arrive, and what
// is typed afterwards stays, whatever the server answers: Gradio replaces a value some frames later, and
// keys in between would be lost. So a text is taken from, and returned to, the text box itself.

const BOX = "#prompt textarea";
const SUBMIT = "#prompt [data-testid=submit-button]";
const FILES = "#prompt [aria-label='Remove file']";

/** @type {string | null} */
let taken = null; // the text of a question between Enter and its event
let isSending = false; // from Enter until the answers to a question are over

/** Listen to the prompt, which may not be mounted yet, and to the events of `sending.py`. */
export function watchPrompt() {
  document.addEventListener("keydown", pressed, { capture: true });
  document.addEventListener("click", ({ target }) => {
    if (target instanceof Element && target.closest(SUBMIT)) take();
  }, { capture: true });
  document.addEventListener("ipmerge-send", (event) => {
    const { detail } = /** @type {CustomEvent<{ text: string | null }>} */ (event);
    [detail.text, taken] = [taken, null];
    if (detail.text !== null) removeFiles();
  });
  document.addEventListener("ipmerge-refused", (event) => {
    const { detail } = /** @type {CustomEvent<{ text: string, isReturned: boolean }>} */ (event);
    isSending = false;
    detail.isReturned = isEmpty();
    if (detail.isReturned) write(detail.text);
  });
  document.addEventListener("ipmerge-answered", () => { isSending = false; });
}

/** @param {KeyboardEvent} event */
function pressed(event) {
  if (event.key !== "Enter" || event.shiftKey || event.target !== box()) return;
  if (event.isComposing) event.stopPropagation(); // this Enter chooses among proposed characters
  else take();
}

/** Take the text out of the prompt, unless an earlier question is being answered. */
function take() {
  const found = box();
  if (!found || isSending || isAnswering()) return;
  [taken, isSending] = [found.value, true];
  write("");
}

/** @param {string} text */
function write(text) {
  const found = box();
  if (!found) return;
  found.value = text;
  found.dispatchEvent(new Event("input", { bubbles: true }));
}

function removeFiles() {
  const buttons = [.../** @type {NodeListOf<HTMLElement>} */ (document.querySelectorAll(FILES))];
  for (const button of buttons.reverse()) button.click(); // the last first: they count from the start
}

function isEmpty() {
  return !box()?.value && !document.querySelector(FILES);
}

/** Whether a question is being answered, also one that was not sent from the prompt. */
function isAnswering() {
  const stop = document.querySelector("#stop");
  return stop instanceof HTMLButtonElement && !stop.disabled;
}

function box() {
  const found = document.querySelector(BOX);
  return found instanceof HTMLTextAreaElement ? found : null;
}
