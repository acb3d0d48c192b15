// Layer map, the arithmetic: pack + plan -> what a merge would change. Pure, no DOM.
// Exact, because the update is affine in lambda: with U = lambda * sum of the selected P_k,
//   ||U||^2 = lambda^2 (sum ||P_k||^2 + 2 sum_{j<k} <P_j, P_k>),   <dV, U> = lambda * sum <dV, P_k>.
// ipmerge_core/plan.py does the same sums in Python; a test holds the two together.

const MEASURES = ["first", "max", "weighted"];
const VARIANTS = ["sum", "max", "rescale_only", "select_only"];
const MODULE_ORDER = ["q", "k", "v", "o", "gate", "up", "down"];
const LAMBDA_MAX = 32;
const DEFAULT_PLAN = { s: 0.4, lambda: 1, similarity: "first", variant: "sum", overrides: {} };

// One cell per matrix, with one record per expert, and the sums that no plan changes. A pack that is
// still growing says which matrices will come; those that have not come are no cells yet.
function indexPack(pack) {
  const places = pack.growing?.places || pack.records, found = new Set(places.map((place) => place.module));
  const layers = [...new Set(places.map((place) => place.layer))].sort((a, b) => a - b);
  const index = {
    pack, layers, modules: [...MODULE_ORDER.filter((m) => found.delete(m)), ...found],
    cells: [], byName: new Map(), at: new Map(), layerWeight2: new Map(layers.map((layer) => [layer, 0])),
    weight2: 0, mllm2: 0, numel: 0, nExperts: 0,
  };
  addRecords(index, pack.records);
  return index;
}

// Returns the cells that are new. All records of a matrix come together.
function addRecords(index, records) {
  const { cells, byName, layerWeight2 } = index, before = cells.length;
  for (const record of records) {
    if (!byName.has(record.name)) {
      const cell = {
        name: record.name, layer: record.layer, module: record.module, shape: record.shape,
        numel: record.shape[0] * record.shape[1], experts: [], position: cells.length,
      };
      cells.push(cell);
      byName.set(cell.name, cell);
      index.at.set(cell.layer + "." + cell.module, cell);
    }
    byName.get(record.name).experts[record.expert] = record;
  }
  const added = cells.slice(before);
  for (const cell of added) {
    const record = cell.experts.find(Boolean);
    index.weight2 += record.weight_norm2;
    index.mllm2 += record.mllm_norm2;
    index.numel += cell.numel;
    index.nExperts = Math.max(index.nExperts, cell.experts.length);
    layerWeight2.set(cell.layer, layerWeight2.get(cell.layer) + record.weight_norm2);
  }
  return added;
}

// The rule: an expert merges into a matrix iff its similarity reaches S_alpha, unless overridden.
function selects(cell, expert, plan) {
  const override = plan.overrides[cell.name];
  if (override) return override === "merge";
  return cell.experts[expert].similarity[plan.similarity] >= plan.s;
}

function selectedExperts(cell, plan) {
  const chosen = [];
  for (let k = 0; k < cell.experts.length; k++) if (selects(cell, k, plan)) chosen.push(k);
  return chosen;
}

// <dV, X> and ||X||^2 of one matrix for X = sum of the chosen experts' P_k.
function direction(cell, experts, variant) {
  let inner = 0, norm2 = 0;
  for (const k of experts) {
    const update = cell.experts[k].updates[variant];
    inner += update.inner;
    norm2 += update.norm2;
    for (const j of experts) if (j < k) norm2 += 2 * update.cross[j];
  }
  return { inner, norm2 };
}

function cosine(product, a2, b2) {
  if (!(a2 > 0) || !(b2 > 0)) return null;
  return Math.max(-1, Math.min(1, product / Math.sqrt(a2 * b2)));
}

