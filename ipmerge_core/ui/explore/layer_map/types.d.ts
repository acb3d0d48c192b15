// The state of the layer map; everything that is drawn follows from it.

import type {
  Cell, Flip, Index, KeptPlan, Pack, Plan, Preset, Preview, Quantity, RawPlan, Target,
} from "../../web/types.d.ts";

/** A step of the history: a plan and the pair it belongs to. */
export interface Step {
  pack: string;
  plan: Plan;
}

export interface State {
  /** Whether a pair is on show; until then `pack` and what follows from it are empty. */
  isOpen: boolean;
  pack: Pack;
  packId: string;
  /** The address of the Space's page, which a link leads to; empty elsewhere. */
  home: string;
  index: Index;
  presets: Preset[];
  kept: KeptPlan[];
  /** The entry that the plan started from. */
  preset: number | null;

  /** The plan on show; while something is dragged it runs ahead of the committed one. */
  plan: Plan;
  committed: Plan;
  past: Step[];
  future: Step[];
  /** A step to another pair, which waits until that pair has come. */
  journey: (Omit<Step, "plan"> & { plan: RawPlan; words: string }) | null;
  dragging: boolean;
  /** Whether marks show what the last commit changed. */
  after: boolean;
  /** The number field that is being typed into, which must not be overwritten. */
  typing: HTMLInputElement | null;

  target: Target | null;
  pinned: Cell | null;
  /** The expert in view, -1 for all. */
  expert: number;
  /** What the colours of the map show, and the range of its values. */
  quantity: Quantity;
  quantityDomain: [number, number];
  layout: "simple" | "full";
  onStage: boolean;
  narrow: boolean;
  width: number;
  sigmaScale: "log" | "linear";
  /** Whether the large figure has been asked for. */
  large: boolean;

  /** The preview of the plan on show, of the committed plan, and of the one that marks refer to. */
  result: Preview;
  before: Preview;
  ghost: Pick<Preview, "masks">;
  flips: Flip[];

  /** Axes, fixed while something is being dragged. */
  domain: [number, number];
  barTop: number;
  curveLow: number;

  /** Whether the link in the address has been followed, and the pair that it asked for. */
  linkRead: boolean;
  linkAsked: string | null;
}
