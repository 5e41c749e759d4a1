// The explorable part of a page. Every control changes `state` and draws again; nothing else is kept.
// Data: `head`, and parts that are embedded in the page or fetched from the server that served it, see report/parts.py.

const $ = (id) => document.getElementById(id);
const head = JSON.parse($("explore-head").textContent);
const { modalities, lengths, directions, factors } = head;
const ARRAYS = { int32: Int32Array, int16: Int16Array, int8: Int8Array, uint8: Uint8Array, float32: Float32Array };
const SHOWN = 24; // rows of the strip
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#8c6d00"]; // Okabe and Ito
const RAMP = ["#b7d4ea", "#7fb2d9", "#4a8fc4", "#21689f", "#0b3d66"]; // levels that have an order
const MARKS = ["circle", "square", "triangle", "diamond", "cross", "ring"];
const percent = (share) => `${Math.round(100 * share)}%`;

// ---- data ----

const loaded = new Map();

function load(name) {
  if (!loaded.has(name)) loaded.set(name, read(name));
  return loaded.get(name);
}

async function read(name) {
  const embedded = document.querySelector(`[data-part="${CSS.escape(name)}"]`);
  if (embedded) return Uint8Array.from(atob(embedded.textContent), (c) => c.charCodeAt(0)).buffer;
  const answer = await fetch(`parts/${name.split("/").map(encodeURIComponent).join("/")}`);
  if (!answer.ok) throw new Error(`no part ${name}`);
  return answer.arrayBuffer();
}

const whole = async (name) => new ARRAYS[head.arrays[name].type](await load(name));

async function ofRow(name, row) {
  const { type, shape } = head.arrays[name];
  const size = shape.slice(1).reduce((a, b) => a * b, 1);
  const buffer = await load(`${name}/${Math.floor(row / head.rowsPerPart)}`);
  return new ARRAYS[type](buffer, (row % head.rowsPerPart) * size * ARRAYS[type].BYTES_PER_ELEMENT, size);
}

const sheets = new Map();

function sheet(modality, row) {
  const name = `picture.${modality}/${Math.floor(row / head.rowsPerPart)}`;
  if (!sheets.has(name)) {
    sheets.set(name, load(name).then((bytes) => URL.createObjectURL(new Blob([bytes], { type: "image/jpeg" }))));
  }
  return sheets.get(name);
}

const [rank, first, answers, present, labels] = await Promise.all(
  ["rank", "first", "answers", "present", "labels"].map(whole),
);
const placed = (array, k, d, row) => array[(k * directions.length + d) * head.rows + row];
const has = (modality, row) => present[modality * head.rows + row] > 0;
const labelOf = (factor, row) => labels[factor * head.rows + row];
const targets = (query) => directions.flatMap(([from, to], d) => (from === query ? [{ d, to }] : []));

// ---- state ----

const state = {
  row: 0,
  query: Math.max(0, modalities.findIndex((m) => m.name === "tactile")),
  k: lengths.length - 1,
  filter: "all", // "all", "right D", "wrong D", or "cell": the rows of a cell of the confusions
  cell: null, // { d, factor, own, found }
  page: 0,
  group: head.maps[0]?.group,
  modality: 0,
  factor: 0,
  level: null, // the level of the legend that is shown alone
  axes: null, // two components of the map; null: those that separate the levels of the factor most
  target: 0,
  classes: 0,
  ...fromAddress(),
};
if (!has(state.query, state.row)) state.query = modalities.findIndex((_, m) => has(m, state.row));
state.modality = state.query;

function fromAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  const found = {};
  const row = Number(given.get("row") ?? NaN);
  if (Number.isInteger(row) && row >= 0 && row < head.rows) found.row = row;
  const query = modalities.findIndex((m) => m.name === given.get("query"));
  if (query >= 0) found.query = query;
  const k = lengths.indexOf(Number(given.get("kept")));
  if (k >= 0) found.k = k;
  return found;
}

