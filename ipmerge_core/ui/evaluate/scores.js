// @ts-check
// Scores as text and as rows of tables, and which is best. Pure, no DOM.

/** @import { Row, Value } from "../web/types.d.ts" */
/** @import { Axis, Content, CutRow, Point, Score, TaskInfo } from "./types.d.ts" */

export const SMALL = 200; // items; fewer are marked as a small sample
const ALPHA = 0.05;

/** @param {Score} score */
export function share({ right, n }) {
  return n ? right / n : 0;
}

/**
 * A share in percent with one decimal.
 *
 * @param {number} value
 */
export function percentPoints(value) {
  return (100 * value).toFixed(1);
}

/**
 * The score in percent with its interval and its number of items.
 *
 * @param {Score | undefined} score
 */
export function scoreWords(score) {
  if (!score?.n) return "–";
  return `${percentPoints(share(score))} % (${percentPoints(score.low)}–${percentPoints(score.high)}), n ${score.n}${score.n < SMALL ? ", small sample" : ""}`;
}

/**
 * The paired test against the first model.
 *
 * @param {Score | undefined} score
 */
export function testWords(score) {
  if (!score || score.fixed === null || score.broken === null || score.p === null) return "";
  return `fixed ${score.fixed}, broken ${score.broken}, p ${pWords(score.p)}`;
}

/** @param {number} p */
export function pWords(p) {
  if (p < 0.0001) return "< 0.0001";
  return p < 0.001 ? p.toFixed(4) : p.toFixed(3);
}

/**
 * The difference to the first model in points, with its sign.
 *
 * @param {Score | undefined} score
 */
export function gainWords(score) {
  if (!score?.n || score.fixed === null || score.broken === null) return "";
  const gain = (100 * (score.fixed - score.broken)) / score.n;
  return `${gain < 0 ? "−" : "+"}${Math.abs(gain).toFixed(1)}`;
}

/** @param {Score | undefined} score */
export function isSignificant(score) {
  return score?.p !== null && score?.p !== undefined && score.p < ALPHA;
}

/**
 * The points with the best score of a task, several in a tie; none if all are equal.
 *
 * @param {Content} content
 * @param {string} task
 */
export function bestPoints({ points: all }, task) {
  const shares = all.map(({ scores }) => (scores[task]?.n ? share(scores[task]) : -1));
  const top = Math.max(...shares);
  return shares.every((value) => value === top) ? [] : shares.flatMap((value, i) => (value === top ? [i] : []));
}

/**
 * The rows of the table of all scores: a row for each model, columns for each task.
 *
 * @param {Content} content
 * @returns {Row[]}
 */
export function scoreRows({ points: all, tasks, axes }) {
  return all.map((point, i) => ({
    number: i,
    model: point.label,
    ...Object.fromEntries(axes.map(({ label }, k) => [label, point.values[k] ?? ""])),
    plan: point.plan || "–",
    matrices: point.matrices,
    change: point.change ?? "",
    ...Object.assign({}, ...tasks.map(({ name }) => columnsOf(name, point.scores[name]))),
  }));
}

/** @type {[string, (score: Score) => Value][]} */
const COLUMNS = [
  ["right", ({ right }) => right], ["n", ({ n }) => n], ["share", share], ["low", ({ low }) => low], ["high", ({ high }) => high],
  ["fixed", ({ fixed }) => fixed], ["broken", ({ broken }) => broken], ["p", ({ p }) => p],
  ["tokens", ({ length }) => length], ["cut off", ({ cut }) => cut],
];

/**
 * @param {string} name
 * @param {Score | undefined} score
 * @returns {Row}
 */
function columnsOf(name, score) {
  return Object.fromEntries(COLUMNS.map(([column, of]) => [`${name} ${column}`, (score?.n ? of(score) : null) ?? ""]));
}

/**
 * The rows of the table of skills.
 *
 * @param {Content} content
 * @returns {Row[]}
 */
export function skillRows({ points: all }) {
  const names = [...new Set(all.flatMap(({ skills }) => Object.keys(skills)))];
  return names.map((name) => ({
    skill: name.split("/").pop() ?? name,
    ...Object.fromEntries(all.map(({ label, skills }) => [label, scoreWords(skills[name])])),
  }));
}

/**
 * The rows of a knock-out.
 *
 * @param {Content} content
 * @returns {Row[]}
 */
export function cutRows({ cuts, tasks }) {
  return cuts.map(({ model, layer, module, scores }) => ({
    model, layer, module, ...Object.assign({}, ...tasks.map(({ name }) => columnsOf(name, scores[name]))),
  }));
}

/**
 * All numbers of a result, as a CSV has them.
 *
 * @param {Content} content
 */
export function resultRows(content) {
  return content.kind === "knockout" ? cutRows(content) : scoreRows(content);
}

/**
 * The task that a plot shows in its first place: mathematics, then anything else.
 *
 * @param {TaskInfo[]} tasks
 */
export function orderedTasks(tasks) {
  const rank = { math: 0, perception: 1, other: 2 };
  return [...tasks].sort((a, b) => rank[a.group] - rank[b.group]);
}

/**
 * The value of a parameter as text.
 *
 * @param {Value} value
 */
export function valueWords(value) {
  if (value === null || value === undefined) return "none";
  return typeof value === "number" ? String(Number(value.toPrecision(4))) : String(value);
}

/**
 * A point in one sentence, for its button and for the panel.
 *
 * @param {Content} content
 * @param {Point} point
 */
export function pointWords({ tasks }, point) {
  const scored = orderedTasks(tasks).map(({ name, label }) => `${label} ${scoreWords(point.scores[name])}`);
  const merged = point.plan ? [`${point.matrices} matrices merge`] : [];
  return [point.label, ...merged, ...scored].join("; ");
}

/**
 * How much the score of a task drops when a module is knocked out, in points; null where nothing was
 * measured.
 *
 * @param {CutRow | undefined} row
 * @param {string} task
 */
export function dropOf(row, task) {
  const score = row?.scores[task];
  return score?.n && score.fixed !== null && score.broken !== null ? (score.fixed - score.broken) / score.n : null;
}

/**
 * The share of the uncut model, which a cut is compared with, in percent.
 *
 * @param {Score | undefined} score
 */
export function uncutWords(score) {
  if (!score?.n || score.fixed === null || score.broken === null) return "–";
  return `${percentPoints((score.right - score.fixed + score.broken) / score.n)} %`;
}

/** @param {Axis} axis */
export function isNumeric({ values }) {
  return values.every((value) => typeof value === "number");
}

