// A panel: an SVG with axes, points that answer to the pointer and to arrow keys, and groups of one name each.

const SVG = "http://www.w3.org/2000/svg";
const COLORS = 10;
const SHAPES = [
  (r) => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0`,
  (r) => `M${-r * 0.9},${-r * 0.9}h${r * 1.8}v${r * 1.8}h${-r * 1.8}z`,
  (r) => `M0,${-r * 1.2}L${r * 1.1},${r * 0.8}H${-r * 1.1}z`,
  (r) => `M0,${-r * 1.3}L${r * 1.3},0L0,${r * 1.3}L${-r * 1.3},0z`,
  (r) => `M0,${r * 1.2}L${r * 1.1},${-r * 0.8}H${-r * 1.1}z`,
  (r) => `M${-r * 0.4},${-r * 1.2}h${r * 0.8}v${r * 0.8}h${r * 0.8}v${r * 0.8}h${-r * 0.8}v${r * 0.8}h${-r * 0.8}v${-r * 0.8}h${-r * 0.8}v${-r * 0.8}h${r * 0.8}z`,
];

function element(tag, attributes = {}, parent = null, text = null) {
  const made = ["svg", "g", "path", "line", "text", "circle", "title"].includes(tag)
    ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

const shape = (index, r) => SHAPES[(index + Math.floor(index / COLORS)) % SHAPES.length](r);
const color = (index) => `s${index % COLORS}`;
const number = (value) => (value === null || value === undefined ? "–" : String(Math.round(value * 100) / 100));

function ticks(low, high, wanted) {
  const raw = (high - low) / wanted || 1;
  const base = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((f) => f * base).find((s) => s >= raw * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
  return found;
}

function scale(values, from, to, pad, wanted, least = 0) {
  let low = Math.min(...values), high = Math.max(...values);
  const lacking = Math.max(0, least - (high - low)) / 2;
  low -= lacking; high += lacking;
  const room = (high - low || Math.abs(high) || 1) * pad;
  low -= room; high += room;
  const at = (value) => from + ((value - low) / (high - low)) * (to - from);
  return { at, ticks: ticks(low, high, wanted) };
}

// A drawn panel: `spots` are the points that can be picked, [{px, py, name, lines: [text, …]}, …]
class Panel {
  constructor(parent, label, names) {
    this.names = names;
    this.svg = element("svg", { role: "img", tabindex: "0", "aria-label": label }, parent);
    this.spots = [];
    this.current = -1;
    this.svg.addEventListener("pointermove", (event) => this.hover(event));
    this.svg.addEventListener("pointerleave", () => this.clear());
    this.svg.addEventListener("blur", () => this.clear());
    this.svg.addEventListener("keydown", (event) => this.key(event));
  }

  start(height) {
    this.width = Math.max(280, this.svg.parentElement.clientWidth);
    this.height = height;
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${height}`);
    this.svg.replaceChildren();
    this.spots = [];
    this.current = -1;
  }

  axes(x, y, xLabel, yLabel, box) {
    const { left, right, top, bottom } = box;
    for (const value of y.ticks) {
      element("line", { class: "grid", x1: left, x2: right, y1: y.at(value), y2: y.at(value) }, this.svg);
      element("text", { x: left - 7, y: y.at(value) + 4, "text-anchor": "end" }, this.svg, number(value));
    }
    for (const value of x.ticks) {
      element("line", { class: "axis", x1: x.at(value), x2: x.at(value), y1: bottom, y2: bottom + 4 }, this.svg);
      element("text", { x: x.at(value), y: bottom + 17, "text-anchor": "middle" }, this.svg, value.toLocaleString("en"));
    }
    element("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }, this.svg);
    element("text", { x: right, y: bottom + 34, "text-anchor": "end" }, this.svg, xLabel);
    element("text", { x: left - 34, y: top - 8 }, this.svg, yLabel);
  }

  group(name) {
    return element("g", { class: `series ${color(this.names.indexOf(name))}`, "data-name": name }, this.svg);
  }

  dot(parent, name, px, py, r, kind = "dot") {
    element("path", { class: kind, d: shape(this.names.indexOf(name), r), transform: `translate(${px},${py})` }, parent);
  }

  hover(event) {
    const frame = this.svg.getBoundingClientRect(), zoom = this.width / frame.width;
    const mx = (event.clientX - frame.left) * zoom, my = (event.clientY - frame.top) * zoom;
    let best = -1, least = 30 ** 2;
    this.spots.forEach((spot, i) => {
      const distance = (spot.px - mx) ** 2 + (spot.py - my) ** 2;
      if (distance < least) { least = distance; best = i; }
    });
    if (best < 0) this.clear(); else this.pick(best);
  }

  key(event) {
    const n = this.spots.length;
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") this.clear();
    if (!step || !n) return;
    event.preventDefault();
    this.pick(this.current < 0 ? (step > 0 ? 0 : n - 1) : (this.current + step + n) % n);
    const spot = this.spots[this.current];
    document.getElementById("live").textContent = [spot.name, ...spot.lines].join(", ");
  }

  pick(index) {
    this.current = index;
    const spot = this.spots[index], tip = document.getElementById("tip");
    this.highlight(spot.name);
    this.svg.querySelector(".ring")?.remove();
    element("circle", { class: "ring", cx: spot.px, cy: spot.py, r: 8 }, this.svg);
    tip.replaceChildren(element("b", {}, null, spot.name));
    for (const line of spot.lines) element("div", {}, tip, line);
    tip.hidden = false;
    const frame = this.svg.getBoundingClientRect(), zoom = frame.width / this.width;
    const px = frame.left + spot.px * zoom, py = frame.top + spot.py * zoom;
    const left = Math.min(Math.max(8, px + 14), Math.max(8, document.documentElement.clientWidth - tip.offsetWidth - 8));
    const above = py - tip.offsetHeight - 12;
    tip.style.left = `${left + window.scrollX}px`;
    tip.style.top = `${(above > 4 ? above : py + 16) + window.scrollY}px`;
  }

  highlight(name) {
    this.svg.classList.toggle("pick", name !== null);
    for (const group of this.svg.querySelectorAll(".series")) group.classList.toggle("on", group.dataset.name === name);
  }

  clear() {
    this.current = -1;
    this.highlight(null);
    this.svg.querySelector(".ring")?.remove();
    document.getElementById("tip").hidden = true;
  }
}