function change(changes) {
  Object.assign(state, changes);
  draw();
}

function choose(row, query = state.query) {
  const moved = query !== state.query && state.filter !== "all" ? { filter: "all", page: 0 } : {};
  change({ row, query: has(query, row) ? query : modalities.findIndex((_, m) => has(m, row)), ...moved });
}

function chosenRows() {
  const { filter, cell, k, query } = state;
  const [kind, direction] = filter.split(" ");
  const d = Number(direction);
  const wanted = {
    all: () => true,
    right: (row) => placed(rank, k, d, row) === 0,
    wrong: (row) => placed(rank, k, d, row) > 0,
    cell: (row) => inCell(cell, row),
  }[kind];
  return Array.from({ length: head.rows }, (_, row) => row).filter((row) => has(query, row) && wanted(row));
}

function inCell({ d, factor, own, found }, row) {
  const other = placed(first, state.k, d, row);
  return other >= 0 && labelOf(factor, row) === own && labelOf(factor, other) === found;
}

function step(by) {
  const rows = chosenRows();
  if (!rows.length) return;
  const after = rows.findIndex((row) => row >= state.row);
  const at = after < 0 ? rows.length - 1 : rows[after] === state.row || by < 0 ? after + by : after;
  const place = (at + rows.length) % rows.length;
  change({ row: rows[place], page: Math.floor(place / SHOWN) });
}

// ---- elements ----

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

function options(select, entries, chosen) {
  select.replaceChildren(...entries.map(([value, text]) => make("option", { value, selected: String(value) === String(chosen) }, text)));
}

const painting = new Set(); // pictures that are being loaded

function picture(modality, row, name) {
  const node = make("span", { class: "picture", role: "img", "aria-label": name });
  const columns = head.sheetColumns;
  const start = row - (row % head.rowsPerPart);
  const count = Math.min(head.rowsPerPart, head.rows - start);
  const across = Math.min(columns, count);
  const down = Math.ceil(count / columns);
  const [x, y] = [(row - start) % columns, Math.floor((row - start) / columns)];
  const part = (at, of) => (of > 1 ? `${(100 * at) / (of - 1)}%` : "0%");
  const done = sheet(modalities[modality].name, row).then((url) => {
    node.style.backgroundImage = `url(${url})`;
    node.style.backgroundSize = `${100 * across}% ${100 * down}%`;
    node.style.backgroundPosition = `${part(x, across)} ${part(y, down)}`;
  });
  painting.add(done);
  done.finally(() => painting.delete(done));
  return node;
}

function textOf(modality, row) {
  if (modalities[modality].name === "text" && head.captions[row]) return head.captions[row];
  const known = factors.flatMap((f, i) => (labelOf(i, row) < 0 ? [] : [`${f.name} ${f.levels[labelOf(i, row)]}`]));
  return [`row ${row}: ${head.names[row]}`, ...known.slice(0, 2)].join(", "); // nothing to see, so what is known about it
}

// A picture or a sentence of a row, as a button that makes it the query.
function item(modality, row, { place, score, right, query, chosen } = {}) {
  const { one, pictures } = modalities[modality];
  const said = score == null ? "" : `, similarity ${score.toFixed(2)}${right ? ", right" : ""}`;
  const words = pictures ? "" : `: ${textOf(modality, row)}`;
  const shown = pictures ? picture(modality, row, `${one} of row ${row}`) : make("span", { class: "words" }, textOf(modality, row));
  const mark = right ? make("span", { class: "mark" }, "✓") : null;
  const under = score == null ? null : make("span", { class: "score" }, mark, ` ${score.toFixed(2)}`);
  const kinds = ["item", pictures && "pictured", right && "right", query && "query", chosen && "chosen"];
  return make(
    "button",
    {
      class: kinds.filter(Boolean).join(" "),
      "data-key": `${place} ${modality} ${row}`,
      "data-row": row,
      "aria-label": `${one} of row ${row}${words}${said}${query ? ", the query" : ""}`,
      "aria-pressed": query || chosen ? "true" : null,
      onclick: () => choose(row, modality),
    },
    shown,
    under,
  );
}

