// The table, the radius and the choice of runs. Names come from elsewhere: they are set as text, never as HTML.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const Z = 1.959963984540054; // of a two-sided interval of 95 %

const largest = Math.max(...data.runs.map((run) => run.radii[0] ?? 0));
// Where the curves are drawn, and what the slider steps through: multiples of a round number, the same for all runs, so
// that their values can be compared. Between two of them certified accuracy is drawn as low as at the second.
const audited = data.runs.some((run) => run.audit), LIMIT = Math.max(largest, 1e-3) * (audited ? 2 : 1.02);
const STEP = [5, 2, 1, 0.5].map((digit) => digit * 10 ** Math.floor(Math.log10(LIMIT / 400)))
  .find((step) => LIMIT / step >= 400);
const GRID = Array.from({ length: Math.floor(LIMIT / STEP) + 2 }, (_, k) => Number((k * STEP).toPrecision(12)));
const DIGITS = STEP > 1e-6 && STEP < 1e6 ? `.${Math.max(0, -Math.floor(Math.log10(STEP)))}f` : ".3e";
const state = { radius: data.radii.includes(0.5) ? 0.5 : data.radii[Math.floor(data.radii.length / 2)], listeners: [] };
data.runs.forEach((run, index) => Object.assign(run, { index, shown: true }));

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const whole = (number) => number.toLocaleString("en-US", { maximumFractionDigits: 0 });
const share3 = (share) => share.toFixed(3);
const short = (radius) => Number(radius.toPrecision(6));
const brief = (number) => String(Number(number.toPrecision(4)));
// A radius is never shown larger than it is.
const radius3 = (radius) => (radius < 1e6 ? (Math.floor(radius * 1000) / 1000).toFixed(3) : radius.toExponential(3));

function duration(seconds) {
  if (seconds < 0.001) return `${brief(seconds * 1e6)} µs`;
  if (seconds < 1) return `${brief(seconds * 1000)} ms`;
  return seconds < 60 ? `${seconds.toFixed(1)} s` : `${(seconds / 60).toFixed(1)} min`;
}

// The number of images that are classified correctly with at least this radius.
function certified(run, radius) {
  let low = 0, high = run.radii.length; // the radii fall
  while (low < high) {
    const middle = (low + high) >> 1;
    if (run.radii[middle] >= radius) low = middle + 1; else high = middle;
  }
  return low * run.every;
}

// The number of attacked images that are correct and that no attack flipped within this radius.
function robust(audit, radius) {
  return audit.never + audit.distances.filter((distance) => distance > radius).length;
}

// The Wilson score interval of k of n.
function wilson(k, n) {
  const share = k / n, squared = Z * Z / n;
  const centre = (share + squared / 2) / (1 + squared);
  const half = Z * Math.sqrt((share * (1 - share) + squared / 4) / n) / (1 + squared);
  return [k === 0 ? 0 : Math.max(0, centre - half), k === n ? 1 : Math.min(1, centre + half)];
}

function changed() {
  for (const listener of state.listeners) listener();
}

function setRadius(radius) {
  if (!Number.isFinite(radius) || radius < 0) return;
  state.radius = radius;
  byId("slider").value = radius;
  if (document.activeElement !== byId("radius")) byId("radius").value = short(radius);
  if (!state.waiting) requestAnimationFrame(() => { state.waiting = false; changed(); });
  state.waiting = true;
}

function swatch(run) {
  return make("span", { class: `swatch colour-${run.index % 8}`, "aria-hidden": "true" });
}

function fillTable(table, caption, header, rows) {
  const heads = header.map((text) => make("th", { scope: "col" }, text));
  const body = rows.map((row) => make("tr", {}, ...row.map((cell, column) =>
    column ? make("td", {}, cell) : make("th", { scope: "row" }, make("span", {}, cell)))));
  table.replaceChildren(make("caption", {}, caption), make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...body));
}

