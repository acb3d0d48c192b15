// What Python sends to the list of runs.

export interface Run {
  id: string;
  kind: string;
  name: string;
  state: string;
  /** The state in words. */
  label: string;
  running: boolean;
  /** How much is done, from 0 to 1. */
  share: number;
  /** Counts, speed and time left. */
  words: string;
  error: string;
  facts: [name: string, text: string][];
  actions: string[];
  /** A link relative to the page; empty where there is nothing to download. */
  download: string;
  /** What deleting it deletes. */
  deletes: string;
}

/** The answer to the event number `n`; `failed` is why the action on `run` failed. */
export interface Content {
  n: number;
  run: string;
  failed: string;
  runs: Run[];
  /** How many older runs are not listed. */
  more: number;
}