// ---- drawing ----

let drawn = 0;

async function draw() {
  const ticket = ++drawn;
  $("explore").setAttribute("aria-busy", "true");
  const names = ["finds", "scores", ...modalities.map((m) => `attention.${m.name}`)].filter((name) => head.arrays[name]);
  const arrays = await Promise.all(names.map((name) => ofRow(name, state.row)));
  if (ticket !== drawn) return; // the state has changed since
  const of = Object.fromEntries(names.map((name, i) => [name, arrays[i]]));
  const focused = document.activeElement?.dataset?.key;
  drawControls();
  drawItem();
  drawFinds(of);
  drawStrip();
  drawLook(of);
  drawClasses();
  await drawMap();
  if (focused) (document.querySelector(`[data-key="${CSS.escape(focused)}"]`) ?? $("next")).focus();
  history.replaceState(null, "", `#row=${state.row}&query=${modalities[state.query].name}&kept=${lengths[state.k]}`);
  await Promise.allSettled([...painting]);
  if (ticket === drawn) $("explore").setAttribute("aria-busy", "false");
}

function drawControls() {
  $("query").replaceChildren(
    make("legend", {}, "Search with"),
    ...modalities.map((m, i) =>
      make("label", {}, make("input", {
        type: "radio", name: "query", value: i, checked: i === state.query, disabled: !has(i, state.row),
        "data-key": `query ${i}`, onchange: () => change({ query: i, filter: "all", page: 0 }),
      }), m.one),
    ),
  );
  $("kept").max = lengths.length - 1;
  $("kept").value = state.k;
  $("kept").setAttribute("aria-valuetext", `${lengths[state.k]} of ${head.overlapping} overlapping registers`);
  $("kept-value").textContent = `${lengths[state.k]} of ${head.overlapping}`;
  $("row").max = head.rows - 1;
  $("row").value = state.row;
}

function drawItem() {
  $("item-title").textContent = `Row ${state.row}`;
  $("item").replaceChildren(
    ...modalities.flatMap((m, i) =>
      has(i, state.row) ? [make("figure", {}, item(i, state.row, { place: "item", query: i === state.query }), make("figcaption", {}, i === state.query ? `${m.one} (query)` : m.one))] : [],
    ),
  );
  $("factors").replaceChildren(
    ...factors.flatMap((f, i) => {
      const level = labelOf(i, state.row);
      return level < 0 ? [] : [make("div", {}, make("dt", {}, f.name), make("dd", {}, f.levels[level]))];
    }),
  );
}

function drawFinds({ finds, scores }) {
  const { k, row, query } = state;
  $("finds").replaceChildren(
    ...targets(query).map(({ d, to }) => {
      const at = (k * directions.length + d) * head.finds;
      const found = Array.from({ length: head.finds }, (_, i) => i).filter((i) => finds[at + i] >= 0);
      const items = found.map((i) =>
        item(to, finds[at + i] >> 1, { place: `find ${d}`, score: scores[at + i] / head.scoreSteps, right: finds[at + i] % 2 === 1 }),
      );
      const nearest = placed(rank, k, d, row) + 1;
      const where = nearest ? `nearest right one: rank ${nearest} · right ones: ${answers[d * head.rows + row]}` : `this row has none of both`;
      return make("section", { "data-direction": d },
        make("div", { class: "head" }, make("h3", {}, `${modalities[query].one} → ${modalities[to].several}`), make("span", { class: "fact" }, where)),
        make("div", { class: `items ${modalities[to].pictures ? "" : "worded"}` }, ...items),
        make("p", { class: "note" }, accuracy(k, d)),
      );
    }),
  );
}