function mainTable() {
  const table = byId("table"), at = make("button", { type: "button" });
  // A zero-width space after a slash is where a heading may wrap.
  const titles = data.header.map((title) => make("button", { type: "button" }, title.replace("/", "/\u200b")));
  titles.splice(2, 0, at);
  const heads = titles.map((button, column) => {
    const head = make("th", { scope: "col", "aria-sort": "none" }, button);
    if (column === 2) head.className = "at";
    return head;
  });
  // The column of a radius that the column "at r" shows is hidden.
  const hidden = (column) => data.radii[column - 3] === state.radius;
  const rows = data.runs.map((run) => {
    const cells = run.cells.map(({ text }) => make("td", { class: text.length > 16 ? "long" : "" }, text));
    const own = make("td", { class: "at" });
    cells[0] = make("th", { scope: "row" }, swatch(run), make("span", {}, run.cells[0].text));
    cells.splice(2, 0, own);
    const values = run.cells.map((cell) => cell.value);
    values.splice(2, 0, 0);
    return { run, own, values, row: make("tr", {}, ...cells) };
  });
  const body = make("tbody");
  const sorting = { column: -1, sign: -1 };
  function sort() {
    const { column, sign } = sorting;
    if (column >= 0) {
      rows.sort((a, b) => {
        if (column === 0) return sign * a.run.label.localeCompare(b.run.label, "en", { numeric: true });
        const [x, y] = [a.values[column], b.values[column]];
        return (x === null) - (y === null) || sign * (x - y); // what is not known stands last
      });
    }
    heads.forEach((head, own) => head.setAttribute("aria-sort",
      own !== column ? "none" : sign > 0 ? "ascending" : "descending"));
    body.replaceChildren(...rows.map(({ row }) => row));
  }
  titles.forEach((button, column) => button.addEventListener("click", () => {
    sorting.sign = sorting.column === column ? -sorting.sign : column === 0 ? 1 : -1;
    sorting.column = column;
    sort();
    button.focus();
  }));
  table.append(
    make("caption", {}, `Runs, and the share of images certified at radii in ${data.unit}`),
    make("thead", {}, make("tr", {}, ...heads)), body,
  );
  state.listeners.push(() => {
    at.textContent = `at r=${short(state.radius)}`;
    heads.forEach((head, column) => { head.hidden = hidden(column); });
    for (const each of rows) {
      each.values[2] = certified(each.run, state.radius) / each.run.total;
      each.own.textContent = share3(each.values[2]);
      each.row.classList.toggle("off", !each.run.shown);
      [...each.row.cells].forEach((cell, column) => { cell.hidden = hidden(column); });
    }
    if (sorting.column === 2) sort();
  });
  sort();
  new ResizeObserver(() => {
    const wide = table.scrollWidth > table.parentNode.clientWidth;
    table.classList.toggle("wide", wide);
    byId("wider").hidden = !wide;
  }).observe(table.parentNode);
}

function list(lines) {
  return lines.length ? [make("ul", {}, ...lines.map((line) => make("li", {}, line)))] : [];
}

function begin() {
  const images = [...new Set(data.runs.map((run) => run.cells[1].text))];
  const runs = data.runs.length === 1 ? "1 run" : `${data.runs.length} runs`;
  byId("summary").textContent = `${runs} on ${new Intl.ListFormat("en").format(images)} images. Radii are ℓ2 distances in ${data.unit}.`;
  byId("legend").textContent = data.legend;
  const parts = data.runs.filter((run) => run.every > 1).map((run) => `${run.label}: the page holds the radii of one in ` +
    `${run.every} images, so that accuracies at other radii may be too low by up to ${run.every} images.`);
  byId("notes").append(...list([...data.notes, ...parts].map((line) => line.replaceAll("`", ""))));
  byId("made").textContent = `Made by lsrs_jax ${data.version}. Nothing on this page is loaded from elsewhere.`;
  const slider = byId("slider"), number = byId("radius");
  slider.max = GRID.find((radius) => radius >= largest) ?? LIMIT;
  slider.step = number.step = STEP;
  slider.addEventListener("input", () => setRadius(Number(slider.value)));
  number.addEventListener("input", () => setRadius(number.value === "" ? NaN : Number(number.value)));
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  for (const run of data.runs) {
    const box = make("input", { type: "checkbox", checked: "" });
    box.addEventListener("change", () => { run.shown = box.checked; changed(); });
    byId("runs").append(make("label", {}, box, swatch(run), run.cells[0].text));
  }
  mainTable();
  slider.value = number.value = state.radius;
  changed();
}
begin();
