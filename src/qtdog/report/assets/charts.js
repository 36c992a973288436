// Charts as SVG, from numbers in this page. A chart has names (rows of the table), each with a color and a shape that it
// keeps in every chart; names switch off and on, points answer to the pointer and to arrow keys.

const LEAST_RANGE = 10; // points of accuracy that an axis spans at least, so that noise is not blown up
const FIRST_SHOWN = 8; // of many lines, how many are drawn before a reader chooses

function drawLines(panel, spec, chart, shown, parts) {
  const series = spec.series.filter((one) => shown.has(one.name) && parts.has(one.part));
  panel.start(300);
  const box = { left: 44, right: panel.width - 12, top: 26, bottom: 252 };
  const points = series.flatMap((one) => one.points);
  if (!points.length) return;
  const x = scale(points.map((p) => p[0]), box.left + 6, box.right - 6, 0.01, panel.width > 420 ? 6 : 4);
  const y = scale(points.flatMap((p) => [p[2], p[3]]), box.bottom, box.top, 0.06, 6);
  panel.axes(x, y, chart.x, chart.y, box);
  for (const { x: value, text } of spec.marks) {
    element("line", { class: "mark", x1: x.at(value), x2: x.at(value), y1: box.top, y2: box.bottom }, panel.svg);
    if (spec.marks.length === 1) element("text", { x: x.at(value) + 5, y: box.top + 4 }, panel.svg, text);
  }
  for (const one of series) {
    const group = panel.group(one.name), dash = one.part === "source";
    const path = (at) => one.points.map((p, i) => `${i ? "L" : "M"}${x.at(p[0])},${y.at(p[at])}`).join("");
    if (one.points.some((p) => p[4] > 1)) {
      const back = [...one.points].reverse().map((p) => `L${x.at(p[0])},${y.at(p[2])}`).join("");
      element("path", { class: "band", d: `${path(3)}${back}z` }, group);
    }
    element("path", { class: dash ? "dash" : "line", d: path(1) }, group);
    for (const p of one.points) {
      const px = x.at(p[0]), py = y.at(p[1]);
      if (!dash) panel.dot(group, one.name, px, py, one.points.length > 30 ? 2.2 : 3.4);
      const spread = p[4] > 1 ? ` (${number(p[2])} to ${number(p[3])}, ${p[4]} runs)` : "";
      panel.spots.push({ px, py, name: one.name, lines: [`${dash ? "sources" : "unseen domain"}: ${number(p[1])} %${spread}`, `${chart.x}: ${p[0].toLocaleString("en")}`] });
    }
  }
}

// What no other point beats in both; costs that agree in three digits are alike.
function front(points) {
  const cost = (point) => Number(point.x.toPrecision(3));
  const sorted = [...points].sort((a, b) => cost(a) - cost(b) || b.y - a.y);
  const kept = [];
  for (const point of sorted) if (!kept.length || point.y > kept[kept.length - 1].y) kept.push(point);
  return kept;
}

function drawPoints(panel, points, chart) {
  panel.start(360);
  const box = { left: 44, right: panel.width - 16, top: 26, bottom: 312 };
  if (!points.length) return;
  const x = scale([0, ...points.map((p) => p.x)], box.left + 6, box.right - 6, 0.03, panel.width > 520 ? 8 : 5);
  x.ticks = x.ticks.filter((value) => value >= 0);
  const y = scale(points.flatMap((p) => [p.y - (p.e || 0), p.y + (p.e || 0)]), box.bottom, box.top, 0.1, 6, LEAST_RANGE);
  panel.axes(x, y, chart.x, chart.y, box);
  const best = front(points);
  const steps = best.map((p, i) => (i ? `H${x.at(p.x)}V${y.at(p.y)}` : `M${x.at(p.x)},${y.at(p.y)}`)).join("");
  element("path", { class: "front", d: `${steps}H${box.right}` }, panel.svg);
  for (const p of points) {
    const group = panel.group(p.name), px = x.at(p.x), py = y.at(p.y);
    if (p.e) element("path", { class: "error", d: `M${px},${y.at(p.y - p.e)}V${y.at(p.y + p.e)}` }, group);
    panel.dot(group, p.name, px, py, 5);
    const accuracy = `${number(p.y)}${p.e ? ` ± ${number(p.e)}` : ""} %`;
    panel.spots.push({ px, py, name: p.name, lines: [accuracy, `${chart.x}: ${number(p.x)}`, ...(best.includes(p) ? ["nothing beats it in both"] : [])] });
  }
  for (const p of best) {
    const px = x.at(p.x), late = px > panel.width * 0.6;
    element("text", { class: "name", x: px + (late ? -9 : 9), y: y.at(p.y) - 9, "text-anchor": late ? "end" : "start" }, panel.svg, p.name);
  }
}

