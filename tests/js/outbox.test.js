// @ts-check
import assert from "node:assert/strict";
import { test } from "node:test";

import { Outbox } from "../../ipmerge_core/ui/explore/layer_map/outbox.js";

/** @param {import("node:test").TestContext} context */
function sent({ mock }) {
  mock.timers.enable({ apis: ["setTimeout"] });
  /** @type {[string, object][]} */
  const events = [];
  return { events, outbox: new Outbox((name, data) => events.push([name, data])), wait: (/** @type {number} */ ms) => mock.timers.tick(ms) };
}

test("the first leaves at once, then at most one in a pause, and the last always", (context) => {
  const { events, outbox, wait } = sent(context);
  for (let s = 0; s < 10; s++) outbox.post("commit", { s });
  assert.deepEqual(events, [["commit", { s: 0 }]]);
  wait(150);
  assert.deepEqual(events, [["commit", { s: 0 }], ["commit", { s: 9 }]]);
  wait(1000);
  assert.equal(events.length, 2);
  outbox.post("commit", { s: 11 });
  assert.deepEqual(events[2], ["commit", { s: 11 }]);
});

test("kinds of events do not wait for each other", (context) => {
  const { events, outbox } = sent(context);
  outbox.post("commit", {});
  outbox.post("cellselect", {});
  assert.deepEqual(events.map(([name]) => name), ["commit", "cellselect"]);
});

test("it is settled when nothing waits and every commit was answered", (context) => {
  const { outbox, wait } = sent(context);
  assert.ok(outbox.isSettled());
  outbox.post("commit", { s: 1 });
  outbox.post("commit", { s: 2 });
  outbox.answered();
  assert.ok(!outbox.isSettled(), "the second still waits");
  wait(150);
  assert.ok(!outbox.isSettled(), "the second is not answered");
  outbox.answered();
  assert.ok(outbox.isSettled());
});