function accuracy(k, d) {
  const ranks = Array.from({ length: head.rows }, (_, row) => placed(rank, k, d, row)).filter((r) => r >= 0);
  const share = (most) => ((100 * ranks.filter((r) => r < most).length) / ranks.length).toFixed(1);
  return ranks.length ? `Over all ${ranks.length} queries, with ${lengths[k]} of ${head.overlapping} registers: Acc@1 ${share(1)}%, Acc@5 ${share(5)}%.` : "";
}

function drawStrip() {
  const rows = chosenRows();
  const pages = Math.max(1, Math.ceil(rows.length / SHOWN));
  state.page = Math.min(Math.max(state.page, 0), pages - 1);
  const from = state.page * SHOWN;
  const shown = rows.slice(from, from + SHOWN);
  $("strip").replaceChildren(...shown.map((row) => item(state.query, row, { place: "strip", chosen: row === state.row })));
  $("strip").classList.toggle("worded", !modalities[state.query].pictures);
  $("strip-title").textContent = `Choose a ${modalities[state.query].one}`;
  $("strip-range").textContent = rows.length ? `${from + 1} to ${from + shown.length} of ${rows.length}` : "no such rows";
  $("strip-previous").disabled = state.page === 0;
  $("strip-next").disabled = state.page >= pages - 1;
  const entries = [["all", "all rows"]];
  for (const { d, to } of targets(state.query)) {
    entries.push([`wrong ${d}`, `first ${modalities[to].one} wrong`], [`right ${d}`, `first ${modalities[to].one} right`]);
  }
  if (state.cell) {
    const { d, factor, own, found } = state.cell;
    const { name, levels } = factors[factor];
    if (directions[d][0] === state.query) {
      entries.push(["cell", `${name}: ${levels[own]}, first ${modalities[directions[d][1]].one} ${levels[found]}`]);
    }
  }
  options($("filter"), entries, state.filter);
}

// ---- where registers look ----

function drawLook(of) {
  const shown = modalities.flatMap((m, i) => (of[`attention.${m.name}`] && has(i, state.row) ? [i] : []));
  $("look").hidden = !shown.length;
  const measured = state.row - (state.row % head.lookStep);
  if (measured === state.row) $("maps").replaceChildren(...shown.map((m) => lookOf(m, of[`attention.${modalities[m].name}`])));
  else {
    const name = `Show row ${measured}`;
    $("maps").replaceChildren(
      make("p", {}, `Measured for one row in ${head.lookStep} only, as it takes long with many registers.`),
      make("button", { "data-key": "measured", onclick: () => choose(measured) }, name),
    );
  }
}

function lookOf(modality, shares) {
  const { name, one, pictures } = modalities[modality];
  const [, registers, tokens] = head.arrays[`attention.${name}`].shape;
  const side = Math.sqrt(tokens - 1);
  const squared = pictures && Number.isInteger(side);
  const tiles = Array.from({ length: registers }, (_, n) => {
    const own = shares.subarray(n * tokens, (n + 1) * tokens);
    const sum = own.reduce((a, b) => a + b, 0) || 1;
    const kept = n >= head.overlapping || n < lengths[state.k];
    const title = `${n + 1} ${n < head.overlapping ? "overlapping" : "complementary"}`;
    const [body, said] = squared ? patches(modality, own, sum, side) : bars(own, sum);
    return make("figure", { class: kept ? "tile" : "tile dropped" }, body, make("figcaption", {}, make("b", {}, title), make("br"), kept ? said : `not kept · ${said}`));
  });
  return make("div", {}, make("h4", {}, one), make("div", { class: "tiles" }, ...tiles));
}

function patches(modality, own, sum, side) {
  const grid = own.subarray(1);
  const brightest = Math.max(...grid, 1);
  const cells = Array.from(grid, (share) => make("i", { style: `opacity: ${(0.85 * (1 - share / brightest)).toFixed(3)}` }));
  const shade = make("span", { class: "shade", style: `grid-template-columns: repeat(${side}, 1fr)` }, ...cells);
  const said = `patch ${percent(Math.max(...grid) / sum)}, whole ${percent(own[0] / sum)}`;
  return [make("span", { class: "looked" }, picture(modality, state.row, `${modalities[modality].one} of row ${state.row}, ${said}`), shade), said];
}

