// Layer map, a small line chart over ranks on a logarithmic axis; values on a linear or a log one.

function lineChart({ width, series, log, top: ceiling, marks = [], dots = [] }) {
  const height = 150, left = 38, right = 6, top = 8, bottom = 18;
  const last = Math.log(Math.max(...series.flatMap((s) => s.index), 2));
  const values = series.flatMap((s) => s.values).filter((v) => !log || v > 0);
  const low = log ? Math.floor(Math.log10(Math.max(Math.min(...values), Math.max(...values) * 1e-5))) : 0;
  const high = log ? Math.log10(Math.max(...values)) : ceiling || niceTop(Math.max(...values));
  const y = (v) => height - bottom - ((Math.max(log ? Math.log10(Math.max(v, 1e-300)) : v, low) - low) / (high - low || 1)) * (height - top - bottom);
  const x = (i) => left + (Math.log(i) / last) * (width - left - right);
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, class: "lm-chart" });
  const ticks = log ? Array.from({ length: Math.floor(high) - low + 1 }, (_, i) => low + i) : [0, high / 2, high];
  for (const tick of ticks) {
    const at = y(log ? 10 ** tick : tick);
    svg.append(shape("line", { x1: left, x2: width - right, y1: at, y2: at, class: "lm-rule" }),
      shape("text", { x: left - 5, y: at + 4, class: "lm-note", "text-anchor": "end" }, log ? `1e${tick}` : String(Number(tick.toPrecision(2)))));
  }
  for (let rank = 1; Math.log(rank) <= last; rank *= 10) {
    svg.append(shape("text", { x: x(rank), y: height - 4, class: "lm-note", "text-anchor": rank === 1 ? "start" : "middle" }, rank === 1 ? "rank 1" : String(rank)));
  }
  const levels = marks.filter(({ value }) => value > 0 && (!log || Math.log10(value) >= low) && y(value) >= top);
  for (const { value } of levels) svg.append(shape("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), class: "lm-mark" }));
  for (const s of series) svg.append(shape("path", { class: s.style, d: polyline(s.index.map(x), s.values.map(y)) }));
  for (const { at, value, style, text } of dots) {
    if (!(at >= 1) || !Number.isFinite(value)) continue;
    const mark = shape("path", { class: style, d: "M0-4.5L4.5 0 0 4.5-4.5 0Z", transform: `translate(${x(at).toFixed(1)} ${y(value).toFixed(1)})` });
    mark.append(shape("title", {}, text));
    svg.append(mark);
  }
  levels.forEach(({ value, text }, i) => {  // names where there is room for them
    if (levels.slice(0, i).some((other) => Math.abs(y(other.value) - y(value)) < 13)) return;
    svg.append(shape("text", { x: width - right, y: y(value) - 4, "text-anchor": "end", class: "lm-note" }, text));
  });
  return svg;
}

const polyline = (xs, ys) => xs.map((x, i) => `${i ? "L" : "M"}${x.toFixed(1)} ${ys[i].toFixed(1)}`).join("");
