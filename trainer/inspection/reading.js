// The page of a reading: losses, the logit lens, maps, ablation and traces.
"use strict";
(() => {
const D = kit.data, L = D.tokens.length;
const $ = id => document.getElementById(id);
const make = (tag, options = {}, ...inside) => { const e = Object.assign(document.createElement(tag), options); e.append(...inside); return e; };
const mix = (rgb, t) => `rgb(${rgb.map(c => Math.round(255 + (c - 255) * Math.min(1, Math.max(0, t)))).join(",")})`;
const BLUE = [11, 61, 102], ORANGE = [194, 65, 12];
const number = (x, digits = 3) => x.toFixed(digits);

// Losses
const worst = Math.max(...D.losses.filter(x => x !== null), 1e-9);
D.tokens.forEach((token, i) => {
  const text = D.texts[i].replaceAll("\n", "↵\n");
  const button = make("button", {type: "button", textContent: text});
  if (D.losses[i] !== null) {
    const share = D.losses[i] / worst;
    button.style.background = mix(ORANGE, share * .85);
    if (share > .75) button.style.color = "#fff";
  } else button.style.color = "#59636e";
  button.setAttribute("aria-pressed", "false");
  const choose = () => {
    document.querySelectorAll(".text button").forEach(b => b.setAttribute("aria-pressed", String(b === button)));
    const before = i ? D.best[i - 1].map(([t, p]) => `${t} ${number(p)}`).join("   ") : "";
    $("expected").replaceChildren(
      make("div", {}, i ? `${i}: ${token}   ${number(D.losses[i])} nats, probability ${number(Math.exp(-D.losses[i]))}` : "The token that begins a document; it is read, and not predicted."),
      make("div", {className: "cell"}, i ? `expected: ${before}` : ""));
  };
  button.addEventListener("click", choose); button.addEventListener("mouseenter", choose); button.addEventListener("focus", choose);
  $("text").append(button);
});
$("expected").textContent = "Choose a token.";

// Logit lens
const table = $("lens-table");
[...D.lens.keys()].reverse().forEach(n => {
  const row = make("tr", {}, make("th", {textContent: n ? `block ${n - 1}` : "embedding"}));
  D.lens[n].forEach(([token, p, follows, entropy], i) => {
    const t = follows === null ? 0 : follows, cell = make("td", {textContent: token});
    cell.style.background = mix(BLUE, t * .9); if (t > .5) cell.style.color = "#fff";
    cell.title = `after ${D.tokens[i]}: ${token} ${number(p)}` + (follows === null ? "" : `; ${D.tokens[i + 1]} ${number(follows)}`) + `; entropy ${number(entropy, 2)} bits`;
    row.append(cell);
  });
  table.append(row);
});
table.append(make("tr", {}, make("th", {textContent: "follows"}), ...D.tokens.map((_, i) => make("td", {textContent: i + 1 < L ? D.tokens[i + 1] : ""}))));

// Maps
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const draw = (canvas, values, width, height, rgb = BLUE) => {
  canvas.width = width; canvas.height = height;
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  values.forEach((v, i) => { const t = Math.sqrt(v);  // faint weights are seen too
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = 255 + (rgb[c] - 255) * t;
    image.data[4 * i + 3] = 255; });
  context.putImageData(image, 0, 0);
};
let chosen = null;
const show = (layer, head, values, button) => {
  chosen = values;
  document.querySelectorAll(".heads button").forEach(b => b.setAttribute("aria-pressed", String(b === button)));
  draw($("big"), [...values].map(v => v / 255), L, L);
  const facts = D.layers[layer].heads[head];
  $("big-title").textContent = facts ? `Layer ${layer}, head ${head}` : `Layer ${layer}: ${D.layers[layer].mixer}`;
  $("big-numbers").textContent = facts ? `entropy ${number(facts.entropy, 2)} bits; reads ${number(facts.distance, 1)} tokens back; token before ${number(facts.previous)}, first token ${number(facts.first)}, induction ${number(facts.induction)}; loss without it ${D.ablation.heads[layer][head] >= 0 ? "+" : ""}${number(D.ablation.heads[layer][head], 4)}` : "";
  $("big-say").textContent = "Point at the map.";
};
// First shown: an induction head, else the head that the loss needs most.
const weigh = (l, h) => D.layers[l].heads[h] ? D.ablation.heads[l][h] + (D.layers[l].heads[h].marked ? 1e3 : 0) : -1e3;
let [bestLayer, bestHead] = [0, 0];
D.layers.forEach((layer, l) => layer.maps.forEach((_, h) => { if (weigh(l, h) > weigh(bestLayer, bestHead)) [bestLayer, bestHead] = [l, h]; }));
D.layers.forEach((layer, l) => {
  $("layers").append(make("h3", {textContent: `Layer ${l}: ${layer.mixer}`}));
  const row = make("div", {className: "heads"});
  layer.maps.forEach((text, h) => {
    const values = bytes(text), canvas = make("canvas", {className: "drawn"}), head = layer.heads[h];
    const label = head ? (head.marked ? `head ${h} induction` : `head ${h}`) : "influence";
    const button = make("button", {type: "button", className: head && head.marked ? "marked" : ""}, canvas, label);
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => show(l, h, values, button));
    draw(canvas, [...values].map(v => v / 255), L, L);
    row.append(button);
    if (l === bestLayer && h === bestHead) show(l, h, values, button);
  });
  $("layers").append(row);
});
const place = (event, canvas, columns, rows) => {
  const box = canvas.getBoundingClientRect();
  return [Math.min(columns - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * columns))), Math.min(rows - 1, Math.max(0, Math.floor((event.clientY - box.top) / box.height * rows)))];
};
const pointed = event => {
  const [x, y] = place(event, $("big"), L, L), row = chosen.subarray(y * L, y * L + L);
  const most = [...row.keys()].sort((a, b) => row[b] - row[a]).slice(0, 4).filter(j => row[j]);
  $("big-say").replaceChildren(make("div", {}, `${y}: ${D.tokens[y]} reads ${x}: ${D.tokens[x]} with ${number(row[x] / 255)}`), make("div", {className: "cell"}, "most: " + most.map(j => `${D.tokens[j]} ${number(row[j] / 255, 2)}`).join("   ")));
};
$("big").addEventListener("mousemove", pointed); $("big").addEventListener("click", pointed);

