// @ts-check
// The results of the Evaluate tab, the component; the HTML report mounts it as Gradio does. It talks to
// Python by trigger("take"), trigger("taken"), trigger("edited"), trigger("opened") and trigger("drawn").

import { closest, node, part, setText } from "../web/dom.js";
import { percent } from "../web/format.js";
import { createStore } from "../web/store.js";
import { csvText, dataTable, listenToTables, refreshTables, saveText, tableAction } from "../web/tables.js";
import { listenToFigures } from "./figure_points.js";
import { flipList } from "./flips.js";
import { heatPlot } from "./heat_plot.js";
import { knockoutMaps } from "./knockout.js";
import { pointPanel, takenPanel } from "./point_panel.js";
import { bestPoints, cutRows, gainWords, isSignificant, orderedTasks, pWords, resultRows, scoreWords, share, skillRows } from "./scores.js";
import { searchTables } from "./search_tables.js";
import { sweepPlot } from "./sweep_plot.js";
import { publish } from "./measured.js";
import { takeOnMap, undoOnMap } from "./taking.js";

/** @import { Host } from "../web/types.d.ts" */
/** @import { Content, Score, State } from "./types.d.ts" */

/** @type {Record<string, string>} */
const TYPES = { csv: "text/csv", json: "application/json", html: "text/html" };
/** The order of a search's evaluations at first. */
const BEST_FIRST = { key: "score", down: true };

export class Evaluation {
  /** @param {Host} host */
  constructor(host) {
    const { element } = host;
    this.host = host;
    this.element = element;
    /** @param {string} name */
    const found = (name) => part(element, `.ev-${name}`);
    this.dom = {
      root: found("title").closest("section") ?? element, title: found("title"), made: found("made"), notes: found("notes"),
      plot: found("plot"), point: found("point"), tables: found("tables"), flips: found("flips"),
      twins: part(element, ".lm-twins"), status: part(element, ".lm-status"),
    };
    /** @type {State} */
    const first = { content: null, sort: BEST_FIRST, point: -1, taken: -1, listed: -1, task: "", filter: "", width: 0, served: Boolean(host.server?.result_file) };
    this.store = createStore(first);
  }

  get state() {
    return this.store.get();
  }

  /** @param {Partial<State>} patch */
  set(patch) {
    this.store.set(patch);
  }

  /** Show what Python has sent. */
  open() {
    const { value } = this.host.props;
    /** @type {Content | null} */
    const content = typeof value === "string" && value ? JSON.parse(value) : value;
    const isSame = content !== null && content?.id === this.state.content?.id;
    this.element.hidden = !content?.id;
    if (!content?.id) return;
    this.set({ content, ...(isSame ? {} : { point: firstPoint(content), taken: -1, listed: -1, task: "", filter: "", sort: BEST_FIRST }) });
    setText(this.dom.title, content.title);
    setText(this.dom.made, content.facts.map(([name, words]) => `${name} ${words}`).join(" · "));
    this.dom.notes.replaceChildren(...content.notes.map((words) => node("li", {}, words)));
    this.#buildTables(content);
    if (this.state.served) publish(content);
    this.layOut();
    if (this.state.served) this.#draw(content);
  }

