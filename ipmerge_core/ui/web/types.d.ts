// What the modules of the page share, as TypeScript sees it; nothing of this reaches the browser.
// A pack is described in full by ipmerge_core's records; here are the parts that the page reads.

import type { Flip } from "../evaluate/types.d.ts";

export type Measure = "first" | "max" | "weighted";
/** dM without the MLLM's leading directions, by the percent of the energy that they hold. */
export type Complement = `complement_${number}`;
/** dM truncated to its leading directions, by the percent of the energy that they hold. */
export type Truncation = `truncated_${number}`;
export type OldVariant = "sum" | "max" | "rescale_only" | "select_only";
export type Variant = OldVariant | "protect" | Complement | Truncation;
export type Override = "merge" | "keep";

// --- what Python sends ---

export interface UpdateProducts {
  norm2: number;
  inner: number;
  cross: number[];
}

export interface Ranks {
  stable?: number;
  effective?: number;
  energy?: number;
}

export type Side = "mllm" | "math" | "base";

/** All singular values of a matrix, as `analysis/singular_values.py` writes them. */
export interface StoredValues {
  count: number;
  rank: number;
  total: number;
  squares: number;
  steps: string;
}

export interface Overlap {
  rows: number;
  columns: number;
  cosines: string;
}

/** What a record holds of a spectrum; `computed` of `possible` values, by rank. */
export interface SingularValues {
  ranks: number[];
  values: number[];
  computed: number;
  possible: number;
  isComplete: boolean;
  stored: StoredValues | null;
}

/** One matrix and one expert. */
export interface LayerRecord {
  name: string;
  layer: number;
  module: string;
  expert: number;
  shape: [number, number];
  similarity: Record<Measure, number>;
  best_index: number | null;
  gap: number | null;
  principal?: Record<string, number> | null;
  rho: number;
  weight_norm2: number;
  base_norm2: number;
  mllm_norm2: number;
  math_norm2: number;
  inner: number;
  /** All packs have the first four; from version 4 of packs on also the others, but not for experts of mixtures. */
  updates: Record<OldVariant, UpdateProducts> & Partial<Record<Variant, UpdateProducts>>;
  /** How many directions each complement leaves out. */
  left_out?: number[];
  /** How many directions each truncation keeps. */
  kept_directions?: number[];
  chance?: Partial<Record<Measure, number>> | null;
  noise_floor?: number | null;
  mllm_ranks?: Ranks | null;
  math_ranks?: Ranks | null;
  mllm_directions?: number | null;
  math_directions?: number | null;
  index: number[];
  mllm_sigma: number[];
  math_sigma: number[];
  angles: number[];
  /** Measured, not part of an analysis: see `KnockoutMap`. */
  knockout?: Record<string, number>;
  /** Of packs from version 3 on. */
  spectra?: { mllm: StoredValues; math: StoredValues; base: StoredValues | null; overlap: Overlap } | null;
}

export interface Place {
  layer: number;
  module: string;
}

/** Of a pack whose analysis has not finished. */
export interface Growing {
  places: Place[];
  total: number;
  done: number;
  running: boolean;
}

export interface Source {
  id: string;
  revision?: string | null;
}

export interface Totals {
  model_parameters: number;
  llm_parameters: number;
  model_bytes: number;
  decoder_itemsize?: number;
}

export interface Pack {
  name: string;
  engine: string;
  created: string;
  parameters: { quick?: boolean; rank?: number | null; temperature?: number };
  sources: { mllm: Source; base: Source; math: Source[] };
  totals: Totals;
  records: LayerRecord[];
  growing?: Growing | null;
}

export interface Content {
  id: string;
  home?: string;
  /** The query of the permalink that a report opens with. */
  link?: string;
  /** A knock-out of the pair that is part of the app. */
  knockout?: KnockoutMap | null;
  /** The name of the plan in the comparison. */
  label?: string;
  pack: Pack;
  plan: Plan;
  presets: RawPreset[];
}

/** The answer of `server.grown`. */
export interface News {
  pack?: Partial<Pack>;
  records: LayerRecord[];
  growing?: Partial<Growing> | null;
  presets: RawPreset[];
  again?: boolean;
  gone?: string;
}

// --- plans ---

export interface Plan {
  readonly s: number;
  readonly lambda: number;
  readonly similarity: Measure;
  readonly variant: Variant;
  readonly overrides: Readonly<Record<string, Override>>;
  /** The relative change of every matrix at lambda 1; 0 for the update's own size. */
  readonly budget: number;
}

/** A plan from a link, from storage or from Python, before `cleanPlan` has looked at it. */
export type RawPlan = { [key in keyof Plan]?: unknown };

export interface RawPreset {
  label: string;
  source: string;
  plan: RawPlan;
}

/** A preset, or a plan that the visitor has kept. */
export interface Preset {
  label: string;
  source: string;
  plan: RawPlan;
  kept?: boolean;
}

export interface KeptPlan extends Preset {
  plan: Plan;
}

/** A plan that has been evaluated, with its scores. */
export interface Measured {
  plan: RawPlan;
  hash: string;
  created: string;
  scores: { label: string; group: string; share: number; low: number; high: number; n: number }[];
}

/** By model and group of items, the change of the score without a module, by layer and module. */
export type KnockoutMap = Record<string, Record<string, number>>;

