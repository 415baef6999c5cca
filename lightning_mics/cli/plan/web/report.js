"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const GIB = 2 ** 30;
const KINDS = {
  forward: "forward", backward: "backward", step: "optimizer", gather: "gather", reduce: "reduce-scatter",
  replicate: "all-reduce between replicas",
};
const state = { chosen: 0, sort: "rank", descending: false };

// Elements and numbers.

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name === "colour") node.style.setProperty("--colour", `var(--${value}, var(--other))`);
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
const find = (selector) => document.querySelector(selector);

function number(value) {
  if (value === null || value === undefined) return "\u2013";
  if (value === 0) return "0";
  const digits = Math.max(0, 2 - Math.floor(Math.log10(Math.abs(value))));
  return value.toLocaleString("en-US", { minimumFractionDigits: Math.min(digits, 6), maximumFractionDigits: Math.min(digits, 6) });
}

function bytes(value) {
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (Math.abs(value) < 1024) return `${value.toFixed(unit === "B" ? 0 : 1)} ${unit}`;
    value /= 1024;
  }
  return `${value.toFixed(1)} TiB`;
}

const duration = (seconds) => (seconds < 1 ? `${number(seconds * 1e3)} ms` : `${number(seconds)} s`);
const percent = (share, digits = 0) => (share === null ? "\u2013" : `${(100 * share).toFixed(digits)}%`);
const several = data.nodes > 1;
const name = (row) => (row.scheme === "mics" ? `${row.label}, ${row.settings}` : row.label);

// The ranked table: what a column shows, and what it sorts by.

const under = (rate) => (row) => row.by_rate[rate] ?? null;
const COLUMNS = [
  { key: "rank", head: "#", value: (row) => row.rank, show: (row) => row.rank ?? "", roomy: true },
  { key: "shard_size", head: "plan", word: true, value: (row) => row.shard_size },
  { key: "memory", head: "GiB a rank", value: (row) => row.total, show: (row) => (row.total / GIB).toFixed(1) },
  { key: "seconds", head: "step s", value: (row) => row.seconds, show: (row) => number(row.seconds), timed: true },
  { key: "speed", head: "samples/s", value: (row) => row.samples_per_second, show: (row) => number(row.samples_per_second), roomy: true, timed: true },
  { key: "mfu", head: "MFU", value: (row) => row.mfu, show: (row) => percent(row.mfu, 1), roomy: true, timed: true },
  { key: "waits", head: "waits", value: (row) => row.waiting, show: (row) => percent(row.waiting, 1), roomy: true, timed: true },
  { key: "sent", head: "out of a node", value: (row) => row.inter_bytes, show: (row) => bytes(row.inter_bytes), roomy: true },
  ...(several ? data.shown_rates : []).map((rate, place) => ({
    key: `links-${rate}`, head: `links at ${100 * rate}%`, value: under(rate), show: (row) => number(under(rate)(row)), timed: true, roomy: place === 0,
  })),
  { key: "without", head: "no over\u00adlap", value: (row) => row.without_overlap, show: (row) => number(row.without_overlap), timed: true },
];

function planCell(row) {
  const text = row.scheme === "mics" ? row.settings : row.fits ? "for comparison" : "does not fit";
  return el("td", { class: "word" }, row.label, el("small", { class: row.fits ? null : "no" }, text));
}

function tableRow(row) {
  const index = data.rows.indexOf(row);
  const cells = COLUMNS.map((column) => {
    if (column.key === "shard_size") return planCell(row);
    return el("td", { class: column.roomy ? "roomy" : null }, column.timed && !row.fits ? "\u2013" : String(column.show(row)));
  });
  const keys = (event) => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    choose(index);
  };
  const selected = String(index === state.chosen);
  return el("tr", { tabindex: 0, "aria-selected": selected, "data-row": index, onclick: () => choose(index), onkeydown: keys }, ...cells);
}