  /**
   * Let Python draw the figures of a search, in the colours of the page, or hide those of another one.
   *
   * @param {Content} content
   */
  #draw({ id, pack }) {
    const { width } = this.state;
    this.host.trigger("drawn", { id, pack, dark: document.body.classList.contains("dark"), narrow: width > 0 && width < 620 });
  }

  /** Everything that depends on the width. */
  layOut() {
    const width = this.dom.root.clientWidth;
    if (width) this.set({ width });
    this.paint();
  }

  paint() {
    const { state } = this, { content } = state;
    if (!content) return;
    const isSweep = content.kind === "sweep";
    const plot = content.kind === "knockout" ? knockoutMaps(content)
      : isSweep && state.width ? (content.axes.length > 1 ? heatPlot : sweepPlot)(content, state) : null;
    this.dom.plot.replaceChildren(...(plot ? [plot] : []));
    this.dom.tables.replaceChildren(...(content.kind === "models" || content.kind === "ablation" ? [scoreTable(content)] : searchTables(content, state)));
    this.dom.flips.replaceChildren(...flipList(content, state));
    refreshTables(this.element);
    this.mark();
  }

  /** Mark the point in view and the one that is taken; the plot stays, so that a press is one. */
  mark() {
    const { state } = this, { content, point, taken } = state;
    if (!content) return;
    const panel = content.kind === "search" ? takenPanel(content, state) : content.points.length ? pointPanel(content, state) : [];
    this.dom.point.replaceChildren(...panel);
    for (const each of this.element.querySelectorAll("[data-point]")) {
      const i = Number(each.getAttribute("data-point")), isShown = i === point;
      each.classList.toggle("ev-is-shown", isShown);
      each.setAttribute("aria-pressed", String(i === taken));
      if (content.kind === "sweep") each.setAttribute("tabindex", isShown ? "0" : "-1");
    }
  }

  /**
   * Show another point, and keep the focus on its button.
   *
   * @param {number} point
   * @param {boolean} [focus]
   */
  show(point, focus = false) {
    if (point === this.state.point) return;
    this.set({ point });
    this.mark();
    const button = this.element.querySelector(`[data-point="${point}"]`);
    if (focus && (button instanceof HTMLElement || button instanceof SVGElement)) button.focus();
  }

  /** Choose the merge of the point in view, in Explore where it can be set there. */
  take() {
    const { content, point: i } = this.state, point = content?.points[i];
    if (!content || !point?.takes || !this.state.served) return;
    const onMap = point.choice && takeOnMap(content.pack, point.choice, `Plan of the evaluation: ${point.label}.`);
    if (onMap) this.host.trigger("taken", {});
    else this.host.trigger("take", { id: content.id, pack: content.pack, point: i });
    this.set({ taken: i });
    this.mark();
    setText(this.dom.status, `${point.label} is the chosen plan${point.plan ? `, plan ${point.plan}` : ""}.`);
  }

  /**
   * Choose the merge of an evaluation, and open the tab in which its plan is set.
   *
   * @param {number} number
   */
  openPlan(number) {
    const point = this.state.content?.searched?.rows.findIndex((row) => row.number === number) ?? -1;
    if (!this.state.content?.points[point]?.takes) return;
    this.show(point);
    this.take();
    this.openTab();
  }

  /** Open the tab in which the chosen plan is set: Explore, or Merge for the other methods. */
  openTab() {
    const { content, taken } = this.state;
    if (content?.points[taken]) this.host.trigger("edited", { tab: content.points[taken].choice ? "explore" : "merge" });
  }

  /** Return to the merge that was chosen before. */
  untake() {
    const { content, taken } = this.state, point = content?.points[taken];
    if (!content || !point) return;
    if (point.choice && undoOnMap(content.pack)) this.host.trigger("taken", {});
    else this.host.trigger("take", { id: content.id, pack: content.pack, point: -1 });
    this.set({ taken: -1 });
    this.mark();
    setText(this.dom.status, "The merge that was chosen before is chosen again.");
  }

  /**
   * Order the evaluations of a search; a second press turns the order, numbers start with the largest.
   *
   * @param {string} column
   */
  sortBy(column) {
    const { key: sorted, down } = this.state.sort;
    this.set({ sort: { key: column, down: sorted === column ? !down : column !== "evaluation" && column !== "state" } });
    this.paint();
    const heads = [...this.element.querySelectorAll("[data-sort]")];
    const head = heads.find((each) => each.getAttribute("data-sort") === column);
    if (head instanceof HTMLElement) head.focus();
  }

  /** List the items that the merge in view changes; the server knows them. */
  async listItems() {
    const { content, point } = this.state;
    if (!content || !this.host.server?.result_items) return;
    setText(this.dom.status, "Reading the items …");
    const { flips, flipped, reason } = await this.host.server.result_items(content.id, content.pack, point);
    if (this.state.content?.id !== content.id) return;
    this.set({ content: { ...content, flips, flipped }, listed: point, filter: "" });
    this.paint();
    setText(this.dom.status, reason || `${flipped} items differ between ${content.points[0].label} and ${content.points[point].label}.`);
  }

  /**
   * Open an item in the chat, with both answers.
   *
   * @param {string} flip
   */
  openItem(flip) {
    const { content, listed } = this.state;
    if (content) this.host.trigger("opened", { id: content.id, pack: content.pack, flip, point: listed });
  }

  /** @param {Content} content */
  #buildTables(content) {
    if (content.kind === "search") return this.dom.twins.replaceChildren(); // its table is in view
    const numbers = content.kind === "knockout" ? cutRows(content) : resultRows(content);
    const columns = Object.keys(numbers[0] ?? {}).map((name) => /** @type {[string, (value: any) => string]} */ ([name, plain]));
    const skills = skillRows(content);
    this.dom.twins.replaceChildren(
      ...(numbers.length ? [dataTable({ title: "Table of all numbers", stem: `ipmerge-${content.kind}`, rows: () => numbers, columns })] : []),
      ...(skills.length ? [dataTable({ title: "Table of skills", stem: `ipmerge-${content.kind}-skills`, rows: () => skills,
        columns: Object.keys(skills[0]).map((name) => [name, String]) })] : []));
  }
}

