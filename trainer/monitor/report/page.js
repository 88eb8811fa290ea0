// Draws the charts of the page from the numbers that it holds, and draws them again whenever the
// reader chooses another x axis, hides a run, or zooms. Nothing is loaded from elsewhere, and all
// text reaches the page as text (textContent).
"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const NS = "http://www.w3.org/2000/svg";
const INK = "#1f2328", SOFT = "#59636e", GRID = "#eceef0", FAINT = "#b4bac2";
const EARLY = 0.03;  // of the x axis: what is higher there may lie above a linear y axis
const CROWD = 4;  // runs
const state = {x: data.x, window: 25, log: false, events: true, range: null, hidden: new Set()};
const medians = new Map();

// ---- numbers
const SUPER = "⁰¹²³⁴⁵⁶⁷⁸⁹";
const raised = n => String(n).replace("-", "⁻").replace(/\d/g, d => SUPER[d]);
function power(v, digits) {
  const [m, e] = v.toExponential(digits).split("e");
  const head = m.includes(".") ? m.replace(/\.?0+$/, "") : m;
  return (head === "1" ? "" : head + "×") + "10" + raised(Number(e));
}
function short(v, digits = 4) {
  const a = Math.abs(v);
  if (a === 0) return "0";
  if (a >= 1e15 || a < 1e-4) return power(v, digits > 3 ? 2 : 1);
  for (const [size, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e4, "k"]])
    if (a >= size * 0.99995) return Number((v / (unit === "k" ? 1e3 : size)).toPrecision(digits)) + unit;
  return Number(v.toPrecision(digits)).toLocaleString("en-US", {maximumSignificantDigits: digits});
}
function timeUnit(seconds) {
  if (seconds < 180) return [1, "seconds"];
  if (seconds < 3 * 3600) return [60, "minutes"];
  return seconds < 72 * 3600 ? [3600, "hours"] : [86400, "days"];
}
function axisOf(name, high) {
  if (name === "time") {
    const [size, unit] = timeUnit(high);
    return {size, title: `training time (${unit}, kept steps)`, text: v => short(v)};
  }
  if (name === "flops") return {size: 1, title: "compute (FLOPs)", text: v => v ? power(v, 2) : "0"};
  return {size: 1, title: name === "step" ? "step" : "tokens", text: v => short(v)};
}
function ticks(low, high, about) {
  const raw = (high - low) / Math.max(1, about), size = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find(m => m * size >= raw * 0.75) * size;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++)
    found.push(Number((i * step).toPrecision(12)));
  return found;
}
function logTicks(low, high, about) {
  const from = Math.floor(Math.log10(low)), to = Math.ceil(Math.log10(high));
  if (to - from > about) {
    const every = Math.ceil((to - from) / about), found = [];
    for (let e = from; e <= to; e += every) found.push(10 ** e);
    return found.filter(v => v >= low && v <= high);
  }
  for (const some of [[1], [1, 3], [1, 2, 5], [1, 2, 3, 5, 7]]) {
    const found = [];
    for (let e = from; e <= to; e++) for (const m of some) found.push(m * 10 ** e);
    const inside = found.filter(v => v >= low && v <= high);
    if (inside.length >= 3) return inside;
  }
  return ticks(low, high, about);
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
function smoothed(key, y) {
  const known = `${key} ${state.window}`;
  if (!medians.has(known)) medians.set(known, median(y, state.window));
  return medians.get(known);
}

// ---- what a chart shows
function seriesOf(panel) {
  const found = [];
  data.runs.forEach((run, i) => {
    if (state.hidden.has(i)) return;
    const common = {run, colour: run.colour, dash: run.dash, factor: panel.factor};
    if (panel.held) {
      Object.entries(run.scores).forEach(([dataset, of], n) => {
        if (of[panel.held]) found.push({...common, ...of[panel.held], dots: true, thin: n > 0,
          label: Object.keys(run.scores).length > 1 ? `${run.label}, ${dataset}` : run.label});
      });
      return;
    }
    panel.lines.filter(name => run.lines[name]).forEach((name, n) => {
      const line = run.lines[name], part = name.split(".").slice(1).join(".");
      found.push({...common, ...line, x: run.x, key: `${i} ${name}`, smooth: panel.smooth,
        dash: n ? ["", "6 3", "2 3", "9 3 2 3"][n % 4] : run.dash,
        label: panel.lines.length > 1 ? `${run.label}, ${part}` : run.label});
    });
    if (panel.events) run.dropped.forEach(line => found.push({...common, ...line, label:
      `${run.label}, not kept`, dash: "1.5 2.5", thin: true, aside: true}));
  });
  return found;
}
function spanOf(series) {
  let high = 0;
  for (const s of series) for (const v of s.x[state.x] || []) if (v > high) high = v;
  return [0, high || 1];
}
function heightOf(panel, series, [low, high], isLog) {
  const all = [], late = [], edge = low + (high - low) * (low > 0 ? 0 : EARLY);
  for (const s of series) {
    const x = s.x[state.x], main = s.smooth ? smoothed(s.key, s.y) : s.y;
    const dense = main.length > 60;
    for (const y of s.low ? [s.low, s.high, main] : [s.y]) y.forEach((v, i) => {
      if (v === null || x[i] < low || x[i] > high || (isLog && v <= 0)) return;
      all.push(v * s.factor);
      if (x[i] >= edge || !dense) late.push(v * s.factor);
    });
  }
  if (!all.length) return null;
  const sorted = (isLog || panel.zero || !late.length ? all : late).sort((a, b) => a - b), count = sorted.length;
  const few = isLog || panel.zero || count < 500;  // else one point of 500 may lie above
  const bottom = sorted[0], upper = sorted[few ? count - 1 : Math.floor(0.998 * (count - 1))];
  if (isLog) {
    const room = Math.max((upper / bottom) ** 0.06, 1.02);
    return [bottom / room, upper * room];
  }
  if (panel.zero) return [0, upper * 1.08 || 1];
  const room = Math.max((upper - bottom) * 0.07, Math.abs(upper) * 1e-3, 1e-12);
  return [bottom - room, upper + room];
}

// ---- drawing
function make(parent, name, of, text) {
  const node = document.createElementNS(NS, name);
  for (const [k, v] of Object.entries(of)) if (v !== "") node.setAttribute(k, v);
  if (text !== undefined) node.textContent = text;
  return parent.appendChild(node);
}
function path(x, y, px, py) {
  let d = "", open = false;
  for (let i = 0; i < y.length; i++) {
    if (y[i] === null || x[i] === null || !Number.isFinite(py(y[i]))) { open = false; continue; }
    d += `${open ? "L" : "M"}${px(x[i]).toFixed(1)} ${py(y[i]).toFixed(1)}`;
    open = true;
  }
  return d;
}
function band(s, px, py) {
  const x = s.x[state.x], there = [], back = [];
  for (let i = 0; i < x.length; i++) if (s.low[i] !== null) {
    there.push(`${px(x[i]).toFixed(1)} ${py(s.high[i]).toFixed(1)}`);
    back.unshift(`${px(x[i]).toFixed(1)} ${py(s.low[i]).toFixed(1)}`);
  }
  return there.length ? `M${[...there, ...back].join("L")}Z` : "";
}
function draw(chart) {
  const {panel, host, svg} = chart, series = seriesOf(panel);
  svg.replaceChildren();
  const width = host.clientWidth, height = panel.name === "loss" ? (width < 600 ? 300 : 380) : 230;
  if (width < 100) return;  // not laid out yet: drawn again when it is
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("height", height);
  const isLog = panel.log || (state.log && !panel.zero);
  const span = state.range || chart.whole(), ends = heightOf(panel, series, span, isLog);
  chart.scale = null;
  if (!ends) {
    make(svg, "text", {x: 8, y: 40, fill: SOFT}, "Nothing to draw here: all runs are hidden, or the zoom shows none.");
    return;
  }
  const axis = axisOf(state.x, span[1]), yTicks = (isLog ? logTicks : ticks)(...ends, height / 45);
  const labels = yTicks.map(v => short(v, 3 + (Math.abs(v) >= 1)));
  const left = 12 + 7 * Math.max(...labels.map(t => t.length)), right = 14;
  const top = panel.events ? 24 : 8, bottom = 42;
  const px = v => left + (v - span[0]) / (span[1] - span[0]) * (width - left - right);
  const scale = isLog ? v => Math.log(v) : v => v, [y0, y1] = ends.map(scale);
  const py = v => top + (y1 - scale(v)) / (y1 - y0) * (height - top - bottom);
  yTicks.forEach((v, i) => {
    make(svg, "line", {x1: left, x2: width - right, y1: py(v), y2: py(v), stroke: GRID});
    make(svg, "text", {x: left - 6, y: py(v) + 4, "text-anchor": "end", fill: INK}, labels[i]);
  });
  const foot = height - bottom;
  make(svg, "line", {x1: left, x2: width - right, y1: foot, y2: foot, stroke: FAINT});
  for (const v of ticks(span[0] / axis.size, span[1] / axis.size, (width - left) / 110)) {
    const at = px(v * axis.size), near = at > width - 30 ? "end" : "middle";
    make(svg, "line", {x1: at, x2: at, y1: foot, y2: foot + 4, stroke: FAINT});
    make(svg, "text", {x: near === "end" ? width - 2 : at, y: foot + 17, "text-anchor": near, fill: INK}, axis.text(v));
  }
  make(svg, "text", {x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle", fill: SOFT}, axis.title);
  const clip = `clip-${panel.name}`;
  make(make(svg, "clipPath", {id: clip}), "rect", {x: left - 4, y: top, width: width - left - right + 8, height: foot - top + 4});
  const inside = make(svg, "g", {"clip-path": `url(#${clip})`, fill: "none", "stroke-linejoin": "round"});
  chart.scale = {px, left, right: width - right, top, foot, span, series};
  if (panel.events) drawEvents(chart, inside, px, top, foot);
  for (const s of series) drawSeries(s, inside, px, py);
  chart.cursor = make(svg, "line", {y1: top, y2: foot, stroke: SOFT, "stroke-dasharray": "2 2", visibility: "hidden"});
  chart.brush = make(svg, "rect", {y: top, height: foot - top, fill: "#0b5cad22", visibility: "hidden"});
}
function drawSeries(s, into, px, py0) {
  const x = s.x[state.x], py = v => py0(v * s.factor), colour = s.colour;
  if (!x) return;
  if (s.low) make(into, "path", {d: band(s, px, py), fill: colour, "fill-opacity": 0.18,
    stroke: colour, "stroke-width": 0.6, "stroke-opacity": 0.3});  // the stroke shows a single step
  const line = {stroke: colour, "stroke-width": s.thin ? 1.1 : 1.7, "stroke-dasharray": s.dash};
  if (s.smooth && state.window > 1) {
    const crowd = data.runs.length - state.hidden.size > CROWD;  // then medians alone
    if (!s.low && !crowd) make(into, "path", {d: path(x, s.y, px, py), stroke: colour, opacity: 0.28});
    make(into, "path", {d: path(x, smoothed(s.key, s.y), px, py), ...line});
  } else make(into, "path", {d: path(x, s.y, px, py), ...line});
  if (s.dots || s.y.length === 1) s.y.forEach((v, i) => {
    if (v !== null && x[i] !== null) make(into, "circle", {cx: px(x[i]), cy: py(v), r: s.thin ? 2 : 3, fill: colour});
  });
}
function drawEvents(chart, inside, px, top, foot) {
  const marks = [], order = Object.keys(data.looks), {left, right} = chart.scale;
  data.runs.forEach((run, i) => {
    if (state.hidden.has(i)) return;
    for (const at of run.saves) make(inside, "line", {x1: px(at[state.x]), x2: px(at[state.x]),
      y1: foot - 6, y2: foot, stroke: run.colour, "stroke-width": 1.5});
    if (!state.events) return;
    const of = data.runs.length > 1 ? `${run.label}: ` : "";
    for (const e of run.events) marks.push({at: px(e.x[state.x]), sort: e.sort, what: of + e.what, run});
    for (const x of run.broken) marks.push({at: px(x[state.x]), sort: "failure", run,
      what: `${of}the loss of step ${x.step.toLocaleString("en-US")} is not finite`});
  });
  chart.marks = [];
  for (const m of marks.filter(m => m.at >= left - 1 && m.at <= right + 1).sort((a, b) => a.at - b.at)) {
    make(inside, "line", {x1: m.at, x2: m.at, y1: top, y2: foot, stroke: data.looks[m.sort][1],
      opacity: 0.55, "stroke-dasharray": "3 3"});
    const last = chart.marks[chart.marks.length - 1];
    if (last && m.at - last.at < 15) last.all.push(m);
    else chart.marks.push({at: m.at, all: [m]});
  }
  for (const group of chart.marks) {
    const first = group.all.reduce((a, b) => order.indexOf(a.sort) <= order.indexOf(b.sort) ? a : b);
    const [sign, colour] = data.looks[first.sort];
    const count = group.all.length > 1 ? String(group.all.length) : "";
    make(chart.svg, "text", {x: Math.min(group.at, right - 4), y: top - 8, "text-anchor": "middle", fill: colour,
      class: "mark", "font-weight": 700}, sign + count);
  }
}

// ---- reading, zooming
function nearest(x, value) {
  let low = 0, high = x.length - 1;
  while (high - low > 1) { const m = (low + high) >> 1; if (x[m] < value) low = m; else high = m; }
  return value - x[low] <= x[high] - value ? low : high;
}
function read(chart, at) {
  const {px, span, left, right, series} = chart.scale, out = chart.readout;
  const value = span[0] + (at - left) / (right - left) * (span[1] - span[0]);
  out.replaceChildren();
  chart.cursor.setAttribute("x1", at); chart.cursor.setAttribute("x2", at);
  chart.cursor.setAttribute("visibility", "visible");
  const marks = (chart.marks || []).filter(m => Math.abs(m.at - at) < 12).flatMap(m => m.all);
  const axis = axisOf(state.x, span[1]);
  out.append(`${state.x === "time" ? "time" : state.x === "flops" ? "FLOPs" : state.x} ${axis.text(value / axis.size)}: `);
  for (const s of series) {
    const x = s.x[state.x];
    if (!x || !x.length || (s.aside && (value < x[0] || value > x[x.length - 1]))) continue;
    if (value > x[x.length - 1] + (span[1] - span[0]) * 0.02) continue;
    const i = nearest(x, value), v = s.y[i];
    const dot = document.createElement("i");
    dot.style.background = s.colour;
    const part = document.createElement("span");
    const middle = s.smooth && state.window > 1 && v !== null ? ` (median ${short(smoothed(s.key, s.y)[i] * s.factor)})` : "";
    part.append(dot, `${s.label} ${v === null ? "not finite" : short(v * s.factor, 5)}${middle}`);
    out.append(part);
  }
  for (const m of marks.slice(0, 4)) {
    const line = document.createElement("b");
    line.textContent = `${data.looks[m.sort][0]} ${m.what}`;
    line.style.color = data.looks[m.sort][1];
    out.append(line);
  }
  if (marks.length > 4) out.append(`and ${marks.length - 4} more events here`);
}
function follow(chart) {
  let from = null;
  const place = e => {
    const {left, right} = chart.scale;
    return Math.min(right, Math.max(left, e.clientX - chart.svg.getBoundingClientRect().left));
  };
  chart.svg.addEventListener("pointerdown", e => {
    if (!chart.scale || e.button) return;
    from = place(e);
    read(chart, from);
  });
  chart.svg.addEventListener("pointermove", e => {
    if (!chart.scale) return;
    const at = place(e);
    read(chart, at);
    if (from === null) return;
    chart.svg.setPointerCapture(e.pointerId);
    chart.brush.setAttribute("x", Math.min(from, at));
    chart.brush.setAttribute("width", Math.abs(at - from));
    chart.brush.setAttribute("visibility", Math.abs(at - from) > 8 ? "visible" : "hidden");
  });
  chart.svg.addEventListener("pointerup", e => {
    if (from === null || !chart.scale) return;
    const at = place(e), {left, right, span} = chart.scale, start = from;
    from = null;
    chart.brush.setAttribute("visibility", "hidden");
    if (Math.abs(at - start) < 12) return;
    const value = p => span[0] + (p - left) / (right - left) * (span[1] - span[0]);
    state.range = [value(Math.min(start, at)), value(Math.max(start, at))];
    redraw();
  });
  chart.svg.addEventListener("pointercancel", () => { from = null; });
  chart.svg.addEventListener("pointerleave", () => { if (chart.cursor) chart.cursor.setAttribute("visibility", "hidden"); });
  chart.svg.addEventListener("dblclick", () => { state.range = null; redraw(); });
}

const charts = [...document.querySelectorAll("[data-panel]")].map(host => {
  const panel = data.panels.find(p => p.name === host.dataset.panel);
  const svg = make(host, "svg", {role: "img", "aria-label": panel.title, width: "100%"});
  const readout = document.createElement("p");
  readout.className = "readout";
  host.append(readout);
  const chart = {panel, host, svg, readout, marks: []};
  chart.whole = () => spanOf(data.panels.flatMap(p => p.name === "loss" ? seriesOf(p) : []).concat(seriesOf(panel)));
  follow(chart);
  return chart;
});
function redraw() {
  charts.forEach(draw);
  document.getElementById("whole").hidden = !state.range;
}
function on(name, act) {
  document.querySelectorAll(`[name=${name}]`).forEach(node => node.addEventListener("change", () => { act(node); redraw(); }));
}
on("x", node => { state.x = node.value; state.range = null; });
on("window", node => { state.window = Number(node.value); });
on("log", node => { state.log = node.checked; });
on("events", node => { state.events = node.checked; });
on("run", node => { const i = Number(node.value); if (node.checked) state.hidden.delete(i); else state.hidden.add(i); });
document.getElementById("whole").addEventListener("click", () => { state.range = null; redraw(); });
let wide = 0;
new ResizeObserver(() => { if (document.body.clientWidth !== wide) { wide = document.body.clientWidth; redraw(); } }).observe(document.body);
redraw();
document.body.dataset.drawn = "yes";
})();
