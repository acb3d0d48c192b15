// @ts-check
// When to ask for the state of all runs: one question at a time, the next one a pause after its answer
// and only while a run is in progress. A question that is not answered is asked again, more and more
// slowly; a page that nobody looks at asks nothing.

// The pause by the age of a run, in milliseconds: a small model is merged within the first second.
const PAUSES = [
  { until: 3000, pause: 150 },
  { until: 60_000, pause: 500 },
  { until: Infinity, pause: 1500 },
];
const PATIENCE = 8000; // for an answer
const MOST_PATIENCE = 60_000;

export class Poll {
  #n = 0;
  #asked = 0; // the number of the question that waits for its answer, or 0
  #again = false; // whether to ask once more when it is answered
  #since = 0; // when the runs in progress were first seen
  #patience = PATIENCE;
  #timer = 0;

  /**
   * @param {(n: number, isFirst: boolean) => void} send
   * @param {{ isHidden(): boolean, now(): number, later(wake: () => void, ms: number): number, cancel(timer: number): void }} page
   */
  constructor(send, page) {
    this.send = send;
    this.page = page;
    this.isFirst = true;
  }

  /** The number of the next event, whatever it is: every answer has another one. */
  next() {
    this.#n += 1;
    return this.#n;
  }

  /** Ask now, or as soon as the question that is under way has been answered. */
  ask() {
    if (this.#asked) {
      this.#again = true;
      return;
    }
    this.#again = false;
    this.#asked = this.next();
    this.#wake(() => this.#giveUp(), this.#patience);
    this.send(this.#asked, this.isFirst);
  }

  /**
   * @param {number} n The question that is answered.
   * @param {boolean} isRunning Whether a run is in progress.
   */
  answered(n, isRunning) {
    if (n !== this.#asked) return;
    this.#asked = 0;
    this.isFirst = false;
    this.#patience = PATIENCE;
    this.page.cancel(this.#timer);
    if (!isRunning) this.#since = 0;
    else if (!this.#since) this.#since = this.page.now();
    if (this.#again) this.ask();
    else if (isRunning && !this.page.isHidden()) this.#wake(() => this.ask(), this.#pause());
  }

  #pause() {
    const age = this.page.now() - this.#since;
    return (PAUSES.find(({ until }) => age < until) ?? PAUSES[0]).pause;
  }

  #giveUp() {
    this.#asked = 0;
    this.#patience = Math.min(2 * this.#patience, MOST_PATIENCE);
    if (!this.page.isHidden()) this.ask();
  }

  /**
   * @param {() => void} act
   * @param {number} ms
   */
  #wake(act, ms) {
    this.page.cancel(this.#timer);
    this.#timer = this.page.later(act, ms);
  }
}
