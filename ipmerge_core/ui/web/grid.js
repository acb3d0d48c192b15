// @ts-check
// The picture: a grid of modules by layers with one button per matrix.
// Colour shows the similarity, or another quantity; frame and full colour against hatch and dimmed show what merges.
// Wide pages lay layers out as columns, in bands when there are many; narrow pages turn the grid.

import { node, parts, setText, shape } from "./dom.js";
import { cellAt, countMerging, emptyIndex } from "./preview.js";
import { medianValue, QUANTITIES, similarityWords } from "./quantities.js";
import { readableOn, rgb } from "./scales.js";
import { isChosen } from "./targets.js";
import { shortModule, title } from "./words.js";

/** @import { Cell, Index, LayerTarget, ModuleTarget, Override } from "./types.d.ts" */
/** @import { Preview, Quantity, QuantityView, Target, View } from "./types.d.ts" */
/** @typedef {(HTMLButtonElement | null)[]} Line */
/** @typedef {{ box: HTMLElement, line: Line, at: number }} Hole A place whose matrix has not come yet. */
/** @typedef {{ layers: number[], all: SVGPathElement, marked: SVGPathElement }} Bars */

export const BAND = 44;
/** @type {Record<string, [number, number]>} */
const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

/** @type {WeakMap<EventTarget, Target>} */
const targets = new WeakMap();

/**
 * The target of a button of a grid.
 *
 * @param {EventTarget | null} button
 */
export function targetOf(button) {
  return (button && targets.get(button)) || null;
}

export class Grid {
  /** @type {Index} */
  #index = emptyIndex();
  #narrow = false;
  #quantity = QUANTITIES[0];
  /** @type {Line[]} */
  #lines = [];
  /** @type {Map<string, Hole>} */
  #holes = new Map();
  /** @type {Bars[]} */
  #bars = [];
  /** @type {[number, number]} Row and column of the one tab stop. */
  #stop = [1, 1];
  /** @type {HTMLButtonElement[]} One for each cell, by its position. */
  buttons = [];
  columns = 0;

  /**
   * @param {HTMLElement} holder
   * @param {string} describedBy The id of the element that sums the map up.
   * @param {string} label
   */
  constructor(holder, describedBy, label) {
    this.holder = holder;
    this.describedBy = describedBy;
    this.label = label;
  }

  /**
   * Draw the grid again.
   *
   * @param {Index} index
   * @param {boolean} narrow
   */
  build(index, narrow) {
    this.#index = index;
    this.#narrow = narrow;
    this.#lines = [];
    this.#holes = new Map();
    this.#bars = [];
    this.buttons = new Array(index.cells.length);
    const table = node("table", { role: "grid", class: "lm-grid", "aria-describedby": this.describedBy, "aria-label": this.label });
    this.holder.replaceChildren(table);
    if (narrow) this.#buildTurned(table);
    else this.#buildBands(table);
    this.holder.dataset.turned = String(narrow);
    this.holder.dataset.heads = index.modules.some((module) => shortModule(module).length > 6) ? "wide" : "usual";
    this.holder.dataset.values = String(!narrow && (this.holder.clientWidth - 50) / this.columns > 42);
    this.#stop = [1, 1];
    this.moveTo(1, 1, false);
  }

  /** @param {HTMLElement} table */
  #buildBands(table) {
    const { layers, modules } = this.#index;
    const nBands = Math.ceil(layers.length / BAND);
    this.columns = Math.ceil(layers.length / nBands);
    table.append(columnGroup(this.columns));
    for (let start = 0; start < layers.length; start += this.columns) {
      const band = layers.slice(start, start + this.columns);
      this.#addRow(table, null, band.map((layer) => this.#headBox({ kind: "layer", layer })));
      for (const module of modules) {
        const row = this.#addRow(table, { kind: "module", module }, band.map((layer) => this.#cellBox(layer, module)));
        if (module === "gate") row.classList.add("lm-gap");
      }
      table.append(this.#barsRow(band));
    }
  }

