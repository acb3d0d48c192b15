// @ts-check
// A heat map: one pixel per value, scaled up by the browser, with a position that the pointer and the
// arrow keys move, and a line of text that says what is there.

import { node, setText } from "../../web/dom.js";
import { cividis } from "../../web/scales.js";

/** @import { HeatSpec } from "../../web/types.d.ts" */

/** @type {Record<string, [number, number]>} Rows and columns. */
const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
const EMPTY = [128, 128, 128, 60];

/**
 * @param {HeatSpec} spec
 * @returns {HTMLElement}
 */
export function heatmap(spec) {
  const { rows, columns, label, height, xTicks, yNames, low, high } = spec;
  const canvas = node("canvas", { width: columns, height: rows, class: "lm-heat-pixels" });
  const mark = node("i", { class: "lm-heat-mark", hidden: "" });
  const box = node("div", { class: "lm-heat-box", tabindex: "0", role: "application", "aria-roledescription": "heat map", "aria-label": `${label} Arrow keys read single values.` }, canvas, mark);
  box.style.height = `${height}px`;
  const read = node("p", { class: "lm-heat-read", role: "status" }, " ");
  paint(canvas, spec);
  listen(box, mark, read, spec);
  return node("div", { class: "lm-heat" },
    node("div", { class: "lm-heat-rows", "aria-hidden": "true" }, ...yNames.map((name) => node("span", {}, name))), box,
    node("div", { class: "lm-heat-columns", "aria-hidden": "true" }, ...xTicks.map(({ at, text }) => {
      const tick = node("span", {}, text);
      tick.style.left = `${100 * at}%`;
      return tick;
    })),
    node("p", { class: "lm-ramp lm-heat-key" }, node("span", {}, low), node("i"), node("span", {}, high)), read);
}

/**
 * @param {HTMLCanvasElement} canvas
 * @param {HeatSpec} spec
 */
function paint(canvas, { rows, columns, share }) {
  const context = canvas.getContext("2d");
  if (!context) return;
  const image = context.createImageData(columns, rows);
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const t = share(row, column);
      image.data.set(t === null ? EMPTY : [...cividis(t), 255], 4 * (row * columns + column));
    }
  }
  context.putImageData(image, 0, 0);
}

/**
 * @param {HTMLElement} box
 * @param {HTMLElement} mark
 * @param {HTMLElement} read
 * @param {HeatSpec} spec
 */
function listen(box, mark, read, { rows, columns, words }) {
  let row = 0, column = 0;
  const show = () => {
    mark.hidden = false;
    Object.assign(mark.style, { left: `${(100 * column) / columns}%`, top: `${(100 * row) / rows}%`,
      width: `${100 / columns}%`, height: `${100 / rows}%` });
    setText(read, words(row, column));
  };
  box.addEventListener("pointermove", ({ clientX, clientY }) => {
    const { left, top, width, height } = box.getBoundingClientRect();
    row = within(Math.floor(((clientY - top) / height) * rows), rows);
    column = within(Math.floor(((clientX - left) / width) * columns), columns);
    show();
  });
  box.addEventListener("focus", show);
  box.addEventListener("keydown", (event) => {
    const move = ARROWS[event.key];
    if (!move) return;
    row = within(row + move[0], rows);
    column = within(column + move[1], columns);
    event.preventDefault();
    event.stopPropagation();
    show();
  });
}

/**
 * @param {number} place
 * @param {number} size
 */
function within(place, size) {
  return Math.max(0, Math.min(size - 1, place));
}
