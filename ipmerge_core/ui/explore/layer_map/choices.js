// Layer map, the lists above the map: presets and kept plans with their source, measure, update and
// expert. The simple layout shows only those that differ from the usual, so that nothing is hidden
// that decides.

const options = (entries) => entries.map(([value, text]) => node("option", { value }, text));
const expertName = (map, k) => shortId((map.pack.sources?.math || [])[k]?.id, k);
const shortId = (id, k) => (id ? String(id).split("/").filter(Boolean).pop() : `expert ${k + 1}`);

function buildPicks() {
  const { pick } = map.dom;
  buildPresets();
  pick.similarity.replaceChildren(...options(MEASURES.map((value) => [value, MEASURE_LABELS[value]])));
  pick.variant.replaceChildren(...options(VARIANTS.map((value) => [value, VARIANT_LABELS[value]])));
  pick.expert.replaceChildren(...options([["-1", "all, highest"], ...Array.from({ length: map.index.nExperts }, (_, k) => [String(k), expertName(map, k)])]));
  buildTicks(find("[data-ticks=s]"), [0, 0.2, 0.4, 0.6, 0.8, 1].map((v) => [v, v === 0 || v === 1 ? String(v) : v.toFixed(1)]));
  buildTicks(find("[data-ticks=lambda]"), LAMBDA_TICKS.map(([v, text]) =>
    [lambdaPosition(v) / LAMBDA_STEPS, v === 1 ? "1 paper" : text, v === 1]));
  buildTwins(map);
}

const entries = () => [...map.presets, ...map.kept];

function buildPresets() {
  const { preset } = map.dom.pick, list = (from, first) => options(from.map(({ label }, i) => [String(first + i), label]));
  map.kept = keptPlans(map.packId, map.index);
  preset.replaceChildren(...list(map.presets, 0),
    ...(map.kept.length ? [node("optgroup", { label: "Kept by you" }, ...list(map.kept, map.presets.length))] : []),
    ...options([["edited", "Edited"]]));
}

function paintChoices() {
  const { pick } = map.dom, { plan, past, future } = map, simple = map.layout === "simple";
  pick.similarity.value = plan.similarity;
  pick.variant.value = plan.variant;
  pick.expert.value = String(map.expert);
  for (const name of ["similarity", "variant"]) pick[name].parentNode.hidden = simple && plan[name] === DEFAULT_PLAN[name];
  pick.expert.parentNode.hidden = map.index.nExperts < 2 || (simple && map.expert < 0);
  for (const button of element.querySelectorAll("[data-act=layout]")) button.setAttribute("aria-pressed", String(button.dataset.layout === map.layout));
  find("[data-act=undo]").disabled = !past.length;
  find("[data-act=redo]").disabled = !future.length;
  paintPreset();
}

function paintPreset() {
  const { preset } = map.dom.pick, list = entries();
  const exact = list.findIndex((entry) => samePlan(presetPlan(entry), map.plan));
  if (exact >= 0) map.preset = exact;
  const base = map.preset !== null ? list[map.preset] : null, edited = preset.querySelector("[value=edited]");
  preset.value = exact >= 0 ? String(exact) : "edited";
  setText(edited, base && exact < 0 ? `${base.label}, edited` : "Edited");
  edited.hidden = exact >= 0;
  setText(map.dom.source, base ? base.source : "");
  setText(find("[data-act=keep-plan]"), keptHere() >= 0 ? "Forget plan" : "Keep plan");
}
