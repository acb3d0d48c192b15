// Layer map, the tour: a minute, five steps, a card in the corner that takes nothing away. A step ends
// when its thing is done or Next is pressed, Escape ends them all. It starts by itself at the first
// visit only, and never where somebody came for something else: by a link, on a stage, in a report.

const TOUR = [
  { at: ".lm-map", done: "read", title: "One square is one weight matrix",
    words: "Of the language model inside: its layers by the parts of a layer. The colour says how well the math model's change lines up with the vision model's. Point at a few squares, or walk with the arrow keys." },
  { at: ".lm-dial-s", done: "s", title: "Drag the threshold",
    words: "A matrix whose similarity reaches S_α takes the math model's change: framed, in full colour. The others stay as they are: hatched." },
  { at: ".lm-map", done: "choose", title: "Choose a square",
    words: "It tells its similarity, why it merges or stays, and lets you decide otherwise for this one." },
  { at: ".lm-dial-l", done: "lambda", title: "Turn the gain λ",
    words: "How strongly the change is merged. To the right the merged model absorbs more of the math model (dashed) and keeps less of the vision model (solid). This is geometry, not accuracy." },
  { at: ".lm-answer", done: "answer", title: "See it answer",
    words: "The same question to the vision model and to the merged one, side by side." },
];
const PAUSE = 900;  // to see the tick before the next step

const tour = { steps: [], step: -1, seen: new Set(), lit: null, timer: 0 };

const tourButton = (act, label, more = {}) => node("button", { type: "button", "data-act": act, ...more }, label);

// The first visit: a card that asks, so that nothing moves and nothing is covered unasked.
function inviteToTour() {
  remember("toured", true);
  document.addEventListener("keydown", leaveTour, true);
  find(".lm-tour").replaceChildren(
    node("h2", {}, "New here?"),
    node("p", {}, "A minute shows what this map tells and what you can do with it."),
    node("p", { class: "lm-acts" }, tourButton("tour-end", "No, thanks", { class: "lm-quiet" }), tourButton("tour", "Start the tour", { class: "lm-next" })));
  find(".lm-tour").hidden = false;
}

function startTour() {
  tour.steps = TOUR.filter(({ at }) => find(at)?.offsetParent);
  document.addEventListener("keydown", leaveTour, true);
  showStep(0);
  find(".lm-tour h2").focus({ preventScroll: true });
}

function endTour() {
  const card = find(".lm-tour"), inside = card.contains(document.activeElement);
  clearTimeout(tour.timer);
  tour.step = -1;
  light(null);
  card.hidden = true;
  card.replaceChildren();
  document.removeEventListener("keydown", leaveTour, true);
  if (inside) find("[data-act=tour]").focus();
}

function leaveTour(event) {
  if (event.key !== "Escape" || !element.offsetParent) return;
  event.preventDefault();
  event.stopPropagation();
  endTour();
}

function light(step) {
  tour.lit?.classList.remove("lm-lit-up");
  tour.lit = step && find(step.at);
  tour.lit?.classList.add("lm-lit-up");
}

function showStep(number) {
  const step = tour.steps[number], card = find(".lm-tour"), inside = card.contains(document.activeElement);
  clearTimeout(tour.timer);
  if (!step) { endTour(); return; }
  Object.assign(tour, { step: number, seen: new Set() });
  const last = number === tour.steps.length - 1;
  card.hidden = false;
  card.replaceChildren(
    node("p", { class: "lm-tour-count" }, `Step ${number + 1} of ${tour.steps.length}`, node("span", { class: "lm-tour-tick", "aria-hidden": "true" })),
    node("h2", { tabindex: "-1" }, step.title),
    node("p", {}, step.words),
    node("p", { class: "lm-acts" }, tourButton("tour-end", "End tour", { class: "lm-quiet" }), tourButton("tour-next", last ? "Done" : "Next", { class: "lm-next" })));
  light(step);
  if (inside) find(".lm-tour [data-act=tour-next]").focus();
  const still = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
  tour.lit.scrollIntoView({ block: map.narrow ? "start" : "nearest", behavior: still ? "auto" : "smooth" });
  setText(map.dom.status, `Tour, step ${number + 1} of ${tour.steps.length}. ${step.title}. ${step.words}`);
}

// Something was done: the step that waited for it gets its tick, and the next one comes.
function toured(what, which) {
  if (tour.step < 0 || tour.steps[tour.step].done !== what) return;
  tour.seen.add(which);
  if (what === "read" && tour.seen.size < 3) return;
  find(".lm-tour-tick").textContent = " ✓ done";
  clearTimeout(tour.timer);
  tour.timer = setTimeout(() => showStep(tour.step + 1), PAUSE);
}

const mayInvite = (query) => server && !map.onStage && !query.has("v") && !recall("toured", false);
