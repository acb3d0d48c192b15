// Layer map, moves between plans: undo and redo, also across a change of the pair; the next flip;
// merging or keeping by hand; keeping a plan for later.

// A step of the history: a plan and the pair it belongs to.
const place = () => ({ pack: map.packId, plan: map.committed });

function travel(from, to, done, nothing) {
  if (map.journey) return;
  if (!from.length) { setText(map.dom.status, nothing); return; }
  const step = from.pop();
  to.push(place());
  if (step.pack === map.packId) { map.plan = step.plan; settle(done); return; }
  map.journey = { ...step, words: done };  // the plan waits until its pair has come
  trigger("packselect", { pack: step.pack });
}

const undo = () => travel(map.past, map.future, "Undone.", "Nothing to undo.");
const redo = () => travel(map.future, map.past, "Redone.", "Nothing to redo.");

function flip(direction) {
  const { s } = map.plan;
  const ahead = direction > 0
    ? map.flips.filter((entry) => entry.value >= s && entry.value < 1).pop()   // raising S_alpha: who leaves next
    : map.flips.find((entry) => entry.value < s);                              // lowering it: who joins next
  if (!ahead) { setText(map.dom.status, direction > 0 ? "No matrix leaves above." : "No matrix joins below."); return; }
  const at = direction > 0 ? Math.min(1, Math.floor(ahead.value * 1e4) / 1e4 + 1e-4) : Math.floor(ahead.value * 1e4) / 1e4;
  setPlan({ s: at });
  const whose = map.index.nExperts > 1 ? ` of ${expertName(map, ahead.expert)}` : "";
  commit(`${title(ahead.cell)}${whose} ${direction > 0 ? "leaves" : "joins"}.`);
}

function setOverride(cells, value) {
  const overrides = { ...map.plan.overrides };
  for (const cell of cells) {
    if (value) overrides[cell.name] = value;
    else delete overrides[cell.name];
  }
  setPlan({ overrides });
  commit();
}

// --- presets and kept plans ---

function presetPlan(preset) {
  return cleanPlan(preset.kept ? preset.plan : { ...preset.plan, overrides: {} }, map.index);
}

function takePreset(preset) {
  if (!preset) return;
  map.plan = presetPlan(preset);
  commit(preset.label + ".");
}

function reset() {
  takePreset(map.presets[0] || { label: "Reset", plan: {} });
}

const keptHere = () => map.kept.findIndex((entry) => samePlan(entry.plan, map.plan));

// Keep the plan on show, or forget it where it is kept already.
function keepPlan() {
  const at = keptHere(), plans = map.kept.map(({ plan }) => plan);
  if (at >= 0) plans.splice(at, 1);
  else plans.push({ ...map.plan, overrides: { ...map.plan.overrides } });
  keepPlans(map.packId, plans.slice(-MOST_KEPT));
  buildPresets();
  paintPreset();
  tell(at >= 0 ? "Forgotten." : `Kept as number ${map.kept.length}: choose it under Preset, with the key ${map.kept.length}, or in Compare.`);
}

// The number keys: kept plans; on a stage the presets, where none is kept.
function numberKey(digit) {
  const saved = map.kept.length || !map.onStage ? map.kept : map.presets;
  if (!saved[digit - 1]) return false;
  takePreset(saved[digit - 1]);
  return true;
}
