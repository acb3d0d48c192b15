// @ts-check
// What has been measured, on the dials: a lane under each slider with the scores of evaluated plans, on
// an axis of their own from 0 to 100 %. Kept in this browser.

import { fill, node, shape } from "../../web/dom.js";
import { measuredPoints } from "../../web/memory.js";
import { cleanPlan } from "../../web/plan.js";
import { LAMBDA_STEPS, lambdaPosition } from "../../web/scales.js";
import { INSET, plotWidth } from "./dials.js";

/** @import { Measured, Plan } from "../../web/types.d.ts" */
/** @import { LayerMap } from "./map.js" */

const HEIGHT = 34;

/**
 * Draw both lanes; they are hidden where nothing has been measured.
 *
 * @param {LayerMap} map
 */
export function buildLanes(map) {
  const points = measuredPoints(map.state.packId);
  for (const dial of /** @type {const} */ (["s", "lambda"])) {
    const holder = map.find(`[data-measured=${dial}]`);
    holder.hidden = !points.length;
    if (points.length) holder.replaceChildren(lane(map, dial, points), caption(points));
  }
}

/**
 * @param {LayerMap} map
 * @param {"s" | "lambda"} dial
 * @param {Measured[]} points
 */
function lane(map, dial, points) {
  const width = plotWidth(map, map.dom.hist), plan = map.state.committed;
  const svg = shape("svg", { viewBox: `0 0 ${width + 2 * INSET} ${HEIGHT}`, class: "lm-lane", role: "img", "aria-label": laneWords(points) });
  const marks = points.flatMap((point) => {
    const own = cleanPlan(point.plan, map.state.index), x = INSET + placeOf(dial, own) * width;
    return marksOf(point, x, isNear(dial, own, plan));
  });
  return fill(svg, {}, [shape("line", { x1: INSET, x2: INSET + width, y1: HEIGHT - 2, y2: HEIGHT - 2, class: "lm-rule" }), ...marks]);
}

/**
 * @param {"s" | "lambda"} dial
 * @param {Plan} plan
 */
function placeOf(dial, { s, lambda }) {
  return dial === "s" ? s : lambdaPosition(lambda) / LAMBDA_STEPS;
}

/**
 * Whether a plan differs from the one on show in this dial's value alone.
 *
 * @param {"s" | "lambda"} dial
 * @param {Plan} own
 * @param {Plan} plan
 */
function isNear(dial, own, plan) {
  const other = dial === "s" ? own.lambda === plan.lambda : own.s === plan.s;
  return other && own.similarity === plan.similarity && own.variant === plan.variant;
}

/**
 * @param {Measured} point
 * @param {number} x
 * @param {boolean} isNearby
 */
function marksOf({ scores, hash }, x, isNearby) {
  /** @param {number} value A share. */
  const y = (value) => HEIGHT - 3 - value * (HEIGHT - 7);
  return scores.flatMap(({ label, group, share, low, high, n }) => {
    const style = `lm-measured-${group === "math" ? "math" : "other"}${isNearby ? "" : " lm-measured-far"}`;
    const words = `${label}: ${(100 * share).toFixed(1)} % (${(100 * low).toFixed(1)}–${(100 * high).toFixed(1)}), n ${n}, plan ${hash}`;
    return [
      shape("line", { x1: x, x2: x, y1: y(low), y2: y(high), class: style }),
      shape("circle", { cx: x, cy: y(share), r: 3.4, class: style }, shape("title", {}, words)),
    ];
  });
}

/** @param {Measured[]} points */
function caption(points) {
  const [{ scores }] = points, sizes = [...new Set(points.flatMap((point) => point.scores.map(({ n }) => n)))];
  const names = scores.map(({ label, group }) => node("span", { class: group === "math" ? "k-math" : "k-mllm" }, `● ${label} `));
  return node("p", { class: "lm-lane-words" }, "measured, 0 to 100 %: ", ...names, `n ${sizes.join(", ")}${Math.min(...sizes) < 200 ? ", small sample" : ""}`);
}

/** @param {Measured[]} points */
function laneWords(points) {
  return `Measured scores of ${points.length} plans: ${points.slice(0, 8).map(({ hash, scores }) => (
    `plan ${hash}: ${scores.map(({ label, share }) => `${label} ${(100 * share).toFixed(0)} %`).join(", ")}`)).join("; ")}`;
}
