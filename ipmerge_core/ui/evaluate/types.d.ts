// What Python sends to the results of the Evaluate tab, and their state.

import type { RawPlan, Sorting, Value } from "../web/types.d.ts";

export type Kind = "models" | "sweep" | "ablation" | "knockout" | "search";
export type Group = "math" | "perception" | "other";

export interface TaskInfo {
  name: string;
  label: string;
  group: Group;
  n: number;
}

/** A score with its 95 % interval, and its paired test against the first row; shares are in [0, 1]. */
export interface Score {
  right: number;
  n: number;
  low: number;
  high: number;
  /** Mean length of the replies in tokens, and the share that reached the token limit. */
  length: number | null;
  cut: number | null;
  fixed: number | null;
  broken: number | null;
  p: number | null;
}

export interface Point {
  label: string;
  /** The hash of the plan; empty for the unmerged model. */
  plan: string;
  /** By axis. */
  values: Value[];
  /** The plan as Explore sets it; null if it cannot be set there. */
  choice: RawPlan | null;
  /** Whether the tab can choose this merge. */
  takes: boolean;
  matrices: number;
  change: number | null;
  /** Which matrices merge: a character "1" or "0" for each layer and module, layer by layer. */
  mask: string;
  scores: Record<string, Score>;
  /** By skill of a task, as "task/skill". */
  skills: Record<string, Score>;
}

export interface Axis {
  parameter: string;
  label: string;
  values: Value[];
}

/** An item that a merge has fixed or broken. */
export interface Flip {
  item: string;
  task: string;
  skill: string;
  outcome: "fixed" | "broken";
  question: string;
  answer: string;
  first: string;
  second: string;
  /** A small image as a data URI; empty if the item has none. */
  image: string;
}

/** A knocked-out module: change of each task's score, with its paired test. */
export interface CutRow {
  model: string;
  layer: number;
  module: string;
  scores: Record<string, Score>;
}

/** An evaluation of a search; scores are in percent, null if it failed. */
export interface SearchRow {
  number: number;
  values: number[];
  state: string;
  score: number | null;
  /** The standard error of the score. */
  error: number;
  items: number;
  scores: Record<string, number>;
  /** The items on which it disagrees with a neighbouring value, in a search without labels. */
  disagreement: number | null;
  reason: string;
  best: boolean;
  front: boolean;
}

/** The score of a model on the items of a group that a search has not seen; shares are in [0, 1]. */
export interface UnseenRow {
  model: string;
  task: string;
  part: string;
  right: number;
  n: number;
  low: number;
  high: number;
}

export interface Searched {
  parameters: string[];
  /** In the order of the points. */
  rows: SearchRow[];
  unseen: UnseenRow[];
}

export interface Content {
  id: string;
  kind: Kind;
  title: string;
  pack: string;
  created: string;
  facts: [string, string][];
  notes: string[];
  axes: Axis[];
  tasks: TaskInfo[];
  points: Point[];
  layers: number[];
  modules: string[];
  flips: Flip[];
  /** The number of flips, which may be more than are listed. */
  flipped: number;
  cuts: CutRow[];
  searched?: Searched;
}

export interface State {
  content: Content | null;
  /** The order of the evaluations of a search. */
  sort: Sorting;
  /** The point in view, and the one whose plan is chosen. */
  point: number;
  taken: number;
  /** The point whose changed items are listed. */
  listed: number;
  /** The task whose numbers the heat map shows, and the filter of the list of items. */
  task: string;
  filter: string;
  width: number;
  /** Whether a server answers; the HTML report has none. */
  served: boolean;
}

/** A place on a plot: a share of its width for each value of an axis. */
export interface Scale {
  at: number[];
  ticks: { at: number; text: string }[];
}
