// @ts-check
// The detail panel: the numbers of one matrix (or of two, when one is pinned), or of a layer, a range
// of layers or a module, and the buttons that merge or keep by hand.

import { actionButton, node } from "../../web/dom.js";
import { fixed, percent } from "../../web/format.js";
import { cellChange, expertInView, merges, shownSimilarity } from "../../web/preview.js";
import { quantile } from "../../web/scales.js";
import { cellsOf, coversLayer } from "../../web/targets.js";
import { atLeast, atMost, thresholdText } from "../../web/thresholds.js";
import { expertName, MODULE_MEANING } from "../../web/words.js";
import { LiveTexts } from "./live.js";
import { numberRows } from "./numbers.js";
import { plainText, verdictText, whyBlock } from "./why.js";

/** @import { Cell, Flip, Preview, RangeTarget, Target } from "../../web/types.d.ts" */
/** @import { LayerMap } from "./map.js" */

/** @type {[string, string, string][]} Value, label and key of the override buttons. */
const OVERRIDES = [["merge", "Merge", "F"], ["keep", "Keep", "K"], ["", "Auto", "A"]];

export class DetailPanel {
  #live = new LiveTexts();

  /** @param {LayerMap} map */
  constructor(map) {
    this.map = map;
  }

  /** Show what is chosen. */
  build() {
    const { dom, state: { target } } = this.map;
    this.#live = new LiveTexts();
    if (!target) dom.detail.replaceChildren(...this.#nothingChosen());
    else if (target.kind === "cell" && target.cell.members.length === 1) dom.detail.replaceChildren(...this.#cell(target.cell));
    else dom.detail.replaceChildren(...this.#group(target));
  }

  /** @param {Preview} result */
  paint(result) {
    this.#live.refresh(result);
  }

  /** Before a choice: how to choose, and which matrices are close to the threshold. */
  #nothingChosen() {
    const { narrow, layout } = this.map.state;
    const [across, down] = narrow ? ["modules", "layers"] : ["layers", "modules"];
    if (layout === "simple") {
      return [node("p", { class: "lm-hint" }, `Select a square to show what it is and why it is merged or kept. Each square is a weight matrix of the language model: columns are ${across}, rows are ${down}.`)];
    }
    return [
      node("p", { class: "lm-hint" }, "Select a matrix in the map (click, or Enter) to show its values, spectra and angles. Row and column headers select a module or a layer; drag across layer headers to select a range. Shift+click pins a second matrix."),
      node("h2", { class: "lm-minor" }, "At the threshold"),
      node("table", { class: "lm-numbers" }, node("tbody", {},
        this.#edge("next to be merged", (flips, first) => flips[first], (value) => `≤ ${thresholdText(atMost(value))}`),
        this.#edge("next to be kept", (flips, first) => flips[(first < 0 ? flips.length : first) - 1], (value) => `> ${thresholdText(atLeast(value))}`))),
      node("p", { class: "lm-hint" }, "Keys: [ and ] step through the similarities, F always merges the selected matrix, K always keeps it, A removes the override, 1 to 9 load a kept plan, Ctrl+Z undoes."),
    ];
  }

  /**
   * @param {string} label
   * @param {(flips: Flip[], first: number) => Flip | undefined} pick
   * @param {(value: number) => string} when The thresholds at which it happens.
   */
  #edge(label, pick, when) {
    return node("tr", {}, node("th", { scope: "row" }, label), this.#live.text("td", {}, () => {
      const { flips, plan } = this.map.state;
      const entry = pick(flips, flips.findIndex(({ value }) => value < plan.s));
      return entry ? `layer ${entry.cell.layer} · ${entry.cell.module}, Sα ${when(entry.value)}` : "–";
    }));
  }

  /** @param {Cell} cell */
  #cell(cell) {
    const { state } = this.map, live = this.#live;
    const record = cell.experts[expertInView(state, cell)];
    const stateOf = live.text("span", { class: "lm-chip" }, (result) => (merges(this.map.state, result, cell) ? "merges" : "kept"));
    live.add((result) => { stateOf.dataset.on = merges(this.map.state, result, cell) ? "1" : "0"; });
    const head = node("div", { class: "lm-detail-head" }, node("h2", {}, `Layer ${cell.layer} · ${cell.module}`), stateOf);
    const why = whyBlock(this.map, live, cell, record, this.#overrideButtons([cell]));
    if (state.layout === "simple") {
      return [head, node("p", { class: "lm-hint" }, MODULE_MEANING[cell.module] || ""),
        live.text("p", { class: "lm-verdict" }, () => plainText(this.map.state, cell)), why,
        node("p", {}, actionButton("layout", "All numbers and spectra", { "data-layout": "full" }))];
    }
    const shown = state.pinned && state.pinned !== cell ? [cell, state.pinned] : [cell];
    return [
      head,
      node("p", { class: "lm-name" }, cell.name),
      live.text("p", { class: "lm-verdict" }, () => verdictText(this.map.state, cell)),
      why,
      ...this.#experts(cell),
      this.#numbers(shown),
      node("p", { class: "lm-acts" }, actionButton("cell-csv", "Numbers as CSV"),
        shown.length > 1 ? actionButton("unpin", "Unpin") : actionButton("pin", "Pin to compare")),
    ];
  }

  /** @param {Cell[]} cells */
  #overrideButtons(cells) {
    return node("div", { class: "lm-seg", role: "group", "aria-label": "Override" }, ...OVERRIDES.map(([value, label, key]) => {
      const button = node("button", { type: "button", "data-act": "override", "data-value": value, title: `Key ${key}` }, label);
      this.#live.add(() => {
        const { overrides } = this.map.state.plan;
        button.setAttribute("aria-pressed", String(cells.every((cell) => (overrides[cell.name] || "") === value)));
      });
      return button;
    }));
  }

  /**
   * With several experts, each is selected by its own similarity.
   *
   * @param {Cell} cell
   */
  #experts(cell) {
    if (cell.experts.length < 2) return [];
    const rows = cell.experts.map((record, k) => node("tr", {}, node("th", { scope: "row" }, expertName(this.map.state.pack, k)),
      this.#live.text("td", {}, () => fixed(record.similarity[this.map.state.plan.similarity])),
      this.#live.text("td", {}, (result) => (result.masks[cell.position].includes(k) ? "merges" : "kept"))));
    return [node("table", { class: "lm-numbers" }, headRow(["similarity", "state"]), node("tbody", {}, ...rows))];
  }

  /** @param {Cell[]} cells */
  #numbers(cells) {
    const shown = cells.map((cell) => ({ cell, record: cell.experts[expertInView(this.map.state, cell)] }));
    const rows = numberRows(cells).map(({ label, hint, value }) => node("tr", { title: hint }, node("th", { scope: "row" }, label),
      ...shown.map((each) => {
        const words = value(each);
        return typeof words === "string" ? node("td", {}, words) : this.#live.text("td", {}, () => words(this.map.state.plan));
      })));
    const names = cells.map((cell, i) => `${cell.layer} · ${cell.module}${i ? " (pinned)" : ""}`);
    return node("table", { class: "lm-numbers" }, cells.length > 1 ? headRow(names) : null, node("tbody", {}, ...rows));
  }

  /** @param {Target} target */
  #group(target) {
    const { state } = this.map, cells = cellsOf(state.index, target);
    const heading = node("div", { class: "lm-detail-head" }, node("h2", {}, groupName(target)));
    if (!cells.length) return [heading, node("p", { class: "lm-hint" }, "Not analysed yet.")];
    const values = cells.map((cell) => shownSimilarity(state, cell)).sort((a, b) => a - b);
    const span = `Similarity ${fixed(values[0], 2)} to ${fixed(values[values.length - 1], 2)}, median ${fixed(quantile(values, 0.5), 2)}.`;
    const merging = this.#live.text("p", { class: "lm-verdict" }, (result) => `${this.#merging(result, cells)} merge. ${span}`);
    const rows = target.kind === "range" ? this.#layerRows(target) : cells.map((cell) => this.#cellRow(target, cell));
    return [heading, merging, this.#overrideButtons(cells), node("table", { class: "lm-numbers" },
      headRow([target.kind === "range" ? "merge" : "similarity", "change"]), node("tbody", {}, ...rows))];
  }

  /**
   * @param {Preview} result
   * @param {Cell[]} cells
   */
  #merging(result, cells) {
    return `${cells.filter((cell) => merges(this.map.state, result, cell)).length} of ${cells.length}`;
  }

  /**
   * @param {string} head
   * @param {...((result: Preview) => string)} words
   */
  #row(head, ...words) {
    return node("tr", {}, node("th", { scope: "row" }, head), ...words.map((each) => this.#live.text("td", {}, each)));
  }

  /**
   * @param {Target} target
   * @param {Cell} cell
   */
  #cellRow(target, cell) {
    const number = cell.members.length > 1 ? ` ${cell.members.indexOf(cell)}` : "";
    const names = { layer: `${cell.module}${number}`, cell: `expert${number}`, module: `layer ${cell.layer}${number && ` · expert${number}`}`, range: "" };
    return this.#row(names[target.kind],
      () => fixed(shownSimilarity(this.map.state, cell)),
      ({ masks }) => {
        const experts = masks[cell.position];
        return experts.length ? percent(cellChange(cell, experts, this.map.state.plan)) : "kept";
      });
  }

  /** @param {RangeTarget} target */
  #layerRows(target) {
    const { layers, cells } = this.map.state.index;
    return layers.filter((layer) => coversLayer(target, layer)).map((layer) => {
      const own = cells.filter((cell) => cell.layer === layer);
      return this.#row(`layer ${layer}`, (result) => this.#merging(result, own), (result) => percent(result.layer_change[layer]));
    });
  }
}

/** @param {string[]} names Of the columns after the first. */
function headRow(names) {
  return node("thead", {}, node("tr", {}, node("td"), ...names.map((name) => node("th", { scope: "col" }, name))));
}

/** @param {Target} target */
function groupName(target) {
  if (target.kind === "cell") return `Layer ${target.cell.layer} · ${target.cell.module}`;
  if (target.kind === "layer") return `Layer ${target.layer}`;
  return target.kind === "module" ? `All ${target.module} matrices` : `Layers ${target.from} to ${target.to}`;
}
