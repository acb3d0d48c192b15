// @ts-check
// Compare, the component: two plans in one grid or in two. Arithmetic and grid are the layer map's; B's
// layers correspond to A's by relative depth. Nothing asks the server.

import { node, part, parts, setText } from "../web/dom.js";
import { count, fixed, lambdaText, percent } from "../web/format.js";
import { Grid } from "../web/grid.js";
import { KEPT_EVENT } from "../web/memory.js";
import { samePlan } from "../web/plan.js";
import { niceTop } from "../web/scales.js";
import { createStore } from "../web/store.js";
import { dataTable, listenToTables, refreshTables } from "../web/tables.js";
import { thresholdText } from "../web/thresholds.js";
import { listen } from "./events.js";
import { paintPairs } from "./overlay.js";
import { cellPairs, COLUMNS, differs, layerPairs, plainRow, tally, targetWords } from "./pairs.js";
import { LETTERS, SideBySide } from "./side_by_side.js";
import { makeSides, withKept } from "./sides.js";

/** @import { Host } from "../web/types.d.ts" */
/** @import { Compared, Letter, Side, State } from "./types.d.ts" */

export class Compare {
  /** @param {Host} host */
  constructor(host) {
    const { element } = host;
    this.host = host;
    this.element = element;
    this.dom = { root: part(element, ".lm"), sum: part(element, ".sum"), read: part(element, ".lm-read"), twins: part(element, ".lm-twins") };
    this.dom.sum.id = `${element.id || "compare"}-sum`;
    /** @type {State} */
    const first = { sides: null, pairs: [], mode: "mask", target: null, otherTarget: null, narrow: false, width: 0 };
    this.store = createStore(first);
    this.grid = new Grid(part(element, ".cm-one .lm-grid-holder"), this.dom.sum.id, "Decoder matrices by layer and module");
    this.both = new SideBySide(element, this.dom.sum.id);
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
    /** @type {Compared | null} */
    const content = typeof value === "string" && value ? JSON.parse(value) : value;
    this.dom.root.hidden = !content?.a;
    if (!content?.a) return;
    this.set({ sides: makeSides(content, this.state.sides), target: null, otherTarget: null, width: 0 });
    for (const letter of LETTERS) {
      const { pack } = content[letter] || content.a;
      for (const place of parts(this.element, `[data-name=${letter}]`)) setText(place, pack.name);
      this.#listPresets(letter);
    }
    this.#buildTables();
    this.layOut(); // drawn when the tab is in sight
  }

  /** Everything that depends on the width. */
  layOut() {
    const width = this.dom.root.clientWidth, { sides, mode } = this.state;
    if (!sides || !width) return;
    const narrow = width < 620, isTwice = mode === "side";
    this.set({ width, narrow });
    this.dom.root.dataset.narrow = String(narrow);
    part(this.element, ".cm-one").hidden = isTwice;
    part(this.element, ".cm-two").hidden = !isTwice;
    if (isTwice) this.both.build(sides, narrow);
    else this.grid.build(sides.a.index, narrow);
    this.paint();
  }

  paint() {
    const { sides } = this.state;
    if (!sides) return;
    this.set({ pairs: cellPairs(sides) });
    for (const letter of LETTERS) this.#paintSide(letter, sides[letter]);
    this.#paintWords();
    const top = niceTop(Math.max(...layerPairs(sides).flatMap((pair) => [pair["change A"], pair["change B"]])));
    if (this.state.mode === "side") this.both.paint(sides, this.state, top);
    else paintPairs(this, sides, top);
    refreshTables(this.element);
    this.describe();
  }

  /** Describe the selection. */
  describe() {
    const { target, otherTarget, sides, pairs } = this.state;
    setText(this.dom.read, sides && target
      ? targetWords(sides, pairs, target, otherTarget?.kind === "cell" ? otherTarget.cell : undefined)
      : "Select a matrix, a layer or a module to show its values.");
  }

  /** The visitor has kept or forgotten a plan. */
  listKept() {
    const { sides } = this.state;
    if (!sides) return;
    this.set({ sides: { a: withKept(sides.a), b: withKept(sides.b) } });
    for (const letter of LETTERS) this.#listPresets(letter);
  }

  /** @param {Letter} letter */
  #listPresets(letter) {
    const { sides } = this.state;
    if (!sides) return;
    const options = sides[letter].presets.map(({ label }, i) => node("option", { value: i }, label));
    part(this.element, `[data-preset=${letter}]`).replaceChildren(...options, node("option", { value: "edited" }, "Edited"));
    this.#paintSide(letter, sides[letter]);
  }

  /**
   * @param {Letter} letter
   * @param {Side} side
   */
  #paintSide(letter, { presets, plan }) {
    const exact = presets.findIndex((preset) => samePlan(preset.plan, plan));
    const pick = part(this.element, `[data-preset=${letter}]`, HTMLSelectElement);
    pick.value = exact >= 0 ? String(exact) : "edited";
    part(pick, "[value=edited]").hidden = exact >= 0;
    for (const [key, text] of [["s", thresholdText(plan.s)], ["lambda", lambdaText(plan.lambda)]]) {
      const field = part(this.element, `[data-${key}=${letter}]`, HTMLInputElement);
      if (field !== document.activeElement) field.value = text;
    }
  }

  #paintWords() {
    const { sides, pairs } = this.state;
    if (!sides) return;
    const { a, b } = sides, { both, "only A": onlyA, "only B": onlyB } = tally(pairs), union = both + onlyA + onlyB;
    setText(this.dom.sum, `Jaccard ${union ? fixed(both / union, 2) : "– (neither merges anything)"} · ${both} in both · ` +
      `B adds +${onlyB} and drops −${onlyA} · change A ${percent(a.result.relative_change)}, B ${percent(b.result.relative_change)} of ‖W‖ · ` +
      `parameters A ${count(a.result.parameters_touched)}, B ${count(b.result.parameters_touched)}`);
    const [ofA, ofB] = [a, b].map((side) => side.index.layers.length);
    setText(part(this.element, ".lm-source"), ofA === ofB ? ""
      : `A has ${ofA} layers and B has ${ofB}. Layers are compared at the same relative depth.`);
    part(this.element, "[data-act=first]", HTMLButtonElement).disabled = !pairs.some(differs);
  }

  #buildTables() {
    const rows = () => this.state.pairs.map(plainRow);
    this.dom.twins.replaceChildren(
      dataTable({ title: "Table of differences", stem: "ipmerge-differences", columns: COLUMNS,
        rows: () => this.state.pairs.filter(differs).map(plainRow) }),
      dataTable({ title: "Table of all matrices", stem: "ipmerge-comparison", columns: COLUMNS, rows }),
      dataTable({ title: "Table of layers", stem: "ipmerge-comparison-layers",
        rows: () => (this.state.sides ? layerPairs(this.state.sides).map((pair) => ({ ...pair })) : []),
        columns: [["layer", String], ["layer of B", String], ["change A", percent], ["change B", percent]] }));
  }
}

/** @param {Host} host */
export function mount(host) {
  const compare = new Compare(host);
  listenToTables(host.element);
  listen(compare);
  window.addEventListener(KEPT_EVENT, () => compare.listKept());
  compare.open();
  host.watch("value", () => compare.open());
  new ResizeObserver(() => {
    if (compare.dom.root.clientWidth !== compare.state.width) compare.layOut();
  }).observe(compare.dom.root);
}
