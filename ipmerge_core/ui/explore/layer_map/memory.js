// Layer map, what the browser remembers from one visit to the next: the layout, which hints were
// seen, and the plans kept for each pair. Where storage is closed it lasts as long as the page, and
// what comes out of storage is believed no more than a link is.

const MEMORY = "ipmerge.map.v1";
const MOST_KEPT = 9;  // one a number key
const KEPT_EVENT = "ipmerge-kept";  // tells other components of the page
let remembered = {};

function recall(name, otherwise) {
  try {
    const stored = JSON.parse(window.localStorage.getItem(MEMORY));
    if (stored && typeof stored === "object") remembered = stored;
  } catch { /* closed or damaged: this page's own memory holds */ }
  return remembered[name] ?? otherwise;
}

function remember(name, value) {
  recall(name);
  remembered = { ...remembered, [name]: value };
  try { window.localStorage.setItem(MEMORY, JSON.stringify(remembered)); } catch { /* as above */ }
}

// The plans kept for a pair, as entries like the presets.
function keptPlans(packId, index) {
  const kept = recall("kept", {})?.[packId];
  return (Array.isArray(kept) ? kept.slice(0, MOST_KEPT) : []).map((raw, i) => {
    const plan = cleanPlan(Object(raw), index);
    return { label: `${i + 1} · ${planWords(plan)}`, source: "A plan you kept, in this browser only.", plan, kept: true };
  });
}

function keepPlans(packId, plans) {
  remember("kept", { ...recall("kept", {}), [packId]: plans });
  window.dispatchEvent(new Event(KEPT_EVENT));
}