/** The content of a link about a pair. */
export interface LinkContent {
  pack: string | null;
  plan?: Plan;
  target?: Target | null;
  pinned?: Cell | null;
  expert?: number;
  quantity?: QuantityKey;
  problems: string[];
}

/** The numbers that the map can show of a matrix. */
export type QuantityKey =
  | "similarity" | "change" | "cosine" | "norm_ratio" | "mllm_change" | "math_change" | "gap"
  | "knockout_before_math" | "knockout_before_perception" | "knockout_after_math" | "knockout_after_perception"
  | "inside" | "mllm_effective" | "math_effective" | "mllm_stable" | "math_stable" | "mllm_energy" | "math_energy";

export interface Quantity {
  key: QuantityKey;
  label: string;
  unit: string;
  words(value: number | null): string;
  of(record: LayerRecord, cell: Cell, plan: Plan): number | null | undefined;
}

export interface QuantityView extends View {
  readonly plan: Plan;
}

// --- what the page computes ---

/** A matrix with one record per math model. */
export interface Cell {
  /** The matrices of its layer and module, itself included: several for the experts of a mixture. */
  members: Cell[];
  /** Whether a plan may select it by similarity: projections only. */
  usual: boolean;
  name: string;
  layer: number;
  module: string;
  shape: [number, number];
  numel: number;
  experts: LayerRecord[];
  position: number;
}

export interface Index {
  pack: Pack;
  layers: number[];
  modules: string[];
  cells: Cell[];
  /** Places where a matrix is expected, as "layer.module"; others stay empty. */
  expected: Set<string>;
  byName: Map<string, Cell>;
  at: Map<string, Cell>;
  layerWeight2: Map<number, number>;
  weight2: number;
  mllm2: number;
  numel: number;
  nExperts: number;
}

export interface Sums {
  vv: number;
  vx: number;
  xx: number;
}

export interface Angles {
  keep: number | null;
  absorb: number | null;
}

export interface Preview extends Angles {
  selected: string[];
  /** The experts that merge, for every cell by its position. */
  masks: number[][];
  sums: Sums;
  n_matrices: number;
  parameters_touched: number;
  bytes_rewritten: number;
  relative_change: number;
  /** ||U|| / ||sum dM|| of the merged matrices, their median; null if nothing merges. */
  update_share: number | null;
  /** The experts' own relative change of the merged matrices. */
  expert_change: number;
  layer_change: Record<number, number>;
}

export interface Flip {
  cell: Cell;
  expert: number;
  value: number;
}

/** What decides the similarity that a cell shows. */
export interface View {
  readonly plan: Pick<Plan, "similarity">;
  readonly expert: number;
}

export interface CellTarget {
  kind: "cell";
  cell: Cell;
}
export interface LayerTarget {
  kind: "layer";
  layer: number;
  anchor?: number;
}
export interface ModuleTarget {
  kind: "module";
  module: string;
}
export interface RangeTarget {
  kind: "range";
  from: number;
  to: number;
  anchor?: number;
}
export type Target = CellTarget | LayerTarget | ModuleTarget | RangeTarget;

// --- the page ---

export interface Store<State> {
  get(): Readonly<State>;
  /** Replaces fields; refuses a field that the first state did not have. */
  set(patch: Partial<State>): void;
  /** Calls back after every change; returns the function that ends it. */
  subscribe(listener: (state: Readonly<State>, before: Readonly<State>) => void): () => void;
}

export interface Server {
  report_file?(packId: string, plan: Plan, link: string): Promise<string>;
  grown?(packId: string, known: number): Promise<News>;
  result_file?(id: string, pack: string, kind: string): Promise<string>;
  result_items?(id: string, pack: string, point: number): Promise<{ flips: Flip[]; flipped: number; reason?: string }>;
}

/** What Gradio (or the HTML report) gives to a component that is mounted. */
export interface Host {
  element: HTMLElement;
  trigger(event: string, data: object): void;
  props: { value: string | object | null };
  server: Server | null;
  watch(name: string, listener: () => void): void;
}

export type Attributes = Record<string, string | number | null | undefined>;
export type Child = Node | string | null | undefined;

export type Value = string | number | boolean | null | undefined;
export type Row = Record<string, Value>;
export type Column = [key: string, words: (value: any) => string];

export interface Sorting {
  key: string;
  down: boolean;
}

export interface TableSpec {
  title: string;
  label?: string;
  stem: string;
  rows(): Row[];
  columns: Column[];
}

export interface Table extends TableSpec {
  sort: Sorting;
  holder: HTMLElement;
}

export interface FigureSpec extends Omit<TableSpec, "title" | "label"> {
  heading: string;
  extra?: Child;
  drawing: Element;
  summary?: string;
  wide?: boolean;
}

export interface Series {
  index: number[];
  values: number[];
  style: string;
}

export interface ChartMark {
  value: number | null | undefined;
  text: string;
}

export interface ChartDot {
  at: number | null;
  value: number;
  style: string;
  text: string;
}

export interface ChartSpec {
  width: number;
  series: Series[];
  log: boolean;
  top?: number;
  marks?: ChartMark[];
  dots?: ChartDot[];
}

/** Values by row and column; `share` is a position on the colour scale, null for none. */
export interface HeatSpec {
  rows: number;
  columns: number;
  height: number;
  label: string;
  low: string;
  high: string;
  yNames: string[];
  xTicks: { at: number; text: string }[];
  share(row: number, column: number): number | null;
  words(row: number, column: number): string;
}