  /** @param {HTMLElement} table */
  #buildTurned(table) {
    const { layers, modules } = this.#index;
    this.columns = modules.length;
    table.append(columnGroup(this.columns, node("col", { class: "lm-bars-col" })));
    const head = this.#addRow(table, null, modules.map((module) => this.#headBox({ kind: "module", module })));
    head.append(node("td", { class: "lm-bars-name", "aria-hidden": "true" }, node("span", { class: "lm-bars-top" })));
    const svg = barsDrawing(`0 0 100 ${layers.length}`);
    layers.forEach((layer, i) => {
      const row = this.#addRow(table, { kind: "layer", layer }, modules.map((module) => this.#cellBox(layer, module)));
      if (i === 0) row.append(node("td", { rowspan: layers.length, class: "lm-bars", "aria-hidden": "true" }, svg));
    });
    this.#addBars(svg, layers);
  }

  /** @param {number[]} band */
  #barsRow(band) {
    const svg = barsDrawing(`0 0 ${this.columns} 100`);
    this.#addBars(svg, band);
    const name = node("td", { class: "lm-bars-name" }, node("span", { class: "lm-bars-top" }), node("span", {}, "change"));
    return node("tr", { class: "lm-bars-row", "aria-hidden": "true" }, name,
      node("td", { colspan: this.columns, class: "lm-bars" }, svg));
  }

  /**
   * @param {SVGElement} svg
   * @param {number[]} layers
   */
  #addBars(svg, layers) {
    const all = shape("path", { class: "lm-bar" }), marked = shape("path", { class: "lm-bar lm-bar-marked" });
    svg.append(all, marked);
    this.#bars.push({ layers, all, marked });
  }

  /**
   * One table row: a head (a button for a whole layer or module, or the empty corner) and its boxes.
   *
   * @param {HTMLElement} table
   * @param {LayerTarget | ModuleTarget | null} head
   * @param {((line: Line) => HTMLElement)[]} boxes
   */
  #addRow(table, head, boxes) {
    /** @type {Line} */
    const line = [];
    const row = node("tr", { role: "row" });
    if (head) row.append(node("th", { role: "rowheader", scope: "row" }, headButton(head, line)));
    else {
      row.append(node("td", { class: "lm-corner", role: "presentation" }));
      line.push(null);
    }
    row.append(...boxes.map((box) => box(line)));
    this.#lines.push(line);
    table.append(row);
    return row;
  }

  /**
   * @param {LayerTarget | ModuleTarget} target
   * @returns {(line: Line) => HTMLElement}
   */
  #headBox(target) {
    return (line) => node("th", { role: "columnheader", scope: "col" }, headButton(target, line));
  }

  /**
   * @param {number} layer
   * @param {string} module
   * @returns {(line: Line) => HTMLElement}
   */
  #cellBox(layer, module) {
    return (line) => {
      const cell = cellAt(this.#index, layer, module);
      if (cell) return this.#filledBox(cell, line);
      const isExpected = this.#index.expected.has(`${layer}.${module}`);
      const box = node("td", { role: "gridcell", "aria-label": isExpected ? `Layer ${layer}, ${module}, not analysed` : `Layer ${layer} has no ${module}` },
        isExpected ? node("span", { class: "lm-missing" }, "?") : null);
      if (isExpected) this.#holes.set(`${layer}.${module}`, { box, line, at: line.length });
      line.push(null);
      return box;
    };
  }

  /**
   * @param {Cell} cell
   * @param {Line} line
   */
  #filledBox(cell, line) {
    const button = node("button", { type: "button", class: "c", tabindex: "-1" }, node("span", { class: "v" }));
    targets.set(button, { kind: "cell", cell });
    for (const each of cell.members) this.buttons[each.position] = button;
    line.push(button);
    return node("td", { role: "gridcell" }, button);
  }

  /**
   * Put new cells where they belong, and leave all others, with the focus on them, alone.
   *
   * @param {Cell[]} cells
   */
  fillHoles(cells) {
    for (const cell of cells) {
      const hole = this.#holes.get(`${cell.layer}.${cell.module}`), [first] = cell.members;
      if (first !== cell) this.buttons[cell.position] = this.buttons[first.position];
      if (!hole || first !== cell) continue;
      /** @type {Line} */
      const made = [];
      hole.box.replaceWith(this.#filledBox(cell, made));
      [hole.line[hole.at]] = made;
    }
  }

  /**
   * Colours and printed values: needed when the pack, the quantity, the measure or the expert in view
   * changes.
   *
   * @param {QuantityView} view
   * @param {[number, number]} domain
   * @param {Quantity} [quantity]
   */
  colour(view, [low, high], quantity = QUANTITIES[0]) {
    this.#quantity = quantity;
    for (const cell of this.#index.at.values()) {
      const value = medianValue(view, cell, quantity), t = value === null ? null : (value - low) / (high - low);
      const button = this.buttons[cell.position];
      button.style.setProperty("--c", t === null ? "transparent" : rgb(t));
      button.style.setProperty("--t", t === null ? "inherit" : readableOn(t));
      this.print(cell, quantity.words(value).replace(/ %$/, ""));
      delete button.dataset.on;
    }
  }

  /**
   * Print a text into a cell.
   *
   * @param {Cell} cell
   * @param {string} text
   */
  print(cell, text) {
    const { firstChild } = this.buttons[cell.position];
    if (firstChild) setText(firstChild, text);
  }

  /**
   * Merge states: touches only the buttons that changed since the last frame.
   *
   * @param {QuantityView} view
   * @param {Preview} result
   */
  paint(view, result) {
    const { overrides } = view.plan;
    for (const cell of this.#index.at.values()) {
      const { dataset } = this.buttons[cell.position], { merging, total, on } = countMerging(view, result, cell);
      const rule = overrides[cell.name], pin = cell.members.every(({ name }) => overrides[name] === rule) && rule || "";
      const seen = `${merging}/${total}`;
      if (dataset.on === on && dataset.pin === pin && dataset.seen === seen) continue;
      Object.assign(dataset, { on, pin, seen });
      this.buttons[cell.position].setAttribute("aria-label", `${title(cell)}, ${similarityWords(view, cell)}, ${
        this.#otherWords(view, cell)}${total > 1 ? `${merging} of ${total} merge` : stateWords(on === "1", rule)}`);
    }
  }

  /**
   * The quantity on show, unless it is the similarity.
   *
   * @param {QuantityView} view
   * @param {Cell} cell
   */
  #otherWords(view, cell) {
    const { key, label, words } = this.#quantity;
    return key === "similarity" ? "" : `${label} ${words(medianValue(view, cell, this.#quantity))}, `;
  }

  /**
   * The mask of an earlier plan, for corner marks: while something is being dragged of the last
   * committed one, and after a commit, where it differs, of the one before.
   *
   * @param {View} view
   * @param {Pick<Preview, "masks">} result
   */
  paintGhost(view, result) {
    for (const cell of this.#index.at.values()) {
      const { dataset } = this.buttons[cell.position], was = countMerging(view, result, cell).on;
      if (dataset.was !== was) dataset.was = was;
    }
  }

  /**
   * One bar a layer, those of the chosen layers marked.
   *
   * @param {(layer: number) => number} share Of the axis, from 0 to 1.
   * @param {(layer: number) => boolean} isMarked
   */
  paintBars(share, isMarked) {
    const thickness = this.#narrow ? 0.6 : 0.72, gap = (1 - thickness) / 2;
    for (const { layers, all, marked } of this.#bars) {
      let rest = "", focus = "";
      layers.forEach((layer, i) => {
        const bar = this.#bar(i + gap, thickness, share(layer));
        if (isMarked(layer)) focus += bar;
        else rest += bar;
      });
      all.setAttribute("d", rest);
      marked.setAttribute("d", focus);
    }
  }

  /**
   * Two bars a layer on one axis: the left (on phones the upper) one is the first.
   *
   * @param {(layer: number) => [number, number]} shares
   */
  paintPairs(shares) {
    for (const { layers, all, marked } of this.#bars) {
      [all, marked].forEach((path, which) => path.setAttribute("d",
        layers.map((layer, i) => this.#bar(i + 0.12 + 0.4 * which, 0.36, shares(layer)[which])).join("")));
    }
  }

  /**
   * @param {number} from
   * @param {number} thickness
   * @param {number} share
   */
  #bar(from, thickness, share) {
    const size = 100 * share, at = Number(from.toFixed(4));
    if (!(size > 0)) return "";
    return this.#narrow
      ? `M0 ${at}h${size.toFixed(2)}v${thickness}H0Z`
      : `M${at} 100v${(-size).toFixed(2)}h${thickness}V100Z`;
  }

  /** @param {string} text The upper end of the bars' axis. */
  nameBarsTop(text) {
    for (const label of parts(this.holder, ".lm-bars-top")) setText(label, text);
  }

  /**
   * @param {Target | null} target
   * @param {Cell | null} [pinned]
   */
  mark(target, pinned = null) {
    for (const button of this.#lines.flat()) {
      const own = targetOf(button);
      if (!button || !own) continue;
      const chosen = isChosen(own, target);
      button.classList.toggle("chosen", chosen);
      button.classList.toggle("pinned", own.kind === "cell" && own.cell === pinned);
      if (own.kind === "cell") button.parentElement?.setAttribute("aria-selected", String(chosen));
      else button.setAttribute("aria-pressed", String(chosen));
    }
  }

  /**
   * Make a button the grid's one tab stop; arrows move it over heads and cells alike.
   *
   * @param {number} row
   * @param {number} column
   * @param {boolean} [focus]
   */
  moveTo(row, column, focus = true) {
    const button = this.#lines[row]?.[column];
    if (!button) return false;
    const [r, c] = this.#stop, before = this.#lines[r]?.[c];
    if (before) before.tabIndex = -1;
    button.tabIndex = 0;
    this.#stop = [row, column];
    if (focus) button.focus();
    return true;
  }

  /**
   * Make this button the tab stop, if it is one of the grid's.
   *
   * @param {Element} button
   */
  moveToButton(button) {
    const row = this.#lines.findIndex((line) => line.some((each) => each === button));
    if (row >= 0) this.moveTo(row, this.#lines[row].findIndex((each) => each === button));
  }

  /**
   * Arrow, Home and End keys inside the grid. Returns true when the key was used.
   *
   * @param {KeyboardEvent} event
   */
  key({ key, ctrlKey }) {
    const [row] = this.#stop;
    if (ARROWS[key]) {
      this.#step(...ARROWS[key]);
      return true;
    }
    if (key === "Home") return ctrlKey ? this.moveTo(1, 1) : this.moveTo(row, 1);
    if (key !== "End") return false;
    const last = ctrlKey ? this.#lines.length - 1 : row;
    return this.moveTo(last, this.#lines[last].length - 1);
  }

  /**
   * To the next button in a direction, over holes and the corner.
   *
   * @param {number} down
   * @param {number} right
   */
  #step(down, right) {
    const [row, column] = this.#stop;
    for (let i = row + down, j = column + right; this.#lines[i] && j >= 0 && j <= this.columns; i += down, j += right) {
      if (this.moveTo(i, Math.min(j, this.#lines[i].length - 1))) return;
    }
  }
}

/**
 * @param {number} columns
 * @param {...Node} more
 */
function columnGroup(columns, ...more) {
  return node("colgroup", {}, node("col", { class: "lm-heads" }),
    ...Array.from({ length: columns }, () => node("col")), ...more);
}

/** @param {string} viewBox */
function barsDrawing(viewBox) {
  return shape("svg", { viewBox, preserveAspectRatio: "none", "aria-hidden": "true" });
}

/**
 * @param {LayerTarget | ModuleTarget} target
 * @param {Line} line
 */
function headButton(target, line) {
  const isLayer = target.kind === "layer", text = isLayer ? String(target.layer) : shortModule(target.module);
  const button = node("button", { type: "button", class: "lm-head", tabindex: "-1", title: isLayer ? null : target.module,
    "aria-label": isLayer ? `All of layer ${text}` : `All ${target.module} matrices` }, text);
  targets.set(button, target);
  line.push(button);
  return button;
}

/**
 * @param {boolean} isOn
 * @param {Override | undefined} override
 */
function stateWords(isOn, override) {
  if (override) return override === "merge" ? "always merged" : "always kept";
  return isOn ? "merges" : "kept";
}
