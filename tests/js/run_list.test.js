// @ts-check
import assert from "node:assert/strict";
import { test } from "node:test";

import { Poll } from "../../ipmerge_core/ui/run_list/poll.js";
import { changesBetween, shareOf, summaryOf } from "../../ipmerge_core/ui/run_list/summary.js";
import { visitorSecret } from "../../ipmerge_core/ui/run_list/visitor.js";
import { recall } from "../../ipmerge_core/ui/web/memory.js";

/** @import { Run } from "../../ipmerge_core/ui/run_list/types.d.ts" */

/**
 * @param {string} id
 * @param {string} state
 * @param {number} [share]
 * @returns {Run}
 */
function makeRun(id, state, share = 0) {
  return {
    id, state, share, kind: "Merge", name: id, label: state, running: state === "running" || state === "cancelling",
    words: "", error: "", facts: [], actions: [], download: "", deletes: "",
  };
}

/** A page whose clock a test moves, and the questions that it has sent. */
function makePage() {
  const page = { time: 0, hidden: false, wake: /** @type {null | [at: number, act: () => void]} */ (null) };
  /** @type {[n: number, isFirst: boolean][]} */
  const sent = [];
  const poll = new Poll((n, isFirst) => sent.push([n, isFirst]), {
    isHidden: () => page.hidden,
    now: () => page.time,
    later: (act, ms) => { page.wake = [page.time + ms, act]; return 1; },
    cancel: () => { page.wake = null; },
  });
  const pass = (/** @type {number} */ ms) => {
    const end = page.time + ms;
    while (page.wake && page.wake[0] <= end) {
      const [at, act] = page.wake;
      page.wake = null;
      page.time = at;
      act();
    }
    page.time = end;
  };
  return { page, poll, sent, pass };
}

test("a question follows the answer to the one before, and only while a run is in progress", () => {
  const { poll, sent, pass } = makePage();
  poll.ask();
  poll.ask();
  assert.deepEqual(sent, [[1, true]]);
  poll.answered(1, true);
  assert.deepEqual(sent.at(-1), [2, false], "asked meanwhile, so at once");
  pass(5000);
  assert.equal(sent.length, 2, "no second question before the answer");
  poll.answered(2, true);
  pass(149);
  assert.equal(sent.length, 2);
  pass(1);
  assert.equal(sent.length, 3);
  poll.answered(3, false);
  pass(3_600_000);
  assert.equal(sent.length, 3, "an hour without runs asks nothing");
});

test("a long run is asked about less often", () => {
  const { poll, sent, pass } = makePage();
  poll.ask();
  let minutes = 0;
  const perMinute = [];
  for (; minutes < 3; minutes += 1) {
    const before = sent.length;
    for (let ms = 0; ms < 60_000; ms += 50) {
      const [n] = sent[sent.length - 1] ?? [0];
      poll.answered(n, true);
      pass(50);
    }
    perMinute.push(sent.length - before);
  }
  assert.ok(perMinute[0] <= 135 && perMinute[2] <= 41, String(perMinute));
});

test("an answer to another event starts no question", () => {
  const { poll, sent, pass } = makePage();
  poll.ask();
  const act = poll.next();
  poll.answered(act, true);
  pass(2000);
  assert.equal(sent.length, 1);
  poll.answered(1, true);
  pass(500);
  assert.deepEqual(sent.at(-1), [3, false]);
});

test("a question without an answer is asked again, more and more slowly, as the first one", () => {
  const { poll, sent, pass } = makePage();
  poll.ask();
  pass(8000);
  assert.equal(sent.length, 2);
  pass(8000);
  assert.equal(sent.length, 2);
  pass(8000);
  assert.equal(sent.length, 3);
  pass(600_000);
  assert.ok(sent.length <= 14, String(sent.length));
  assert.ok(sent.every(([, isFirst]) => isFirst));
});

test("a page that nobody looks at asks nothing until it is looked at again", () => {
  const { page, poll, sent, pass } = makePage();
  poll.ask();
  page.hidden = true;
  poll.answered(1, true);
  pass(60_000);
  assert.equal(sent.length, 1);
  page.hidden = false;
  poll.ask();
  assert.equal(sent.length, 2);
});

test("the button says how many runs there are and how far they have come", () => {
  assert.equal(summaryOf([]), "Runs");
  assert.equal(summaryOf([makeRun("a", "finished", 1)]), "Runs (1)");
  assert.equal(summaryOf([makeRun("a", "running", 0.439), makeRun("b", "finished", 1)]), "1 run: 43 %");
  assert.equal(summaryOf([makeRun("a", "running", 0.2), makeRun("b", "cancelling", 0.6)]), "2 runs: 40 %");
  assert.equal(shareOf([makeRun("a", "failed", 0.5)]), 0);
});

test("only new states are read aloud, never progress", () => {
  const before = [makeRun("a", "running", 0.1), makeRun("b", "running"), makeRun("c", "failed")];
  const after = [makeRun("a", "running", 0.9), makeRun("b", "finished"), makeRun("d", "running"), makeRun("e", "finished")];
  assert.deepEqual(changesBetween(before, after), ["Merge b: finished.", "Merge d: running."]);
  assert.deepEqual(changesBetween(after, after), []);
});

test("all windows of a browser have one secret, and a page without storage has one of its own", () => {
  const stored = new Map();
  let isClosed = false;
  const touch = () => { if (isClosed) throw new Error("closed"); };
  Object.assign(globalThis, { window: { localStorage: {
    getItem: (/** @type {string} */ key) => { touch(); return stored.get(key) ?? null; },
    setItem: (/** @type {string} */ key, /** @type {string} */ value) => { touch(); stored.set(key, value); },
  } } });
  const secret = visitorSecret();
  assert.match(secret, /^[0-9a-f]{64}$/);
  assert.equal(visitorSecret(), secret);
  assert.equal(recall("visitor", ""), secret);
  assert.ok([...stored.values()].some((text) => text.includes(secret)));
  isClosed = true;
  assert.equal(visitorSecret(), secret, "as long as the page");
});
