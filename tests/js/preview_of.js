// @ts-check
// The page's previews of plans, for tests in Python: reads {"pack": ..., "plans": [...]} from standard
// input and writes one preview per plan.

import { text } from "node:stream/consumers";

import { cleanPlan } from "../../ipmerge_core/ui/web/plan.js";
import { indexPack, previewOf } from "../../ipmerge_core/ui/web/preview.js";

const { pack, plans } = JSON.parse(await text(process.stdin));
const index = indexPack(pack);
process.stdout.write(JSON.stringify(plans.map((/** @type {object} */ plan) => previewOf(index, cleanPlan(plan, index)))));
