// @ts-check
// Events to Python. They leave at once, but never two of a kind within a short while: a held-down key
// would send thirty a second. The last one always leaves.

/** @import { Host } from "../../web/types.d.ts" */

const PAUSE = 150;

export class Outbox {
  /** @type {Map<string, object | null>} What waits for its pause to end; null where nothing does. */
  #pauses = new Map();
  #unanswered = 0;

  /** @param {Host["trigger"]} trigger */
  constructor(trigger) {
    this.trigger = trigger;
  }

  /**
   * @param {"commit" | "cellselect"} name
   * @param {object} data
   */
  post(name, data) {
    if (this.#pauses.has(name)) {
      this.#pauses.set(name, data);
      return;
    }
    if (name === "commit") this.#unanswered += 1;
    this.trigger(name, data);
    this.#pauses.set(name, null);
    setTimeout(() => {
      const last = this.#pauses.get(name);
      this.#pauses.delete(name);
      if (last) this.post(name, last);
    }, PAUSE);
  }

  /** Python has answered a commit. */
  answered() {
    this.#unanswered -= 1;
  }

  /** Whether the server knows the plan on show: other tabs wait for that before they ask about it. */
  isSettled() {
    return this.#unanswered <= 0 && !this.#pauses.get("commit");
  }
}