/** @param {unknown} value */
function plain(value) {
  return typeof value === "number" && !Number.isInteger(value) ? String(Number(value.toPrecision(4))) : String(value);
}

/**
 * The point to show at first: the best of the first task, else the plan itself or the last.
 *
 * @param {Content} content
 */
function firstPoint(content) {
  const [task] = orderedTasks(content.tasks);
  const own = content.points.findIndex(({ label }) => label === "full"); // of an ablation
  return task ? bestPoints(content, task.name)[0] ?? (own >= 0 ? own : content.points.length - 1) : -1;
}

/**
 * The models of a comparison or an ablation: a row for each, with score, interval, difference and test.
 *
 * @param {Content} content
 */
function scoreTable(content) {
  const tasks = orderedTasks(content.tasks), best = new Map(tasks.map(({ name }) => [name, bestPoints(content, name)]));
  const heads = ["Model", "Matrices", "Change", ...tasks.map(({ label }) => label)];
  const rows = content.points.map((point, i) => node("tr", {},
    node("th", { scope: "row" }, node("button", { type: "button", class: "lm-quiet ev-row", "data-point": i }, point.label)),
    cell("Matrices", point.plan ? String(point.matrices) : "–"), cell("Change", point.change === null ? "–" : percent(point.change)),
    ...tasks.map(({ name, label }) => scoreCell(label, point.scores[name], Boolean(best.get(name)?.includes(i)), i > 0))));
  return node("div", { class: "ev-scroll", tabindex: 0, role: "region", "aria-label": "Scores" },
    node("table", { class: "ev-scores ev-models" }, node("thead", {}, node("tr", {}, ...heads.map((head) => node("th", { scope: "col" }, head)))),
      node("tbody", {}, ...rows)));
}

/**
 * A cell that names its column, since narrow pages show each row as a block.
 *
 * @param {string} label
 * @param {...(Node | string | null)} parts
 */
function cell(label, ...parts) {
  return node("td", { "data-label": label }, ...parts);
}

/**
 * @param {string} label
 * @param {Score | undefined} score
 * @param {boolean} isBest
 * @param {boolean} isCompared Whether the row is compared with the first one.
 */