// Cosines of the merged task vector to the MLLM's own (keep) and to the math update (absorb).
function angles(sums, lambda) {
  const merged2 = sums.vv + 2 * lambda * sums.vx + lambda * lambda * sums.xx;
  return {
    keep: cosine(sums.vv + lambda * sums.vx, sums.vv, merged2),
    absorb: cosine(sums.vx + lambda * sums.xx, sums.xx, merged2),
  };
}

// Everything the page shows for a plan; the same names as Preview in ipmerge_core/plan.py.
function previewOf(index, plan) {
  const layerXX = new Map(index.layers.map((layer) => [layer, 0]));
  const sums = { vv: index.mllm2, vx: 0, xx: 0 };
  const selected = [], masks = new Array(index.cells.length);
  let touched = 0;
  index.cells.forEach((cell, position) => {
    const experts = selectedExperts(cell, plan);
    masks[position] = experts;
    if (!experts.length) return;
    const { inner, norm2 } = direction(cell, experts, plan.variant);
    selected.push(cell.name);
    touched += cell.numel;
    sums.vx += inner;
    sums.xx += norm2;
    layerXX.set(cell.layer, layerXX.get(cell.layer) + norm2);
  });
  const layerChange = {};
  for (const layer of index.layers) {
    layerChange[layer] = plan.lambda * root(layerXX.get(layer), index.layerWeight2.get(layer));
  }
  const totals = index.pack.totals;
  return {
    selected, masks, sums,
    n_matrices: index.cells.length,
    parameters_touched: touched,
    bytes_rewritten: touched * (totals.decoder_itemsize || totals.model_bytes / totals.model_parameters),
    relative_change: plan.lambda * root(sums.xx, index.weight2),
    layer_change: layerChange,
    ...angles(sums, plan.lambda),
  };
}

function root(norm2, of2) {
  return of2 > 0 ? Math.sqrt(Math.max(norm2, 0) / of2) : 0;
}

// Relative change of one matrix under a plan, as if its experts were the given ones.
function cellChange(cell, experts, plan) {
  const { norm2 } = direction(cell, experts, plan.variant);
  return plan.lambda * root(norm2, cell.experts[0].weight_norm2);
}

// The thresholds where a matrix joins or leaves, descending; overridden matrices never flip.
function flipValues(index, plan) {
  const values = [];
  for (const cell of index.cells) {
    if (plan.overrides[cell.name]) continue;
    for (const record of cell.experts) values.push({ cell, expert: record.expert, value: record.similarity[plan.similarity] });
  }
  return values.sort((a, b) => b.value - a.value);
}

// Whatever a URL, a file or a button holds, as a plan that is safe to draw; `problems` tells why not.
function cleanPlan(raw, index, problems = []) {
  const plan = { ...DEFAULT_PLAN, overrides: {} };
  const number = (key, low, high) => {
    if (raw[key] === undefined || raw[key] === null || raw[key] === "") return;
    const value = Number(raw[key]);
    if (Number.isFinite(value) && value >= low && value <= high) plan[key] = value;
    else problems.push(`${key} must be a number from ${low} to ${high}`);
  };
  const choice = (key, options) => {
    if (raw[key] === undefined) return;
    if (options.includes(raw[key])) plan[key] = raw[key];
    else problems.push(`${key} must be one of ${options.join(", ")}`);
  };
  number("s", 0, 1);
  number("lambda", 0, LAMBDA_MAX);
  choice("similarity", MEASURES);
  choice("variant", VARIANTS);
  for (const [name, value] of Object.entries(raw.overrides || {})) {
    const known = index.byName.has(name) && (value === "merge" || value === "keep");
    if (known) plan.overrides[name] = value;
    else problems.push("an override names no matrix of this pair");
  }
  return plan;
}

function samePlan(a, b) {
  const order = (plan) => JSON.stringify([
    plan.s, plan.lambda, plan.similarity, plan.variant, Object.entries(plan.overrides).sort(),
  ]);
  return order(a) === order(b);
}

window.ipmergePreview = (pack, plan) => {
  const index = indexPack(pack);
  const { masks, sums, ...result } = previewOf(index, cleanPlan(plan, index));
  return result;
};
