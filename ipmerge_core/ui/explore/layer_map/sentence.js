// Layer map, the words about the whole plan: the sentence, what the threshold's neighbourhood holds,
// and what has joined and left. The lines keep their height while something is being dragged.

function paintSentence(result) {
  const { totals, growing } = map.pack, n = result.selected.length, all = growing ? map.index.numel : totals.llm_parameters;
  const share = result.parameters_touched / all;
  const strong = (text) => node("strong", {}, text), dot = () => node("span", { class: "lm-dot", "aria-hidden": "true" }, " · ");
  const key = [n, result.parameters_touched, percent(result.relative_change), map.plan.lambda === 0, map.pack.created].join();
  setText(map.dom.count, `${n} of ${result.n_matrices}`);
  if (key === map.sentence && n) return;
  map.sentence = key;
  const parts = n === 0 ? emptyWords() : [
    strong(`${n} of ${result.n_matrices}`), growing ? ` analysed (${growing.total} in all) merge` : " matrices merge", dot(),
    strong(count(result.parameters_touched)), ` of ${count(all)} ${growing ? "analysed" : "language-model"} parameters (`, strong(percent(share)), ")", dot(),
    "change ", strong(percent(result.relative_change)), " of ‖W‖", dot(),
    ...(map.plan.lambda === 0 ? ["λ is 0, so the merged model equals the multimodal model."]
      : n === result.n_matrices ? [`Every ${growing ? "analysed " : ""}matrix merges: no selection step is left.`]
      : [`${bytes(result.bytes_rewritten)} rewritten`, dot(), "vision tower untouched"]),
  ];
  map.dom.sum.replaceChildren(...(growing ? [node("span", { class: "lm-chip" }, growingWords(map.pack)), " "] : []), ...parts);
}

function emptyWords() {
  const best = Math.max(...map.index.cells.map((cell) => Math.max(...cell.experts.map((r) => r.similarity[map.plan.similarity]))));
  return [node("strong", {}, "Nothing merges"), best < map.plan.s
    ? ` above ${fixed(best)}, the highest similarity of this pair${map.pack.growing ? " so far" : ""}. The merged model equals the multimodal model.`
    : ": every matrix is kept by hand. The merged model equals the multimodal model."];
}

// How steep the edge is, and what of a brushed range merges.
function paintSense(result) {
  const { s, similarity, overrides } = map.plan, step = 0.01;
  let joins = 0, leaves = 0;
  for (const cell of map.index.cells) {
    if (overrides[cell.name]) continue;
    let best = 0;
    for (const record of cell.experts) best = Math.max(best, record.similarity[similarity]);
    if (best < s && best >= s - step) joins += 1;
    else if (best >= s && best < s + step) leaves += 1;
  }
  const near = `Lowering S_α by ${step} adds ${joins}, raising it by ${step} drops ${leaves}.`;
  setText(map.dom.sense, map.target?.kind === "range" ? `${rangeWords(map, result)} ${near}` : near);
}

function rangeWords(map, result) {
  const cells = cellsOf(map, map.target), n = cells.filter((cell) => merges(map, result, cell)).length;
  return `In range, layers ${map.target.from} to ${map.target.to}: ${n} of ${cells.length} merge.`;
}

// What has joined and left since the plan that the corner marks show.
function paintDrift(result) {
  let joined = 0, left = 0;
  map.ghost.masks.forEach((before, position) => {
    const was = before.length > 0, is = result.masks[position].length > 0;
    if (is && !was) joined += 1;
    else if (was && !is) left += 1;
  });
  const words = joined || left ? `+${joined} −${left}` : "";
  setText(map.dom.drift, words);
  map.dom.drift.title = words && "matrices that have joined and left since the plan before";
}