function drawTable() {
  const column = COLUMNS.find((entry) => entry.key === state.sort);
  const sign = state.descending ? -1 : 1;
  const last = state.descending ? -Infinity : Infinity;
  const by = (row) => (column.timed && !row.fits ? last : column.value(row) ?? last);
  const compare = (one, other) => sign * (by(one) - by(other)) || data.rows.indexOf(one) - data.rows.indexOf(other);
  const heads = COLUMNS.map((entry) => {
    const sorted = entry.key !== state.sort ? "none" : state.descending ? "descending" : "ascending";
    const button = el("button", { type: "button", onclick: () => sortBy(entry.key) }, entry.head);
    return el("th", { scope: "col", "aria-sort": sorted, "data-key": entry.key, class: [entry.word ? "word" : "", entry.roomy ? "roomy" : ""].join(" ") }, button);
  });
  find("#ranking thead").replaceChildren(el("tr", null, ...heads));
  const ours = data.rows.filter((row) => row.scheme === "mics").sort(compare);
  const others = data.rows.filter((row) => row.scheme !== "mics").sort(compare);
  find("#ranking tbody").replaceChildren(...ours.map(tableRow));
  find("#ranking .others").replaceChildren(...others.map(tableRow));
}

function sortBy(key) {
  state.descending = state.sort === key ? !state.descending : false;
  state.sort = key;
  drawTable();
  find(`#ranking th[data-key="${key}"] button`).focus();
}

function choose(index) {
  state.chosen = index;
  for (const row of document.querySelectorAll("#ranking tbody tr")) {
    row.setAttribute("aria-selected", String(Number(row.dataset.row) === index));
  }
  drawFigures();
  drawCommands();
}

// Figures.

function caption(id, title, about) {
  find(`#${id} figcaption`).replaceChildren(title, el("small", null, about));
}

function place(id, height, paint) {
  const host = find(`#${id} .drawing`);
  const width = Math.max(240, Math.round(host.clientWidth) || 640);
  const picture = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": find(`#${id} figcaption`).textContent });
  host.replaceChildren(picture);
  paint(picture, width);
}

function legend(id, entries, at) {
  const items = entries.map(({ colour, label, value }) =>
    el("li", { colour }, el("i", null), el("span", null, label), value === undefined ? null : el("b", null, value)));
  find(`#${id} .legend`).replaceChildren(...(at ? [el("li", { class: "at" }, at)] : []), ...items);
}

function timeline(row) {
  const lanes = Object.entries(row.timeline.lanes).filter(([, events]) => events.length);
  const span = row.timeline.seconds;
  const whole = row.accumulation === 1 ? "the step" : `the last of ${row.accumulation} microsteps`;
  caption("timeline", `A step ${row.fits ? "takes" : "would take"} ${duration(row.seconds)}; compute waits for ${percent(row.waiting + row.idle, 1)} of it`,
    `${row.host} ${whole[0].toUpperCase()}${whole.slice(1)}, with the optimizer: ${duration(span)}`);
  place("timeline", 34 * lanes.length + 24, (picture, width) => {
    const left = 74, scale = (width - left) / data.ticks;
    lanes.forEach(([lane, events], index) => {
      const top = 34 * index;
      picture.append(draw("text", { x: 0, y: top + 19 }, lane));
      picture.append(draw("rect", { x: left, y: top + 2, width: width - left, height: 26, class: lane === "compute" ? "waits" : "track" }));
      for (const [kind, start, end] of events) {
        const told = `${KINDS[kind]}: ${duration(((end - start) * span) / data.ticks)} from ${duration((start * span) / data.ticks)}`;
        const box = { x: left + start * scale, y: top + 2, width: Math.max(0.4, (end - start) * scale - (events.length < 120 ? 0.5 : 0)), height: 26 };
        picture.append(draw("rect", { ...box, class: "bar", colour: kind }, draw("title", null, told)));
      }
    });
    const bottom = 34 * lanes.length + 14;
    picture.append(draw("text", { x: left, y: bottom }, "0"), draw("text", { x: width, y: bottom, "text-anchor": "end" }, duration(span)));
  });
  const kinds = new Set(lanes.flatMap(([, events]) => events.map(([kind]) => kind)));
  const waited = [[row.waiting, "communication"], [row.idle, "the host"]].filter(([share]) => share >= 5e-4);
  const waits = waited.map(([share, what]) => ({ colour: "wait", label: `compute waits for ${what}`, value: percent(share, 1) }));
  legend("timeline", [...[...kinds].map((kind) => ({ colour: kind, label: KINDS[kind] })), ...waits]);
}