function bars(own, sum) {
  const last = own.reduce((found, share, i) => (share ? i : found), 0); // sentences are padded
  const used = Array.from(own.subarray(0, last + 1));
  const largest = Math.max(...used, 1);
  const said = `most: ${percent(Math.max(...used) / sum)} of ${used.length} tokens`;
  const columns = used.map((share) => make("i", { style: `height: ${Math.round((100 * share) / largest)}%` }));
  return [make("span", { class: "bars", role: "img", "aria-label": said }, ...columns), said];
}

// ---- map ----

const mapOf = () => head.maps.find((m) => m.group === state.group && m.modality === modalities[state.modality].name);
const ordered = (factor) => factor.levels.every((level) => level.startsWith("quantile "));
const colourOf = (factor, level) => (ordered(factors[factor]) ? RAMP[level % RAMP.length] : COLOURS[level % COLOURS.length]);
let points = []; // of the map that is drawn: { row, x, y }

async function drawMap() {
  const groups = [...new Set(head.maps.map((m) => m.group))];
  const names = { pooled: "pooled, for retrieval", overlapping: "overlapping", complementary: "complementary", frozen: "frozen, before registers" };
  options($("map-group"), groups.map((g) => [g, names[g] ?? g]), state.group);
  options($("map-modality"), modalities.map((m, i) => [i, m.one]), state.modality);
  options($("map-factor"), [["", "none"], ...factors.map((f, i) => [i, f.title])], state.factor);
  const map = mapOf();
  const at = map && (await whole(`map.${map.group}.${map.modality}`));
  const axes = map ? (state.axes ?? separatingAxes(at, map.shares.length)) : [0, 0];
  const components = (map?.shares ?? []).map((_, i) => [i, i + 1]);
  options($("map-across"), components, axes[0]);
  options($("map-up"), components, axes[1]);
  drawPoints(map, at, axes);
  drawLegend();
}

// The two components with the largest share of variance between the levels of the factor; without a factor the first two.
function separatingAxes(at, count) {
  const between = (component) => {
    const groups = new Map();
    for (let row = 0; row < head.rows; row++) {
      const value = at[row * count + component];
      const level = state.factor === "" ? -1 : labelOf(state.factor, row);
      if (level < 0 || Number.isNaN(value)) continue;
      const group = groups.get(level) ?? { n: 0, sum: 0, squares: 0 };
      groups.set(level, { n: group.n + 1, sum: group.sum + value, squares: group.squares + value ** 2 });
    }
    const [n, sum, squares] = ["n", "sum", "squares"].map((key) => [...groups.values()].reduce((a, g) => a + g[key], 0));
    const means = [...groups.values()].reduce((a, g) => a + g.sum ** 2 / g.n, 0);
    return (means - sum ** 2 / n) / (squares - sum ** 2 / n || 1) || 0;
  };
  const ranked = Array.from({ length: count }, (_, i) => i).sort((a, b) => between(b) - between(a));
  return ranked.slice(0, 2).sort((a, b) => a - b);
}

