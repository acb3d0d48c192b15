// The state of the comparison.

import type { Content, Cell, Index, Plan, Preset, Preview, Target } from "../web/types.d.ts";

export type Letter = "a" | "b";

/** What Python sends; `b` is null where one pair is compared with itself. */
export interface Compared {
  a: Content;
  b: Content | null;
}

/** One plan with its pack. */
export interface Side {
  readonly id: string;
  readonly index: Index;
  /** What Python offers, and all that can be chosen: also the plans that the visitor has kept. */
  readonly given: (Preset & { plan: Plan })[];
  readonly presets: (Preset & { plan: Plan })[];
  readonly plan: Plan;
  readonly result: Preview;
}

export type Sides = Readonly<Record<Letter, Side>>;
export type MergesIn = "both" | "only A" | "only B" | "neither";

/** A matrix of A and the one of B at the same place. */
export interface CellPair {
  cell: Cell;
  other: Cell;
  layer: number;
  module: string;
  "merges in": MergesIn;
  "experts A"?: string;
  "experts B"?: string;
  "similarity A": number;
  "similarity B": number;
  "B − A": number;
  "change A": number;
  "change B": number;
}

export interface LayerPair {
  layer: number;
  "layer of B"?: number;
  "change A": number;
  "change B": number;
}

/** What the cells show. */
export type Mode = "mask" | "similarity" | "change" | "side";

export interface State {
  /** Null until two plans have come. */
  sides: Sides | null;
  pairs: CellPair[];
  mode: Mode;
  /** What is chosen in A, and in B at the same relative depth. */
  target: Target | null;
  otherTarget: Target | null;
  narrow: boolean;
  width: number;
}
