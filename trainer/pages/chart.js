// Draws charts from the numbers that the page holds, and draws them again when their width changes.
// Nothing is loaded from elsewhere, and all text reaches the page as text (textContent).
//
// A chart is {x, y, height, traces} (figure.py): axes with ends, and lines, bands, dots and bars.
"use strict";
const kit = (() => {
const data = JSON.parse(document.querySelector("script[type='application/json']").textContent);
const NS = "http://www.w3.org/2000/svg";
const INK = "#1f2328", SOFT = "#59636e", GRID = "#eceef0", FAINT = "#b4bac2";
const DASHES = {"": "", dash: "7 4", dot: "1.5 2.5", dashdot: "9 3 2 3"};
const NEAR = 26;  // pixels from the pointer to the point whose text is shown
const LETTER = 7;  // pixels of a letter, about

// ---- numbers
const SUPER = "⁰¹²³⁴⁵⁶⁷⁸⁹";
const raised = n => String(n).replace("-", "⁻").replace(/\d/g, d => SUPER[d]);
function power(v, digits) {
  if (v === 0) return "0";
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
function ticks(low, high, about) {
  const raw = (high - low) / Math.max(1, about), size = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find(m => m * size >= raw * 0.75) * size;
  const values = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++)
    values.push(Number((i * step).toPrecision(12)));
  return values;
}
function logTicks(low, high, about) {
  const from = Math.floor(Math.log10(low)), to = Math.ceil(Math.log10(high));
  const inside = values => values.filter(v => v >= low * (1 - 1e-9) && v <= high * (1 + 1e-9));
  if (to - from > about) {
    const every = Math.ceil((to - from) / about), values = [];
    for (let e = from; e <= to; e += every) values.push(10 ** e);
    return inside(values);
  }
  for (const some of [[1], [1, 3], [1, 2, 5], [1, 2, 3, 5, 7]]) {
    const values = [];
    for (let e = from; e <= to; e++) for (const m of some) values.push(m * 10 ** e);
    if (inside(values).length >= 3) return inside(values);
  }
  return ticks(low, high, about);
}
function ticksOf(axis, about) {
  const [low, high] = [Math.min(...axis.ends), Math.max(...axis.ends)];
  if (axis.ticks) return axis.ticks.filter(([v]) => v >= low && v <= high);
  const size = axis.size || 1;  // of a unit, such as 60 for minutes
  const values = axis.log ? logTicks(low, high, about) : ticks(low / size, high / size, about).map(v => v * size);
  return values.map(v => [v, textOf(axis, v)]);
}
function textOf(axis, v) {
  if (axis.percent) return Number((100 * v).toPrecision(4)) + "%";
  return axis.power ? power(v, 2) : short(v / (axis.size || 1), 3 + (Math.abs(v) >= 1));
}
function placeOf(axis, begin, end) {
  const to = axis.log ? Math.log : v => v, from = axis.log ? Math.exp : v => v;
  const [a, b] = axis.ends.map(to);
  const place = v => begin + (to(v) - a) / (b - a) * (end - begin);
  place.value = p => from(a + (p - begin) / (end - begin) * (b - a));
  return place;
}

// ---- drawing
function node(parent, name, of, text) {
  const made = document.createElementNS(NS, name);
  for (const [k, v] of Object.entries(of)) if (v !== "" && v !== undefined) made.setAttribute(k, v);
  if (text !== undefined) made.textContent = text;
  return parent.appendChild(made);
}
function path(points) {
  let d = "", open = false;
  for (const [x, y] of points) {
    if (x === null || y === null || !Number.isFinite(x) || !Number.isFinite(y)) { open = false; continue; }
    d += `${open ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
    open = true;
  }
  return d;
}
const star = [...Array(10).keys()].map(i => [Math.sin(i * Math.PI / 5), -Math.cos(i * Math.PI / 5)].map(v => v * (i % 2 ? 0.62 : 1.5)));
const SHAPES = {
  square: [[-.9, -.9], [.9, -.9], [.9, .9], [-.9, .9]], diamond: [[0, -1.25], [1.25, 0], [0, 1.25], [-1.25, 0]],
  triangle: [[0, -1.2], [1.1, .8], [-1.1, .8]], star,
  cross: [[-1, -.5], [-.5, -1], [0, -.5], [.5, -1], [1, -.5], [.5, 0], [1, .5], [.5, 1], [0, .5], [-.5, 1], [-1, .5], [-.5, 0]],
};
const shapeOf = (name, r) => SHAPES[name] ? path(SHAPES[name].map(([x, y]) => [x * r, y * r])) + "Z"
  : `M${r} 0A${r} ${r} 0 1 1 ${-r} 0A${r} ${r} 0 1 1 ${r} 0Z`;
const at = (list, i, other) => list && list.length ? list[list.length > 1 ? i : 0] : other;
function drawTrace(t, into, chart) {
  const {px, py} = chart.scale, colour = t.colours[0], many = t.x.map((_, i) => i);
  const known = (v, place) => v === null || v === undefined ? null : place(v);
  const points = many.map(i => [known(t.x[i], px), known(t.y[i], py)]);
  if (t.kind === "band") {
    const there = many.filter(i => t.y[i] !== null && t.high[i] !== null);
    const edge = [...there.map(i => [px(t.x[i]), py(t.high[i])]), ...there.reverse().map(i => [px(t.x[i]), py(t.y[i])])];
    node(into, "path", {d: there.length ? path(edge) + "Z" : "", fill: colour, stroke: t.width ? colour : "", "stroke-width": t.width || ""});
  } else if (t.kind === "bars") {
    const thick = Math.abs(py(1) - py(0)) * 0.65;
    many.forEach(i => node(into, "rect", {x: px(t.x[i]), width: Math.max(0, px(t.high[i]) - px(t.x[i])),
      y: py(t.y[i]) - thick / 2, height: thick, fill: colour}));
    many.forEach(i => { points[i][0] = (px(t.x[i]) + px(t.high[i])) / 2; });
  } else if (t.kind === "line") {
    node(into, "path", {d: path(points), fill: "none", stroke: colour, "stroke-width": t.width || 1.6, "stroke-dasharray": t.pattern || DASHES[t.dash || ""]});
    if (t.label && points.length) {
      const [x, y] = points[points.length >> 1];
      node(into, "text", {x, y: y + 4, fill: INK, "text-anchor": "middle", "font-size": 11, stroke: "#fff", "stroke-width": 3, "paint-order": "stroke"}, t.label);
    }
  } else {
    if (t.ends) node(into, "path", {stroke: colour, fill: "none", d: path([[-4, 0], [4, 0], [0, 0], [0, 1], [-4, 1], [4, 1]].map(([dx, end]) => [points[0][0] + dx, py(t.ends[end])]))});
    points.forEach(([x, y], i) => {
      if (x === null || y === null) return;
      const own = at(t.colours, i), hollow = at(t.hollow, i, false);
      node(into, "path", {d: shapeOf(at(t.shapes, i, "circle"), (t.size || 7) / 2), transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})`,
        fill: hollow ? "#ffffff00" : own, stroke: t.edge || own, "stroke-width": t.width ?? 1.4});
    });
  }
  if (t.texts) points.forEach(([x, y], i) => { if (t.texts[i] && x !== null && y !== null) chart.points.push({x, y, text: t.texts[i], dots: t.kind !== "line"}); });
}