// Ablation
const A = D.ablation, every = [...A.heads.flat(), ...A.mixers, ...A.mlps].filter(x => x !== null), largest = Math.max(...every.map(Math.abs), 1e-9);
const most = Math.max(...A.heads.map(h => h.length));
const cell = x => { if (x === undefined || x === null) return make("td"); const td = make("td", {textContent: (x >= 0 ? "+" : "") + number(x)}), t = Math.sqrt(Math.abs(x) / largest); td.style.background = mix(x >= 0 ? ORANGE : BLUE, t * .85); if (t > .75) td.style.color = "#fff"; return td; };
$("ablation-table").append(make("tr", {}, make("th"), ...["mixer", "MLP", ...Array.from({length: most}, (_, h) => `head ${h}`)].map(textContent => make("th", {textContent}))));
D.layers.forEach((layer, l) => $("ablation-table").append(make("tr", {}, make("th", {textContent: `layer ${l}`}), cell(A.mixers[l]), cell(A.mlps[l]), ...Array.from({length: most}, (_, h) => cell(A.heads[l][h])))));

// Trace
if (D.trace) {
  const T = D.trace, low = Math.min(T.corrupted, T.clean), high = Math.max(T.clean, ...T.places.flatMap(p => T.restored[p].flat()));
  const names = {stream: "The residual stream", mixer: "What the mixer adds", mlp: "What the MLP adds"};
  T.places.forEach(name => {
    const rows = [...T.restored[name]].reverse(), canvas = make("canvas", {className: "map drawn"});
    draw(canvas, rows.flat().map(p => Math.max(0, (p - low) / (high - low || 1))), L, rows.length);
    canvas.style.height = `${Math.max(60, 18 * rows.length)}px`;
    const say = event => { const [x, y] = place(event, canvas, L, rows.length); $("trace-say").textContent = `${names[name]}, layer ${rows.length - 1 - y}, at ${x}: ${D.tokens[x]}${x >= T.first && x < T.end ? " (subject)" : ""}: ${number(rows[y][x])}`; };
    canvas.addEventListener("mousemove", say); canvas.addEventListener("click", say);
    $("traces").append(make("figure", {style: "margin:.4rem 0"}, make("h3", {textContent: names[name]}), canvas));
  });
  $("trace-say").textContent = "Point at a cell.";
}
})();
