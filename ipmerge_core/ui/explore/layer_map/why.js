// Layer map, reasons: why a matrix merges or is kept, answered from the live values; in the field's
// words, and in plain ones for the simple layout.

function rankOf(map, cell) {
  const value = shownSimilarity(map, cell);
  return 1 + map.index.cells.filter((other) => shownSimilarity(map, other) > value).length;
}

function verdictText(map, cell) {
  const { s, similarity, overrides } = map.plan, value = shownSimilarity(map, cell), text = fixed(value);
  if (overrides[cell.name] === "merge") return `Always merged, by your choice. Its similarity is ${text}.`;
  if (overrides[cell.name] === "keep") return `Always kept, by your choice. Its similarity is ${text}.`;
  return value >= s
    ? `Merges: ${MEASURE_LABELS[similarity]} is ${text}, at or above S_α ${fixed(s)}.`
    : `Kept: ${MEASURE_LABELS[similarity]} is ${text}. It needs S_α ≤ ${text} to merge.`;
}

// The same for someone who has never seen a weight matrix.
function plainText(map, cell) {
  const { s, overrides } = map.plan, value = shownSimilarity(map, cell), text = fixed(value, 2), own = overrides[cell.name];
  const alike = `The math model and the vision model changed this matrix in directions that agree by ${text}, where 0 is unrelated and 1 the same.`;
  if (own) return `${alike} You have set it to ${own === "merge" ? "merge" : "stay"}, whatever the threshold says.`;
  return value >= s
    ? `${alike} That reaches the threshold ${fixed(s, 2)}, so the math model's change is merged into it.`
    : `${alike} That is below the threshold ${fixed(s, 2)}, so it stays as the vision model has it.`;
}

function whyText(map, cell) {
  const value = shownSimilarity(map, cell), { s, overrides } = map.plan, text = fixed(value);
  const rank = `It ranks ${rankOf(map, cell)} of ${map.index.cells.length}.`;
  if (overrides[cell.name]) return `${title(cell)} is set by hand; without that it would ${value >= s ? "merge" : "be kept"}, with ${text} against S_α ${fixed(s)}. ${rank}`;
  return value >= s
    ? `${title(cell)} merges because ${text} ≥ S_α ${fixed(s)}. ${rank} It would leave above ${text}.`
    : `${title(cell)} is kept because ${text} < S_α ${fixed(s)}. ${rank} It would join at ${text}.`;
}

// What this matrix is worth to the whole: the change with and without it.
function shareText(map, cell, result) {
  const { overrides } = map.plan, isOn = merges(map, result, cell);
  const other = previewOf(map.index, { ...map.plan, overrides: { ...overrides, [cell.name]: isOn ? "keep" : "merge" } });
  const exact = (x) => `${Number((100 * x).toPrecision(3))} %`;
  return `${isOn ? "Without it" : "With it"} the whole change would be ${exact(other.relative_change)} of ‖W‖ instead of ${exact(result.relative_change)}.`;
}

// What the other two measures would decide about it at the same threshold.
function otherMeasures(map, cell) {
  const { s, similarity } = map.plan;
  const words = MEASURES.filter((measure) => measure !== similarity).map((measure) => {
    const value = shownSimilarity({ ...map, plan: { ...map.plan, similarity: measure } }, cell);
    return `${MEASURE_LABELS[measure]} is ${fixed(value)}: ${value >= s ? "merges" : "kept"}`;
  });
  return `By the other measures: ${words.join("; ")}.`;
}

function chanceText(map, record) {
  const chance = record.chance?.[map.plan.similarity];
  return `Similarity is ${MEASURE_MEANING[map.plan.similarity]}.` +
    (Number.isFinite(chance) ? ` Two unrelated matrices of this size reach about ${fixed(chance, 2)}.` : "");
}

function whyBlock(map, cell, record, buttons) {
  const text = node("div", { class: "lm-why", id: map.id + "why", hidden: "" });
  const button = node("button", { type: "button", class: "lm-quiet", "data-act": "why", "aria-expanded": "false",
    "aria-controls": text.id }, "Why?");
  const show = actionButton("show-flip", "Show me the flip");
  map.live.push(() => { show.hidden = Boolean(map.plan.overrides[cell.name]); });
  const line = (words) => {
    const made = node("p");
    map.live.push((result) => { if (!text.hidden) setText(made, words(result)); });  // no sums for what nobody reads
    return made;
  };
  text.append(line(() => whyText(map, cell)), line((result) => shareText(map, cell, result)), line(() => chanceText(map, record)),
    line(() => otherMeasures(map, cell)));
  if (Number.isFinite(record.gap) && record.gap < 0.05) {
    text.append(node("p", {}, `The first two singular values differ by only ${percent(record.gap)}, so which direction counts as the first is nearly a coin toss here.`));
  }
  text.append(show);
  return node("div", { class: "lm-whybox" }, node("div", { class: "lm-acts" }, buttons, button), text);
}