class Chart {
  // spec: from the width to what is drawn, or to a sentence that says why nothing is
  constructor(host, label, spec) {
    Object.assign(this, {host, spec, label, zoomed: null, scale: null, points: []});
    this.svg = node(host, "svg", {role: "img", "aria-label": label, width: "100%"});
    this.readout = document.createElement("p");
    this.readout.className = "readout tip";
    const save = document.createElement("button");
    Object.assign(save, {type: "button", className: "save", textContent: "SVG", title: "save as SVG"});
    save.addEventListener("click", () => this.save());
    host.append(this.readout, save);
    this.follow();
  }
  draw() {
    const {host, svg} = this, width = host.clientWidth;
    svg.replaceChildren();
    this.scale = null;
    if (width < 100) return;  // not laid out yet: drawn again when it is
    const spec = this.spec(width), height = spec.height || 230;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("height", height);
    if (typeof spec === "string") {
      node(svg, "text", {x: 8, y: 40, fill: SOFT}, spec);
      return;
    }
    const across = this.zoomed ? {...spec.x, ends: this.zoomed} : spec.x, down = spec.y;
    const cut = (text, letters) => text.length > letters ? text.slice(0, letters - 1) + "…" : text;
    const rows = ticksOf(down, height / 45).map(([v, text]) => [v, cut(text, Math.max(8, width * 0.4 / LETTER))]);
    const left = 12 + LETTER * Math.max(1, ...rows.map(([, text]) => text.length)), right = 14;
    const columns = ticksOf(across, (width - left) / (across.log ? 50 : 110));
    const longest = Math.max(...columns.map(([, text]) => text.length), 0) * LETTER;
    const turned = across.ticks && columns.length * (longest + 10) > width - left;
    const top = spec.top || (down.title ? 26 : 8), bottom = 42 + (turned ? Math.min(110, longest * 0.55) : 0), foot = height - bottom;
    const px = placeOf(across, left, width - right), py = placeOf(down, foot, top);
    if (down.title) node(svg, "text", {x: 6, y: 14, fill: INK}, down.title);
    for (const [v, text] of rows) {
      if (down.grid !== false) node(svg, "line", {x1: left, x2: width - right, y1: py(v), y2: py(v), stroke: GRID});
      node(svg, "text", {x: left - 6, y: py(v) + 4, "text-anchor": "end", fill: INK}, text);
    }
    node(svg, "line", {x1: left, x2: width - right, y1: foot, y2: foot, stroke: FAINT});
    let free = -1e9;  // where the text before ends
    for (const [v, text] of columns) {
      const x = px(v), near = x > width - 30 && !turned ? "end" : "middle";
      if (across.grid !== false && spec.grid) node(svg, "line", {x1: x, x2: x, y1: top, y2: foot, stroke: GRID});
      node(svg, "line", {x1: x, x2: x, y1: foot, y2: foot + 4, stroke: FAINT});
      if (turned) node(svg, "text", {x, y: foot + 14, "text-anchor": "end", fill: INK, transform: `rotate(-35 ${x} ${foot + 14})`}, cut(text, 24));
      else if (x - text.length * LETTER / 2 > free) {
        node(svg, "text", {x: near === "end" ? width - 2 : x, y: foot + 17, "text-anchor": near, fill: INK}, text);
        free = x + text.length * LETTER / 2 + 4;
      }
    }
    node(svg, "text", {x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle", fill: SOFT}, across.title);
    if (across.zero) node(svg, "line", {x1: px(0), x2: px(0), y1: top, y2: foot, stroke: FAINT});
    if (down.zero) node(svg, "line", {x1: left, x2: width - right, y1: py(0), y2: py(0), stroke: FAINT});
    const clip = `clip-${host.id || host.dataset.panel}`;
    node(node(svg, "clipPath", {id: clip}), "rect", {x: left - 4, y: top, width: width - left - right + 8, height: foot - top + 4});
    const inside = node(svg, "g", {"clip-path": `url(#${clip})`, "stroke-linejoin": "round"});
    this.scale = {px, py, left, right: width - right, top, foot, across};
    this.points = [];
    if (spec.before) spec.before(this, inside);
    for (const trace of spec.traces) drawTrace(trace, inside, this);
    this.ring = node(svg, "circle", {r: 8, fill: "none", stroke: INK, visibility: "hidden"});
    this.cursor = node(svg, "line", {y1: top, y2: foot, stroke: SOFT, "stroke-dasharray": "2 2", visibility: "hidden"});
    this.brush = node(svg, "rect", {y: top, height: foot - top, fill: "#0b5cad22", visibility: "hidden"});
  }
  // The text of the nearest point, dots before lines.
  read(x, y) {
    const far = p => Math.hypot(p.x - x, p.y - y) + (p.dots ? 0 : 6);
    const best = this.points.reduce((a, b) => !a || far(b) < far(a) ? b : a, null), tip = this.readout;
    tip.replaceChildren();
    const near = best && far(best) < NEAR;
    this.ring.setAttribute("visibility", near ? "visible" : "hidden");
    if (!near) return;
    this.ring.setAttribute("cx", best.x);
    this.ring.setAttribute("cy", best.y);
    const [head, ...rest] = best.text.split("\n"), first = document.createElement("b");
    first.textContent = head;
    tip.append(first, rest.join("\n"));
    const wide = this.host.clientWidth, on = best.x > wide / 2;
    tip.style.left = on ? "" : `${best.x + 12}px`;
    tip.style.right = on ? `${wide - best.x + 12}px` : "";
    tip.style.top = `${Math.max(0, best.y - 12)}px`;
  }
  leave() {
    if (!this.scale) return;
    for (const one of [this.cursor, this.ring]) one.setAttribute("visibility", "hidden");
    if (this.readout.classList.contains("tip")) this.readout.replaceChildren();
  }
  zoom(range) { this.zoomed = range; this.draw(); }
  follow() {
    const {svg} = this;
    let from = null;
    const place = e => {
      const box = svg.getBoundingClientRect(), {left, right} = this.scale;
      return [Math.min(right, Math.max(left, e.clientX - box.left)), e.clientY - box.top];
    };
    svg.addEventListener("pointerdown", e => {
      if (!this.scale || e.button) return;
      from = place(e)[0];
      this.read(...place(e));
    });
    svg.addEventListener("pointermove", e => {
      if (!this.scale) return;
      const [x, y] = place(e);
      this.read(x, y);
      if (from === null || this.scale.across.ticks) return;
      svg.setPointerCapture(e.pointerId);
      this.brush.setAttribute("x", Math.min(from, x));
      this.brush.setAttribute("width", Math.abs(x - from));
      this.brush.setAttribute("visibility", Math.abs(x - from) > 8 ? "visible" : "hidden");
    });
    svg.addEventListener("pointerup", e => {
      if (from === null || !this.scale) return;
      const [x] = place(e), start = from, {px} = this.scale;
      from = null;
      this.brush.setAttribute("visibility", "hidden");
      if (Math.abs(x - start) >= 12 && !this.scale.across.ticks) this.zoom([Math.min(start, x), Math.max(start, x)].map(px.value));
    });
    svg.addEventListener("pointercancel", () => { from = null; });
    svg.addEventListener("pointerleave", () => this.leave());
    svg.addEventListener("dblclick", () => this.zoom(null));
  }
  save() {
    const copy = this.svg.cloneNode(true), link = document.createElement("a");
    for (const [k, v] of [["xmlns", NS], ["width", this.host.clientWidth], ["font-family", "sans-serif"], ["font-size", 12]]) copy.setAttribute(k, v);
    link.href = URL.createObjectURL(new Blob([new XMLSerializer().serializeToString(copy)], {type: "image/svg+xml"}));
    link.download = `${this.host.id || this.host.dataset.panel}.svg`;
    link.click();
  }
}

// Draws all charts when the page gets another width, and now.
function start(draw) {
  let wide = 0;
  new ResizeObserver(() => { if (document.body.clientWidth !== wide) { wide = document.body.clientWidth; draw(); } }).observe(document.body);
  draw();
  document.body.dataset.drawn = "yes";
}

const figures = [...document.querySelectorAll("[data-figure]")].map(host => {
  const figure = data.figures[host.dataset.figure];
  return new Chart(host, figure.y.title || figure.x.title, () => ({...figure, grid: true}));
});
if (figures.length) start(() => figures.forEach(chart => chart.draw()));
return {data, node, short, power, textOf, Chart, start};
})();