function memory(row) {
  const best = data.rows[0], bars = row === best ? [row] : [row, best];
  const parts = Object.entries(row.memory).filter(([, size]) => size > 0);
  const free = data.limit - row.total;
  caption("memory", `A rank needs ${bytes(row.total)} of ${bytes(data.limit)}`,
    free >= 0 ? `${bytes(free)} stay free, ${percent(free / data.limit)}` : `${bytes(-free)} too much`);
  const most = Math.max(data.limit, ...bars.map((bar) => bar.total));
  place("memory", 58 * bars.length + 8, (picture, width) => {
    const scale = width / most;
    bars.forEach((bar, index) => {
      const top = 58 * index + 18;
      const label = width < 420 ? bar.label : name(bar);
      picture.append(draw("text", { x: 0, y: top - 5, class: index ? null : "strong" }, index ? `the best: ${label}` : label));
      picture.append(draw("rect", { x: 0, y: top, width, height: 28, class: "track" }));
      let x = 0;
      for (const [part, size] of Object.entries(bar.memory)) {
        const told = `${part.replaceAll("_", " ")}: ${bytes(size)}`;
        picture.append(draw("rect", { x, y: top, width: size * scale, height: 28, class: "bar", colour: part }, draw("title", null, told)));
        x += size * scale;
      }
      const limit = Math.min(width - 0.75, data.limit * scale);
      picture.append(draw("line", { x1: limit, x2: limit, y1: top - 3, y2: top + 31, class: "limit" }));
    });
  });
  legend("memory", parts.map(([part, size]) => ({ colour: part, label: part.replaceAll("_", " "), value: bytes(size) })));
}

function traffic(row) {
  const out = several ? `${bytes(row.inter_bytes)} leave it` : "there is one node: nothing leaves it";
  caption("traffic", "What a node sends in an optimizer step", out);
  const classes = ["word", "roomy", null, null];
  const heads = ["collective", "calls", "inside", "out of the node"].map((text, index) => el("th", { class: classes[index] }, text));
  const rows = row.traffic.map(([hop, calls, inside, outside]) =>
    el("tr", null, el("td", { class: "word" }, hop), el("td", { class: "roomy" }, calls.toLocaleString("en-US")), el("td", null, bytes(inside)), el("td", null, bytes(outside))));
  const table = el("table", null, el("thead", null, el("tr", null, ...heads)), el("tbody", null, ...rows));
  find("#traffic .drawing").replaceChildren(el("div", { class: "scroll" }, table));
}

