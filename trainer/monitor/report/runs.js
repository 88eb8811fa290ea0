// The charts of runs: what each shows over the chosen x axis, the controls above them, what
// happened, and the values at the pointer. chart.js draws them.
"use strict";
(() => {
const {data, node, short, textOf, Chart, start} = kit;
const EARLY = 0.03;  // of the x axis: what is higher there may lie above a linear y axis
const CROWD = 4;  // runs
const state = {x: data.x, window: 25, log: false, events: true, range: null, hidden: new Set()};
const medians = new Map();

function timeUnit(seconds) {
  if (seconds < 180) return [1, "seconds"];
  if (seconds < 3 * 3600) return [60, "minutes"];
  return seconds < 72 * 3600 ? [3600, "hours"] : [86400, "days"];
}
function axisOf(name, ends) {
  const axis = {ends, grid: false};
  if (name === "time") {
    const [size, unit] = timeUnit(ends[1]);
    return {...axis, size, title: `training time (${unit}, kept steps)`};
  }
  if (name === "flops") return {...axis, power: true, title: "compute (FLOPs)"};
  return {...axis, title: name};
}
function median(y, window) {
  if (window <= 1) return y;
  const half = window >> 1;
  return y.map((v, i) => {
    if (v === null) return null;
    const reach = Math.min(half, i);  // shorter at both ends: after the beginning the loss falls fast
    const near = y.slice(i - reach, i + reach + 1).filter(u => u !== null).sort((a, b) => a - b);
    const middle = near.length >> 1;
    return near.length % 2 ? near[middle] : (near[middle - 1] + near[middle]) / 2;
  });
}
function smoothed(s) {
  const known = `${s.key} ${state.window}`;
  if (!medians.has(known)) medians.set(known, median(s.y, state.window));
  return medians.get(known);
}

// ---- what a chart shows
function seriesOf(panel) {
  const series = [];
  data.runs.forEach((run, i) => {
    if (state.hidden.has(i)) return;
    const common = {run, colour: run.colour, pattern: run.dash, factor: panel.factor};
    if (panel.held) {
      const scored = Object.entries(run.scores).filter(([, of]) => of[panel.held]);
      scored.forEach(([name, of], n) => {
        const shade = Math.round(64 + 191 * n / Math.max(scored.length - 1, 1)).toString(16);
        series.push({...common, ...of[panel.held], dots: true, thin: n > 0,
          colour: panel.graded ? run.colour + shade : run.colour,
          label: scored.length > 1 ? `${run.label}, ${name}` : run.label});
      });
      return;
    }
    if (panel.events && run.band) series.push({...common, ...run.band, x: run.x, colour: "#808890",
      label: `${run.label}, center of its band`, pattern: "5 3", thin: true, aside: true});
    panel.lines.filter(name => run.lines[name]).forEach((name, n) => {
      const line = run.lines[name], part = name.split(".").slice(1).join(".");
      series.push({...common, ...line, x: run.x, key: `${i} ${name}`, smooth: panel.smooth,
        pattern: n ? ["", "6 3", "2 3", "9 3 2 3"][n % 4] : run.dash,
        label: panel.lines.length > 1 ? `${run.label}, ${part}` : run.label});
    });
    if (panel.events) run.dropped.forEach(line => series.push({...common, ...line, label:
      `${run.label}, not kept`, pattern: "1.5 2.5", thin: true, aside: true}));
  });
  return series;
}
function spanOf(series) {
  let high = 0;
  for (const s of series) for (const v of s.x[state.x] || []) if (v > high) high = v;
  return [0, high || 1];
}
function heightOf(panel, series, [low, high], log) {
  const all = [], late = [], edge = low + (high - low) * (low > 0 ? 0 : EARLY);
  for (const s of series) {
    const x = s.x[state.x], main = s.smooth ? smoothed(s) : s.y;
    const dense = main.length > 60;
    for (const y of s.low ? [s.low, s.high, main] : [s.y]) y.forEach((v, i) => {
      if (v === null || x[i] < low || x[i] > high || (log && v <= 0)) return;
      all.push(v * s.factor);
      if (x[i] >= edge || !dense) late.push(v * s.factor);
    });
  }
  if (!all.length) return null;
  const sorted = (log || panel.zero || !late.length ? all : late).sort((a, b) => a - b), count = sorted.length;
  const few = log || panel.zero || count < 500;  // else one point of 500 may lie above
  const bottom = sorted[0], upper = sorted[few ? count - 1 : Math.floor(0.998 * (count - 1))];
  if (log) {
    const room = Math.max((upper / bottom) ** 0.06, 1.02);
    return [bottom / room, upper * room];
  }
  if (panel.zero) return [0, upper * 1.08 || 1];
  const room = Math.max((upper - bottom) * 0.07, Math.abs(upper) * 1e-3, 1e-12);
  return [bottom - room, upper + room];
}
function tracesOf(s) {
  const x = s.x[state.x], scaled = y => y.map(v => v === null ? null : v * s.factor);
  if (!x) return [];
  const line = (y, width, colour, pattern) => ({kind: "line", x, y: scaled(y), width, pattern, colours: [colour]});
  const median = s.smooth && state.window > 1, crowd = data.runs.length - state.hidden.size > CROWD;
  const traces = [line(median ? smoothed(s) : s.y, s.thin ? 1.1 : 1.7, s.colour, s.pattern)];
  if (median && !s.low && !crowd) traces.unshift(line(s.y, 1, s.colour + "47"));
  // The edge of the band shows a single step.
  if (s.low) traces.unshift({kind: "band", x, y: scaled(s.low), high: scaled(s.high), colours: [s.colour + "2e"], width: 0.6});
  if (s.dots || s.y.length === 1) traces.push({kind: "dots", x, y: scaled(s.y), colours: [s.colour], size: s.thin ? 4 : 6, width: 0});
  return traces;
}
function specOf(chart, panel, width) {
  const series = chart.series = seriesOf(panel), log = panel.log || (state.log && !panel.zero);
  // All charts have the range of the loss.
  const loss = data.panels.flatMap(p => p.name === "loss" ? seriesOf(p) : []);
  const span = state.range || spanOf([...loss, ...series]), ends = heightOf(panel, series, span, log);
  if (!ends) return "Nothing to draw here: all runs are hidden, or the zoom shows none.";
  return {
    x: axisOf(state.x, span), y: {ends, log}, top: panel.events ? 24 : 8, traces: series.flatMap(tracesOf),
    height: panel.name === "loss" ? (width < 600 ? 300 : 380) : 230,
    before: panel.events ? drawEvents : null,
  };
}
function drawEvents(chart, inside) {
  const marks = [], order = Object.keys(data.looks), {px, left, right, top, foot} = chart.scale;
  data.runs.forEach((run, i) => {
    if (state.hidden.has(i)) return;
    for (const at of run.saves) node(inside, "line", {x1: px(at[state.x]), x2: px(at[state.x]),
      y1: foot - 6, y2: foot, stroke: run.colour, "stroke-width": 1.5});
    if (!state.events) return;
    const of = data.runs.length > 1 ? `${run.label}: ` : "";
    for (const e of run.events) marks.push({at: px(e.x[state.x]), sort: e.sort, text: of + e.text});
    for (const x of run.broken) marks.push({at: px(x[state.x]), sort: "failure",
      text: `${of}the loss of step ${x.step.toLocaleString("en-US")} is not finite`});
  });
  chart.marks = [];
  for (const m of marks.filter(m => m.at >= left - 1 && m.at <= right + 1).sort((a, b) => a.at - b.at)) {
    node(inside, "line", {x1: m.at, x2: m.at, y1: top, y2: foot, stroke: data.looks[m.sort][1],
      opacity: 0.55, "stroke-dasharray": "3 3"});
    const last = chart.marks[chart.marks.length - 1];
    if (last && m.at - last.at < 15) last.all.push(m);
    else chart.marks.push({at: m.at, all: [m]});
  }
  for (const group of chart.marks) {
    const first = group.all.reduce((a, b) => order.indexOf(a.sort) <= order.indexOf(b.sort) ? a : b);
    const [sign, colour] = data.looks[first.sort];
    const count = group.all.length > 1 ? String(group.all.length) : "";
    node(chart.svg, "text", {x: Math.min(group.at, right - 4), y: top - 8, "text-anchor": "middle", fill: colour,
      class: "mark", "font-size": 13, "font-weight": 700}, sign + count);
  }
}

// ---- the values at the pointer, below the chart
function nearest(x, value) {
  let low = 0, high = x.length - 1;
  while (high - low > 1) { const m = (low + high) >> 1; if (x[m] < value) low = m; else high = m; }
  return value - x[low] <= x[high] - value ? low : high;
}
class RunChart extends Chart {
  constructor(host) {
    const panel = data.panels.find(p => p.name === host.dataset.panel);
    super(host, panel.title, width => specOf(this, panel, width));
    this.readout.className = "readout";
    host.append(this.readout);
  }
  zoom(range) { state.range = range; redraw(); }
  read(at) {
    const {px, across} = this.scale, out = this.readout, value = px.value(at);
    out.replaceChildren();
    this.cursor.setAttribute("x1", at); this.cursor.setAttribute("x2", at);
    this.cursor.setAttribute("visibility", "visible");
    const marks = (this.marks || []).filter(m => Math.abs(m.at - at) < 12).flatMap(m => m.all);
    out.append(`${state.x === "flops" ? "FLOPs" : state.x} ${textOf(across, value)}: `);
    for (const s of this.series) {
      const x = s.x[state.x];
      if (!x || !x.length || (s.aside && (value < x[0] || value > x[x.length - 1]))) continue;
      if (value > x[x.length - 1] + (across.ends[1] - across.ends[0]) * 0.02) continue;
      const i = nearest(x, value), v = s.y[i], dot = document.createElement("i"), part = document.createElement("span");
      dot.style.background = s.colour;
      const middle = s.smooth && state.window > 1 && v !== null ? ` (median ${short(smoothed(s)[i] * s.factor)})` : "";
      part.append(dot, `${s.label} ${v === null ? "not finite" : short(v * s.factor, 5)}${middle}`);
      out.append(part);
    }
    for (const m of marks.slice(0, 4)) {
      const line = document.createElement("b");
      line.textContent = `${data.looks[m.sort][0]} ${m.text}`;
      line.style.color = data.looks[m.sort][1];
      line.className = "drawn";
      out.append(line);
    }
    if (marks.length > 4) out.append(`and ${marks.length - 4} more events here`);
  }
}

const charts = [...document.querySelectorAll("[data-panel]")].map(host => new RunChart(host));
const whole = document.getElementById("whole");
function redraw() {
  charts.forEach(chart => chart.draw());
  whole.hidden = !state.range;
}
function on(name, act) {
  document.querySelectorAll(`[name=${name}]`).forEach(input => input.addEventListener("change", () => { act(input); redraw(); }));
}
on("x", input => { state.x = input.value; state.range = null; });
on("window", input => { state.window = Number(input.value); });
on("log", input => { state.log = input.checked; });
on("events", input => { state.events = input.checked; });
on("run", input => { const i = Number(input.value); if (input.checked) state.hidden.delete(i); else state.hidden.add(i); });
whole.addEventListener("click", () => { state.range = null; redraw(); });
start(redraw);
})();