function drawDots(panel, rows, chart) {
  const sorted = [...rows].sort((a, b) => b.y - a.y);
  const narrow = panel.svg.parentElement.clientWidth < 620, step = narrow ? 36 : 24;
  panel.start(sorted.length * step + 62);
  const longest = Math.max(0, ...sorted.map((row) => row.name.length));
  const left = narrow ? 10 : Math.min(panel.width * 0.42, longest * 7.2 + 14);
  const box = { left, right: panel.width - 14, top: 8, bottom: sorted.length * step + 18 };
  if (!sorted.length) return;
  const values = sorted.flatMap((row) => [row.y - (row.e || 0), row.y + (row.e || 0), ...Object.values(row.domains)]).filter((v) => v !== null);
  const x = scale(values, box.left + 8, box.right - 8, 0.04, panel.width > 620 ? 8 : 5, LEAST_RANGE);
  for (const value of x.ticks) {
    element("line", { class: "grid", x1: x.at(value), x2: x.at(value), y1: box.top, y2: box.bottom }, panel.svg);
    element("text", { x: x.at(value), y: box.bottom + 17, "text-anchor": "middle" }, panel.svg, number(value));
  }
  element("text", { x: box.right, y: box.bottom + 36, "text-anchor": "end" }, panel.svg, chart.x);
  sorted.forEach((row, i) => {
    const group = panel.group(row.name), py = box.top + i * step + step * (narrow ? 0.72 : 0.5);
    const limit = Math.floor(narrow ? panel.width / 6.6 : left / 6.6), name = row.name.length > limit ? `${row.name.slice(0, limit - 1)}…` : row.name;
    const at = narrow ? { x: box.left, y: py - 10 } : { x: box.left - 6, y: py + 4, "text-anchor": "end" };
    const label = element("text", { class: "name", ...at }, group, name);
    element("title", {}, label, row.name);
    const domains = Object.entries(row.domains).filter(([, value]) => value !== null);
    if (domains.length > 1) {
      const found = domains.map(([, value]) => x.at(value));
      element("path", { class: "small", d: `M${Math.min(...found)},${py}H${Math.max(...found)}` }, group);
      for (const px of found) element("circle", { class: "small", cx: px, cy: py, r: 2.6 }, group);
    }
    if (row.e) element("path", { class: "error", d: `M${x.at(row.y - row.e)},${py}H${x.at(row.y + row.e)}` }, group);
    panel.dot(group, row.name, x.at(row.y), py, 5);
    const lines = [`${number(row.y)}${row.e ? ` ± ${number(row.e)}` : ""} %`, ...(domains.length > 1 ? domains.map(([key, value]) => `${key}: ${number(value)}`) : [])];
    panel.spots.push({ px: x.at(row.y), py, name: row.name, lines });
  });
}

// Name buttons: `toggle(name)` after a press, `over(name or null)` while the pointer or the focus is on one
function nameButtons(parent, chart, shown, change, over) {
  const list = element("div", { class: "names", role: "group", "aria-label": `Show in the chart: ${chart.title}` }, parent);
  const buttons = new Map();
  const update = () => {
    for (const [name, button] of buttons) button.setAttribute("aria-pressed", String(shown.has(name)));
    change();
  };
  for (const name of chart.used) {
    const index = chart.names.indexOf(name);
    const button = element("button", { type: "button", "aria-pressed": "true", "data-name": name }, list);
    const icon = element("svg", { viewBox: "-8 -8 16 16", "aria-hidden": "true", class: `series ${color(index)}` }, button);
    element("path", { class: "dot", d: shape(index, 5) }, element("g", { class: `series ${color(index)}` }, icon));
    button.append(name);
    button.addEventListener("click", () => { if (!shown.delete(name)) shown.add(name); update(); });
    for (const event of ["pointerenter", "focus"]) button.addEventListener(event, () => over(shown.has(name) ? name : null));
    for (const event of ["pointerleave", "blur"]) button.addEventListener(event, () => over(null));
    buttons.set(name, button);
  }
  if (chart.used.length > 2) {
    for (const [text, names] of [["all", chart.used], ["none", []]]) {
      const button = element("button", { type: "button", class: "plain" }, list, text);
      button.addEventListener("click", () => { shown.clear(); names.forEach((name) => shown.add(name)); update(); });
    }
  }
  return update;
}

function dataTable(parent, head, rows, title, id) {
  const details = element("details", {}, parent);
  element("summary", {}, details, "Numbers of this chart");
  const make = () => {
    details.querySelector(".scroll")?.remove();
    const scroll = element("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": title }, details);
    const table = element("table", { class: "data", id }, scroll);
    element("caption", {}, table, title);
    const top = element("tr", {}, element("thead", {}, table));
    const numeric = head.map((_, i) => rows().every((row) => typeof row[i] !== "string"));
    head.forEach((name, i) => {
      const cell = element("th", { scope: "col", ...(numeric[i] ? { class: "number" } : {}) }, top);
      element("button", { type: "button", "data-sort": i }, cell, name);
    });
    const body = element("tbody", {}, table);
    for (const row of rows()) {
      const line = element("tr", {}, body);
      row.forEach((value, i) => {
        const about = { ...(numeric[i] ? { class: "number" } : {}), ...(value === null ? {} : { "data-v": value }) };
        element(i ? "td" : "th", i ? about : { ...about, scope: "row" }, line, typeof value === "string" ? value : number(value));
      });
    }
    wireTables(scroll);
  };
  details.addEventListener("toggle", () => { if (details.open) make(); });
  return () => { if (details.open) make(); };
}