/** Lines over places (`at`), with values in the legend that follow the pointer. */
function chart(id, { at, ticks, heads, lines, show, start, marks }) {
  const height = 250, left = 46, bottom = 40, top = 10;
  const most = 1.08 * Math.max(...lines.flatMap((line) => line.values.filter((value) => value !== null)));
  const read = (index) => legend(id, lines.map(({ colour, label, values }) => ({ colour, label, value: show(values[index]) })), heads[index]);
  place(id, height, (picture, width) => {
    const right = 26, first = at[0], last = at[at.length - 1] || 1;
    const x = (position) => left + 12 + ((position - first) / (last - first || 1)) * (width - left - right - 12);
    const y = (value) => top + (1 - value / most) * (height - top - bottom);
    for (const [value, text] of levels(most)) {
      picture.append(draw("line", { x1: left, x2: width, y1: y(value), y2: y(value), class: "axis" }));
      picture.append(draw("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, text));
    }
    for (const { position, text } of marks) {
      picture.append(draw("line", { x1: x(position), x2: x(position), y1: top, y2: height - bottom, class: "here" }));
      if (text) picture.append(draw("text", { x: x(position) + 4, y: height - bottom - 6 }, text));
    }
    const sparse = at.length > 7 && width < 420;
    ticks.forEach((words, index) => {
      if (sparse && index % 2 && index !== at.length - 1) return;
      words.forEach((text, line) => picture.append(draw("text", { x: x(at[index]), y: height - bottom + 17 + 15 * line, "text-anchor": "middle" }, text)));
    });
    for (const { values, colour, mine, dashed, breaks } of lines) {  // others above it, so that both show where they meet
      const points = values.map((value, index) => (value === null ? null : [x(at[index]), y(value)]));
      let path = "", joined = false;
      points.forEach((point, index) => {
        if (point && !(breaks === index)) path += `${joined ? "L" : "M"}${point[0].toFixed(1)} ${point[1].toFixed(1)}`;
        joined = point !== null;
      });
      picture.append(draw("path", { d: path, class: `line${mine ? " mine" : ""}${dashed ? " dashed" : ""}`, colour }));
      for (const point of points) if (point) picture.append(draw("circle", { cx: point[0], cy: point[1], r: mine ? 4.5 : 3.5, class: "dot", colour }));
    }
    const cursor = draw("line", { y1: top, y2: height - bottom, class: "cursor", visibility: "hidden" });
    picture.append(cursor);
    const follow = (event) => {
      const box = picture.getBoundingClientRect(), where = ((event.clientX - box.left) / box.width) * width;
      const index = at.reduce((near, position, place_) => (Math.abs(x(position) - where) < Math.abs(x(at[near]) - where) ? place_ : near), 0);
      cursor.setAttribute("x1", x(at[index]));
      cursor.setAttribute("x2", x(at[index]));
      cursor.setAttribute("visibility", "visible");
      read(index);
    };
    picture.addEventListener("pointermove", follow);
    picture.addEventListener("pointerdown", follow);
    picture.addEventListener("pointerleave", () => { cursor.setAttribute("visibility", "hidden"); read(start); });
  });
  read(start);
}

function levels(most) {
  const rough = most / 4, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((times) => times * power).find((value) => value >= rough);
  const digits = Math.max(0, 1 - Math.floor(Math.log10(step)) - (step / power === 2.5 ? 0 : 1));
  return Array.from({ length: Math.floor(most / step) + 1 }, (_, index) => [index * step, (index * step).toFixed(index ? digits : 0)]);
}

/** The chosen plan, the best one and the other ways to train, each with its colour. */
function compared(row) {
  const rows = [row, ...(row === data.rows[0] ? [] : [data.rows[0]]), ...data.rows.filter((other) => other.scheme !== "mics" && other !== row)];
  return rows.map((other) => ({
    row: other, mine: other === row, dashed: other.scheme !== "mics",
    colour: other.scheme !== "mics" ? other.scheme : other === row ? "accent" : "best",
    label: other === row ? name(other) : other === data.rows[0] ? `the best: ${name(other)}` : other.label,
  }));
}

function scaling(row) {
  const counts = data.scaled_nodes, here = counts.indexOf(data.nodes);
  caption("scaling", "Samples a second of one rank as the cluster grows", "by nodes; each rank does the same work, so that level lines are linear scaling");
  const lines = compared(row).map(({ row: other, ...style }) => ({ ...style, values: other.scaling }))
    .filter(({ values }) => values.some((value) => value !== null));
  chart("scaling", {
    at: counts.map(Math.log2), ticks: counts.map((count) => [String(count)]), lines, show: number, start: here,
    heads: counts.map((count) => `on ${count} ${count === 1 ? "node" : "nodes"}, ${(count * data.ranks_of_node).toLocaleString("en-US")} ranks:`),
    marks: [{ position: Math.log2(data.nodes), text: "as planned" }],
  });
}

function sensitivity(row) {
  const rates = several ? data.rates : [1], apart = rates.length + 0.15;
  caption("sensitivity", several ? "A step where links between nodes give less" : "A step where nothing overlaps",
    several ? "seconds, by the share of the rate and its GB/s; right: where compute waits for every collective" : "seconds; compute waits for every collective");
  const lines = compared(row).filter(({ row: other }) => other.fits).map(({ row: other, ...style }) => ({
    ...style, breaks: rates.length, values: [...rates.map((rate) => (rate === 1 ? other.seconds : other.by_rate[rate])), other.without_overlap],
  }));
  chart("sensitivity", {
    at: [...rates.keys(), apart], lines, show: (value) => (value === null ? "\u2013" : duration(value)), start: 0,
    ticks: [...rates.map((rate) => (several ? [percent(rate), number((rate * data.link) / 1e9)] : ["as predicted"])), ["no", "overlap"]],
    heads: [...rates.map((rate) => (several ? `at ${percent(rate)} of the rate, ${number((rate * data.link) / 1e9)} GB/s a node:` : "as predicted:")), "if nothing overlaps:"],
    marks: [{ position: apart - 0.6, text: "" }],
  });
}

function drawFigures() {
  const row = data.rows[state.chosen];
  if (!row) return;
  find("#chosen").textContent = row === data.rows[0] ? `The best plan: ${name(row)}` : name(row) + (row.fits ? "" : " does not fit");
  for (const paint of [timeline, memory, traffic, scaling, sensitivity]) paint(row);
}

// Commands.

async function copy(text, button) {
  const done = () => {
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  };
  try {
    await navigator.clipboard.writeText(text);
    done();
  } catch {
    const area = el("textarea", null);
    area.value = text;
    document.body.append(area);
    area.select();
    if (document.execCommand("copy")) done();
    area.remove();
  }
}

function drawCommands() {
  const row = data.rows[state.chosen];
  const blocks = row ? row.commands : [];
  const shown = blocks.map(([title, text]) => {
    const button = el("button", { type: "button", class: "copy", onclick: () => copy(text, button) }, "Copy");
    return el("div", { class: "command panel" }, el("header", null, title, button), el("pre", { class: text.includes("\n") ? null : "words" }, text));
  });
  const none = el("p", { class: "hint" }, "For comparison only: choose a plan of MiCS for its commands.");
  find("#commands").replaceChildren(...(shown.length ? shown : [none]));
}

// What stays as it is.

function drawTableOf(selector, heads, rows) {
  const words = (index) => (index === 0 || index === heads.length - 1 ? "word" : null);
  find(`${selector} thead`).replaceChildren(el("tr", null, ...heads.map((text, index) => el("th", { class: words(index) }, text))));
  find(`${selector} tbody`).replaceChildren(...rows.map((cells) => el("tr", null, ...cells.map((text, index) => el("td", { class: words(index) }, String(text))))));
}

function drawPage() {
  find("#facts").replaceChildren(...data.facts.flatMap(([key, value]) => [el("dt", null, key), el("dd", null, value)]));
  const best = data.rows[0];
  find("#advice-title").textContent = best ? `Train with ${name(best)}` : "Nothing fits";
  if (best) {
    const figures = [
      [duration(best.seconds), "an optimizer step"],
      [number(best.samples_per_second), "samples/s"],
      [`${(best.total / GIB).toFixed(1)} GiB`, `of ${(data.limit / GIB).toFixed(1)} a rank`],
      [percent(best.mfu, 1), `MFU, ${number(best.model_flops / 1e12)} TFLOP/s a rank`],
      [bytes(best.inter_bytes), "out of a node in a step"],
    ];
    find("#headline").replaceChildren(...figures.map(([value, about]) => el("div", null, el("b", null, value), el("span", null, about))));
  }
  find("#reasons").replaceChildren(...data.reasons.map((text) => el("p", null, text)));
  find("#ranking-title").textContent = data.ranking === "throughput" ? "What fits, the fastest first" : "What fits, the best first";
  find("#about-columns").textContent = data.about_columns;
  find("#misfits").hidden = !data.misfits.length;
  find("#misfits-title").textContent = `What does not fit into ${bytes(data.limit)}`;
  const misfits = data.misfits.map(([size, fits, closest]) => [`p=${size}`, `${fits} fit`, closest]);
  drawTableOf("#misfits", ["partition", "settings", "the closest of the others, and what would let it in"], misfits);
  drawTableOf("#assumptions", ["what", "assumed", "source"], data.assumptions);
  find("#footer").textContent = data.footer;
  for (const section of [find("#ranking").closest("section"), find("#figures"), find("#commands").closest("section")]) section.hidden = !best;
  if (!best) return;
  drawTable();
  drawFigures();
  drawCommands();
}

drawPage();
let width = window.innerWidth;
window.addEventListener("resize", () => {
  if (window.innerWidth === width) return;
  width = window.innerWidth;
  drawFigures();
});