function drawPoints(map, at, [across, up]) {
  const canvas = $("map");
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  [canvas.width, canvas.height] = [width * ratio, height * ratio];
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  points = [];
  if (!map || !map.shares.length) return;
  const count = map.shares.length;
  for (let row = 0; row < head.rows; row++) {
    const [x, y] = [at[row * count + across], at[row * count + (up ?? across)]];
    if (!Number.isNaN(x)) points.push({ row, x, y });
  }
  const place = (key, low, high) => {
    const values = points.map((p) => p[key]);
    const [least, most] = [Math.min(...values), Math.max(...values)];
    for (const p of points) p[key] = low + ((p[key] - least) / (most - least || 1)) * (high - low);
  };
  place("x", 28, width - 14);
  place("y", height - 28, 14);
  const faint = (row) => state.level != null && labelOf(state.factor, row) !== state.level;
  for (const p of [...points].sort((a, b) => faint(b.row) - faint(a.row))) drawPoint(pen, p, faint(p.row));
  const own = points.find((p) => p.row === state.row);
  if (own) {
    pen.globalAlpha = 1;
    pen.strokeStyle = "#000";
    pen.lineWidth = 2.5;
    pen.beginPath();
    pen.arc(own.x, own.y, 9, 0, 7);
    pen.stroke();
  }
  pen.fillStyle = "#444";
  pen.font = "12px system-ui, sans-serif";
  const share = (axis) => `component ${axis + 1}: ${(100 * map.shares[axis]).toFixed(1)}% of the variance`;
  pen.fillText(share(across), 28, height - 8);
  pen.save();
  pen.translate(14, height - 28);
  pen.rotate(-Math.PI / 2);
  pen.fillText(share(up ?? across), 0, 0);
  pen.restore();
  const what = `${$("map-group").selectedOptions[0].text} tokens of ${modalities[state.modality].several}`;
  canvas.setAttribute("aria-label", `Map of ${points.length} rows by ${what}; row ${state.row} has a ring. Left and right: other rows.`);
}

function drawPoint(pen, { row, x, y }, faint) {
  const level = state.factor === "" ? 0 : labelOf(state.factor, row);
  pen.globalAlpha = faint ? 0.12 : 0.75;
  pen.fillStyle = pen.strokeStyle = level < 0 ? "#999" : state.factor === "" ? COLOURS[0] : colourOf(state.factor, level);
  pen.lineWidth = 1.6;
  pen.beginPath();
  outline(pen, level < 0 ? "circle" : MARKS[level % MARKS.length], x, y, 3.6);
}

function outline(pen, mark, x, y, r) {
  const polygon = (...corners) => {
    corners.forEach(([dx, dy], i) => (i ? pen.lineTo(x + dx * r, y + dy * r) : pen.moveTo(x + dx * r, y + dy * r)));
    pen.closePath();
  };
  if (mark === "square") polygon([-0.9, -0.9], [0.9, -0.9], [0.9, 0.9], [-0.9, 0.9]);
  else if (mark === "triangle") polygon([0, -1.2], [1.1, 0.9], [-1.1, 0.9]);
  else if (mark === "diamond") polygon([0, -1.3], [1.3, 0], [0, 1.3], [-1.3, 0]);
  else if (mark === "cross") {
    for (const [dx, dy] of [[1, 1], [1, -1]]) {
      pen.moveTo(x - dx * r, y - dy * r);
      pen.lineTo(x + dx * r, y + dy * r);
    }
  } else pen.arc(x, y, r, 0, 7);
  if (mark === "cross" || mark === "ring") pen.stroke();
  else pen.fill();
}

function drawLegend() {
  const factor = factors[state.factor];
  $("legend").replaceChildren(
    ...(factor?.levels ?? []).map((name, level) => {
      const icon = make("canvas", { width: 28, height: 28, "aria-hidden": "true" });
      const pen = icon.getContext("2d");
      pen.fillStyle = pen.strokeStyle = colourOf(state.factor, level);
      pen.lineWidth = 3;
      pen.beginPath();
      outline(pen, MARKS[level % MARKS.length], 14, 14, 9);
      return make("button", {
        "data-key": `level ${level}`, "aria-pressed": String(state.level === level),
        title: "show this level alone", onclick: () => change({ level: state.level === level ? null : level }),
      }, icon, name);
    }),
  );
}

// ---- confusions by class ----

