// @ts-check
// A click on an evaluated point of a figure of a search. Gradio draws the figures below the component, and
// Plotly tells of a click only those who ask the drawn element.

const FIGURES = ["landscape", "path", "front"];

/** @typedef {{ points: { customdata?: unknown }[] }} Clicked */
/** @typedef {HTMLElement & { on?: (event: string, listener: (clicked: Clicked) => void) => void }} Figure */

/**
 * Call `open` with the number of the evaluation that is clicked, in every figure that is drawn from now on.
 *
 * @param {(number: number) => void} open
 */
export function listenToFigures(open) {
  /** @type {WeakSet<Figure>} */
  const known = new WeakSet();
  const look = () => {
    for (const name of FIGURES) {
      /** @type {Figure | null} */
      const figure = document.querySelector(`#search-${name} .js-plotly-plot`);
      if (!figure?.on || known.has(figure)) continue;
      known.add(figure);
      figure.on("plotly_click", ({ points }) => {
        const number = evaluationOf(points);
        if (number !== null) open(number);
      });
    }
  };
  new MutationObserver(look).observe(document.querySelector("#tab-evaluate") ?? document.body, { childList: true, subtree: true });
  look();
}

/**
 * The number of the evaluation under the pointer, if a point of one is among what is clicked.
 *
 * @param {Clicked["points"]} points
 */
export function evaluationOf(points) {
  for (const { customdata } of points) {
    const number = Array.isArray(customdata) ? customdata[0] : null;
    if (typeof number === "number") return number;
  }
  return null;
}