function makeLines(root, chart) {
  chart.used = chart.names.filter((name) => chart.panels.some((panel) => panel.series.some((one) => one.name === name)));
  const best = (name) => Math.max(...chart.panels.flatMap((p) => p.series.filter((s) => s.name === name && s.part === "target").flatMap((s) => s.points.slice(-1).map((q) => q[1]))));
  const few = chart.used.length <= FIRST_SHOWN ? chart.used : [...chart.used].sort((a, b) => best(b) - best(a)).slice(0, FIRST_SHOWN);
  const shown = new Set(few), parts = new Set(["target", "source"]), panels = [];
  const draw = () => panels.forEach(([panel, spec]) => drawLines(panel, spec, chart, shown, parts));
  const update = nameButtons(root, chart, shown, draw, (name) => panels.forEach(([panel]) => panel.highlight(name)));
  const kinds = element("div", { class: "names", role: "group", "aria-label": "Measured on" }, root);
  for (const [part, text] of [["target", "unseen domain (solid)"], ["source", "sources (dashed)"]]) {
    const button = element("button", { type: "button", "aria-pressed": "true", "data-part": part }, kinds, text);
    button.addEventListener("click", () => {
      if (!parts.delete(part)) parts.add(part);
      button.setAttribute("aria-pressed", String(parts.has(part)));
      draw();
    });
  }
  if (few.length < chart.used.length) element("p", { class: "legend-text" }, root, `Drawn at first: the ${few.length} of ${chart.used.length} methods that end highest. The names switch the others on.`);
  const grid = element("div", { class: chart.panels.length % 3 ? "panels two" : "panels" }, root);
  for (const spec of chart.panels) {
    const box = element("div", {}, grid);
    element("h3", {}, box, `unseen: ${spec.title}`);
    panels.push([new Panel(box, `${chart.title}, unseen domain ${spec.title}. Arrow keys move from point to point; the numbers are in the table below.`, chart.names), spec]);
  }
  const head = ["method", "unseen", "measured on", chart.x, "mean (%)", "lowest", "highest", "runs"];
  const rows = () => chart.panels.flatMap((p) => p.series.flatMap((s) => s.points.map((q) => [s.name, p.title, s.part === "source" ? "sources" : "unseen domain", ...q])));
  dataTable(root, head, rows, `Numbers of: ${chart.title}`, `${chart.id}-data`);
  update();
  return { draw, select() {} };
}

function makeSets(root, chart) {
  const all = Object.values(chart.sets).flat();
  chart.used = chart.names.filter((name) => all.some((one) => one.name === name));
  const shown = new Set(chart.used);
  let selection = Object.keys(chart.sets)[0], panel = null;
  const drawOne = chart.kind === "dots" ? drawDots : drawPoints;
  const draw = () => drawOne(panel, (chart.sets[selection] || []).filter((one) => shown.has(one.name)), chart);
  const update = chart.kind === "dots" ? () => draw() // its names stand in the chart
    : nameButtons(root, chart, shown, () => draw(), (name) => panel.highlight(name));
  panel = new Panel(element("div", {}, root), `${chart.title}. Arrow keys move from point to point; the numbers are in the table below.`, chart.names);
  const domains = [...new Set(all.flatMap((one) => Object.keys(one.domains || {})))];
  const head = ["method", ...(chart.kind === "points" ? [chart.x] : domains), "accuracy (%)", "± standard error"];
  const rows = () => (chart.sets[selection] || []).map((one) => [one.name, ...(chart.kind === "points" ? [one.x] : domains.map((d) => one.domains[d] ?? null)), one.y, one.e]);
  const renew = dataTable(root, head, rows, `Numbers of: ${chart.title}`, `${chart.id}-data`);
  update();
  return { draw, select(name) { selection = name; draw(); renew(); } };
}

(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const made = [...document.querySelectorAll("[data-chart]")].map((root) => {
    const chart = charts[root.dataset.chart];
    return (chart.kind === "lines" ? makeLines : makeSets)(root, chart);
  });
  wireTables(document);
  wireScheme();
  wireSwitch((selection) => made.forEach((one) => one.select(selection)));
  let width = document.documentElement.clientWidth, waiting = 0;
  window.addEventListener("resize", () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(() => {
      if (document.documentElement.clientWidth === width) return;
      width = document.documentElement.clientWidth;
      made.forEach((one) => one.draw());
    });
  });
})();