function drawClasses() {
  const offered = targets(state.query);
  state.target = offered.some(({ d }) => d === state.target) ? state.target : (offered[0]?.d ?? -1);
  options($("classes-target"), offered.map(({ d, to }) => [d, modalities[to].one]), state.target);
  options($("classes-factor"), factors.map((f, i) => [i, f.title]), state.classes);
  const factor = factors[state.classes];
  if (!factor || state.target < 0) return $("classes").replaceChildren("No labels.");
  const counts = factor.levels.map(() => factor.levels.map(() => 0));
  for (let row = 0; row < head.rows; row++) {
    const other = placed(first, state.k, state.target, row);
    const [own, found] = [labelOf(state.classes, row), other < 0 ? -1 : labelOf(state.classes, other)];
    if (own >= 0 && found >= 0) counts[own][found]++;
  }
  const cell = (count, own, found, sum) => {
    const share = sum ? count / sum : 0;
    const name = `${factor.name} ${factor.levels[own]}, first find ${factor.levels[found]}: ${count} of ${sum}`;
    return make("td", { class: `share-${Math.round(10 * share)} ${own === found ? "same" : ""}` },
      make("button", {
        "data-key": `cell ${own} ${found}`, "aria-label": name, title: name, disabled: !count,
        onclick: () => showCell(own, found),
      }, sum ? String(Math.round(100 * share)) : "–"));
  };
  const all = counts.flat().reduce((a, b) => a + b, 0);
  const same = counts.reduce((a, line, level) => a + line[level], 0);
  $("classes").replaceChildren(
    make("p", {}, all ? `${percent(same / all)} of ${all} first finds have the level of their query.` : "No labelled rows."),
    make("table", { class: "heat" },
      make("tr", {}, make("th", {}, ""), ...factor.levels.map((level) => make("th", { scope: "col" }, level))),
      ...counts.map((line, own) => {
        const sum = line.reduce((a, b) => a + b, 0);
        return make("tr", {}, make("th", { scope: "row" }, factor.levels[own]), ...line.map((count, found) => cell(count, own, found, sum)));
      }),
    ),
  );
}

function showCell(own, found) {
  state.cell = { d: state.target, factor: state.classes, own, found };
  state.filter = "cell";
  change({ row: chosenRows()[0], page: 0 });
}

// ---- controls ----

$("kept").addEventListener("input", (event) => change({ k: Number(event.target.value) }));
$("row").addEventListener("change", (event) => {
  const row = Math.min(Math.max(Math.round(Number(event.target.value) || 0), 0), head.rows - 1);
  choose(row);
});
$("previous").addEventListener("click", () => step(-1));
$("next").addEventListener("click", () => step(1));
$("random").addEventListener("click", () => {
  const rows = chosenRows();
  const place = Math.floor(Math.random() * rows.length);
  if (rows.length) change({ row: rows[place], page: Math.floor(place / SHOWN) });
});
$("strip-previous").addEventListener("click", () => change({ page: state.page - 1 }));
$("strip-next").addEventListener("click", () => change({ page: state.page + 1 }));
$("filter").addEventListener("change", (event) => change({ filter: event.target.value, page: 0 }));
$("map-group").addEventListener("change", (event) => change({ group: event.target.value, axes: null }));
$("map-modality").addEventListener("change", (event) => change({ modality: Number(event.target.value), axes: null }));
$("map-factor").addEventListener("change", (event) => {
  change({ factor: event.target.value === "" ? "" : Number(event.target.value), level: null, axes: null });
});
for (const id of ["map-across", "map-up"]) {
  $(id).addEventListener("change", () => change({ axes: [Number($("map-across").value), Number($("map-up").value)] }));
}
$("classes-target").addEventListener("change", (event) => change({ target: Number(event.target.value) }));
$("classes-factor").addEventListener("change", (event) => change({ classes: Number(event.target.value) }));
$("map").addEventListener("click", (event) => {
  const away = (p) => (p.x - event.offsetX) ** 2 + (p.y - event.offsetY) ** 2;
  const nearest = points.reduce((best, p) => (best && away(best) <= away(p) ? best : p), null);
  if (nearest && away(nearest) < 24 ** 2) choose(nearest.row, state.modality);
});
document.addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const typing = event.target.matches("input, select, textarea");
  if (!by || typing || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  step(by);
});
window.addEventListener("resize", () => drawMap());
draw();
