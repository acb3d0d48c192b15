// Layer map, the tables under the map: all matrices, the change per layer, and the curves over lambda.

function tableRows(map) {
  const result = map.result;
  return map.index.cells.flatMap((cell) => cell.experts.map((record, expert) => {
    const update = record.updates[map.plan.variant];
    return {
      layer: cell.layer, module: cell.module, expert, similarity: record.similarity[map.plan.similarity],
      merges: result.masks[cell.position].includes(expert), override: map.plan.overrides[cell.name] || "",
      change: cellChange(cell, [expert], map.plan), parameters: cell.numel,
      first: record.similarity.first, max: record.similarity.max, weighted: record.similarity.weighted,
      rho: record.rho, gap: record.gap, weight_norm2: record.weight_norm2, mllm_norm2: record.mllm_norm2,
      math_norm2: record.math_norm2, inner: record.inner, update_norm2: update.norm2, update_inner: update.inner,
      name: cell.name,
    };
  }));
}

const MATRIX_COLUMNS = [["layer", String], ["module", String], ["expert", String], ["similarity", (v) => fixed(v)],
  ["merges", (v) => (v ? "merges" : "kept")], ["override", (v) => (v ? `always ${v}` : "")], ["change", percent], ["parameters", count]];

function layerRows(map) {
  return map.index.layers.map((layer) => {
    const cells = map.index.cells.filter((cell) => cell.layer === layer);
    return { layer, matrices: cells.length, merging: cells.filter((cell) => map.result.masks[cell.position].length).length,
      change: map.result.layer_change[layer] };
  });
}

function lambdaRows(map) {
  return LAMBDA_TICKS.map(([lambda]) => ({ lambda, ...angles(map.result.sums, lambda), change: lambda * root(map.result.sums.xx, map.index.weight2) }));
}

function buildTwins(map) {
  const stem = fileStem(map);
  const matrices = MATRIX_COLUMNS.filter(([key]) => key !== "expert" || map.index.nExperts > 1);
  map.dom.twins.replaceChildren(
    twin({ title: "Table of all matrices", stem, rows: () => tableRows(map), columns: matrices }),
    twin({ title: "Table of layers", stem: `${stem}-layers`, rows: () => layerRows(map),
      columns: [["layer", String], ["matrices", String], ["merging", String], ["change", percent]] }),
    twin({ title: "Table over λ", stem: `${stem}-lambda`, rows: () => lambdaRows(map),
      columns: [["lambda", lambdaText], ["keep", (v) => fixed(v)], ["absorb", (v) => fixed(v)], ["change", percent]] }));
}