function scoreCell(label, score, isBest, isCompared) {
  if (!score?.n) return cell(label, "–");
  const gain = isCompared ? gainWords(score) : "", length = score.length === null ? "" : `, ${score.length.toFixed(1)} tokens`;
  const made = cell(label, node(isBest ? "b" : "span", {}, `${(100 * share(score)).toFixed(1)} %`), isBest ? node("span", { class: "ev-best" }, "best") : null,
    node("small", {}, `${scoreWords(score).replace(/^[^(]*/, "")}${length}`));
  if (gain && score.p !== null) made.append(node("small", {}, `${gain} points: fixed ${score.fixed}, broken ${score.broken}, p ${pWords(score.p)}${isSignificant(score) ? "" : ", not significant"}`));
  return made;
}

/** @param {Evaluation} results */
function listen(results) {
  const { element } = results;
  element.addEventListener("click", (event) => {
    const button = closest(event, "button, [data-point]");
    if (!button || tableAction(button)) return;
    press(results, button);
  });
  for (const kind of ["pointerover", "focusin"]) {
    element.addEventListener(kind, (event) => {
      const column = event.target instanceof Element ? event.target.closest(".ev-column, .ev-cell") : null;
      if (column) results.show(Number(column.getAttribute("data-point")));
    });
  }
  element.addEventListener("keydown", (event) => {
    const column = event.target instanceof Element ? event.target.closest("[data-point]") : null;
    const hasButtons = results.state.content?.kind === "search"; // which need no other keys
    if (column && !hasButtons && key(results, event, Number(column.getAttribute("data-point")))) event.preventDefault();
  });
}

/**
 * @param {Evaluation} results
 * @param {HTMLElement} button
 */
function press(results, button) {
  const { point, act, task, filter, flip, sort } = button.dataset, { content } = results.state;
  if (!content) return;
  if (point !== undefined) {
    results.show(Number(point));
    if (content.kind === "sweep" || content.kind === "search") results.take();
  } else if (sort) results.sortBy(sort);
  else if (task) results.set({ task });
  else if (filter !== undefined) results.set({ filter });
  else if (flip !== undefined) results.openItem(content.flips[Number(flip)].item);
  else save(results, content, act);
  if (task || filter !== undefined) results.paint();
}

/**
 * @param {Evaluation} results
 * @param {Content} content
 * @param {string | undefined} act
 */
async function save(results, content, act) {
  const stem = `ipmerge-${content.kind}`;
  if (act === "take") results.take();
  else if (act === "items") results.listItems();
  else if (act === "untake") results.untake();
  else if (act === "edit") results.openTab();
  else if (act === "csv" && content.kind !== "search") saveText(`${stem}.csv`, csvText(resultRows(content)), "text/csv");
  else if (act && act in TYPES) {
    const text = await results.host.server?.result_file?.(content.id, content.pack, act);
    if (text) saveText(`${stem}.${act}`, text, TYPES[act]);
  }
}

/**
 * Arrow keys move between points, Enter and the space bar take a plan.
 *
 * @param {Evaluation} results
 * @param {KeyboardEvent} event
 * @param {number} point
 */
function key(results, { key: name }, point) {
  const { content } = results.state;
  if (!content) return false;
  const across = content.kind === "sweep" && content.axes.length > 1 ? content.axes[1].values.length : 1;
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across, ArrowDown: across }[name];
  if (step !== undefined) {
    const next = point + step;
    if (content.points[next]?.values.length === content.axes.length || content.kind !== "sweep") {
      if (content.points[next]) results.show(next, true);
    }
    return true;
  }
  if ((name === "Enter" || name === " ") && content.kind === "sweep") {
    results.take();
    return true;
  }
  return false;
}

/** @param {Host} host */
export function mount(host) {
  const results = new Evaluation(host);
  part(host.element, "[data-act=html]").hidden = !host.server?.result_file;
  part(host.element, "[data-act=json]").hidden = !host.server?.result_file;
  listenToTables(host.element);
  listen(results);
  if (results.state.served) listenToFigures((number) => results.openPlan(number));
  results.open();
  host.watch("value", () => results.open());
  new ResizeObserver(() => {
    const width = results.dom.root.clientWidth;
    if (width && width !== results.state.width) results.layOut();
  }).observe(results.dom.root);
}
