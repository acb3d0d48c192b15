// Compare, what stands beside what: cells of A and B by relative depth, and what each pair says.

const STATE_WORDS = { both: "merges in both", "only A": "merges only in A", "only B": "merges only in B", neither: "merges in neither" };
const COLUMNS = [["layer", String], ["module", String], ["merges in", (v) => v], ["experts A", (v) => v], ["experts B", (v) => v],
  ["similarity A", (v) => fixed(v)], ["similarity B", (v) => fixed(v)], ["B − A", (v) => signed(v, 3)], ["change A", percent], ["change B", percent]];

const signed = (x, digits) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(digits);

// The layer of another pack at the same relative depth.
function across(from, to, layer) {
  const last = from.index.layers.length - 1, depth = last ? from.index.layers.indexOf(layer) / last : 0;
  return to.index.layers[Math.round(depth * (to.index.layers.length - 1))];
}

const partnerOf = (from, to, cell) => to.index.at.get(across(from, to, cell.layer) + "." + cell.module);
const similarityOf = (side, cell) => shownSimilarity({ plan: side.plan, expert: -1 }, cell);
const expertsOf = (side, cell) => side.result.masks[cell.position];

function compareCells({ a, b }) {
  const several = Math.max(a.index.nExperts, b.index.nExperts) > 1, named = (experts) => experts.map((k) => k + 1).join(" and ") || "none";
  return a.index.cells.flatMap((cell) => {
    const other = partnerOf(a, b, cell);
    if (!other) return [];
    const ofA = expertsOf(a, cell), ofB = expertsOf(b, other), values = [similarityOf(a, cell), similarityOf(b, other)];
    return [{ cell, other, layer: cell.layer, module: cell.module,
      "merges in": ofA.length ? (ofB.length ? "both" : "only A") : ofB.length ? "only B" : "neither",
      ...(several ? { "experts A": named(ofA), "experts B": named(ofB) } : {}),
      "similarity A": values[0], "similarity B": values[1], "B − A": values[1] - values[0],
      "change A": cellChange(cell, ofA, a.plan), "change B": cellChange(other, ofB, b.plan) }];
  });
}

const differs = (row) => row["merges in"].startsWith("only") || (row["merges in"] === "both" && row["experts A"] !== row["experts B"]);

// A row without what only the page needs.
const plain = ({ cell, other, ...row }) => row;

function layerPairs({ a, b }) {
  return a.index.layers.map((layer) => {
    const other = across(a, b, layer);
    return { layer, ...(other === layer ? {} : { "layer of B": other }), "change A": a.result.layer_change[layer], "change B": b.result.layer_change[other] };
  });
}

function cellWords(side, cell) {
  if (!cell) return "no such matrix";
  const experts = expertsOf(side, cell);
  return `${experts.length ? "merges" : "kept"}, similarity ${fixed(similarityOf(side, cell))}, change ${percent(cellChange(cell, experts, side.plan))}`;
}
