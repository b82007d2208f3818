// The charts. Plotly reads text as HTML of its own kind, so that names are escaped once more here.
const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const DASHES = ["solid", "longdash", "dashdot", "dot"]; // of runs that share a colour
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down"];

function colours() {
  const style = getComputedStyle(document.documentElement), read = (name) => style.getPropertyValue(`--${name}`).trim();
  return { text: read("text"), grid: read("line"), mark: read("accent"), surface: read("surface"),
    of: (run) => read(`colour-${run.index % 8}`) };
}

function translucent(hex, alpha) {
  const [red, green, blue] = [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
  return `rgba(${red},${green},${blue},${alpha})`;
}

function base(colour) {
  const axis = { gridcolor: colour.grid, linecolor: colour.grid, zeroline: false, automargin: true, fixedrange: touch };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, height: 420,
    font: { color: colour.text, family: "system-ui, sans-serif", size: 13 },
    margin: { l: 56, r: 16, t: 12, b: 52 }, dragmode: touch ? false : "zoom", clickanywhere: true,
    hoverlabel: { bgcolor: colour.surface, bordercolor: colour.grid, font: { color: colour.text, size: 12 }, align: "left" },
    xaxis: { ...axis }, yaxis: { ...axis, range: [0, HIGHEST], title: { text: "certified accuracy" } },
  };
}
// The upper end of the accuracies: above every curve and its band, also of runs that are not shown.
const HIGHEST = Math.min(1, Math.ceil(10 * Math.max(...data.runs.map((run) => Math.max(
  wilson(certified(run, 0), run.total)[1], run.audit ? robust(run.audit, 0) / run.audit.total : 0)))) / 10) + 0.02;
const touch = matchMedia("(pointer: coarse)").matches;
const OPTIONS = { displayModeBar: false, responsive: true };

function curveTraces(run, colour) {
  const x = GRID.slice(0, GRID.findIndex((radius) => radius > largest) + 1 || undefined);
  const counts = x.map((radius) => certified(run, radius)), bands = counts.map((k) => wilson(k, run.total));
  const line = { shape: "vh", color: colour.of(run), width: 2, dash: DASHES[Math.floor(run.index / 8) % 4] };
  const hidden = { x, mode: "lines", hoverinfo: "skip", line: { shape: "vh", width: 0 } };
  const samples = run.n === null ? "" : run.n ? `, n = ${whole(run.n)} samples` : ", no samples";
  const narrow = byId("curves").clientWidth < 600 || data.runs.filter((each) => each.shown).length > 6;
  const traces = byId("band").checked ? [
    { ...hidden, y: bands.map(([low]) => low) },
    { ...hidden, y: bands.map(([, high]) => high), fill: "tonexty", fillcolor: translucent(colour.of(run), 0.15) },
  ] : [];
  traces.push({
    x, y: counts.map((k) => k / run.total), mode: "lines", line, meta: plain(run.label),
    customdata: counts.map((k, i) => [whole(k), whole(run.total), ...bands[i]]),
    hovertemplate: "<b>%{meta}</b> %{y:.3f} (%{customdata[0]} of %{customdata[1]} images" + (narrow ? ")<extra></extra>" :
      `; 95 %: %{customdata[2]:.3f} to %{customdata[3]:.3f})${samples}<extra></extra>`),
  });
  if (run.audit) {
    traces.push({
      x: GRID, y: GRID.map((radius) => robust(run.audit, radius) / run.audit.total), mode: "lines", meta: plain(run.label),
      line: { ...line, shape: "hv", dash: "dash", width: 1.5 },
      hovertemplate: `<b>%{meta}</b>, under attack %{y:.3f} of ${whole(run.audit.total)} images<extra></extra>`,
    });
  }
  return traces;
}

function marker(colour) {
  const line = { color: colour.mark, width: 1.5, dash: "dot" };
  return [{ type: "line", x0: state.radius, x1: state.radius, y0: 0, y1: 1, yref: "paper", line }];
}

let drawnAs = ""; // what the curves show, apart from the chosen radius

function drawCurves() {
  const colour = colours(), shown = data.runs.filter((run) => run.shown), layout = base(colour);
  const key = [colour.text, byId("band").checked, ...shown.map((run) => run.index)].join(" ");
  if (key === drawnAs) return Plotly.relayout(byId("curves"), { shapes: marker(colour) });
  drawnAs = key;
  Object.assign(layout.xaxis, { title: { text: `ℓ2 radius (${data.unit})` }, range: [0, LIMIT],
    spikecolor: colour.text, spikethickness: 1, spikedash: "solid",
    hoverformat: DIGITS, unifiedhovertitle: { text: `r = %{x:${DIGITS}}` } });
  const traces = shown.flatMap((run) => curveTraces(run, colour));
  return Plotly.react(byId("curves"), traces, { ...layout, hovermode: "x unified", shapes: marker(colour) }, OPTIONS);
}

// A logarithmic axis for costs. A cost of 0 stands left of the others, behind a separating line.
function costAxis(values) {
  const positive = values.filter((value) => value > 0).map(Math.log10), zeros = values.some((value) => value === 0);
  if (!positive.length) return { zero: 1, axis: { type: "log", range: [-1, 1], tickvals: [1], ticktext: ["0"] } };
  const low = Math.min(...positive), high = Math.max(...positive), gap = Math.max(0.5, (high - low) / 8);
  const digits = high - low > 3 ? [1] : [1, 2, 5], zero = low - 2 * gap, ticks = [];
  for (let power = Math.floor(low - gap / 2); power <= high + 0.4; power += 1) {
    for (const digit of digits) {
      const tick = power + Math.log10(digit);
      if (tick >= low - gap / 2 && tick <= high + 0.4) ticks.push(Number(`${digit}e${power}`));
    }
  }
  const every = Math.ceil(ticks.length / (byId("cost").clientWidth / 90)), some = ticks.filter((_, k) => k % every === 0);
  const text = (tick) => (byId("cost-kind").value === "seconds" ? duration(tick) : whole(tick));
  return { zero: 10 ** zero, separator: zeros ? 10 ** (low - gap) : null, axis: {
    type: "log", range: [zeros ? zero - gap / 2 : low - gap / 2, high + 0.4],
    tickvals: [...(zeros ? [10 ** zero] : []), ...some], ticktext: [...(zeros ? ["0"] : []), ...some.map(text)] } };
}

function costRows() {
  const kind = byId("cost-kind").value;
  return data.runs.filter((run) => run.shown && run[kind] !== null).map((run) => {
    const k = certified(run, state.radius);
    return { run, cost: run[kind], share: k / run.total, band: wilson(k, run.total) };
  });
}

function costText(cost) {
  return byId("cost-kind").value === "seconds" ? duration(cost) : `${whole(cost)} samples`;
}

function drawCost() {
  const colour = colours(), layout = base(colour), rows = costRows(), kind = byId("cost-kind").value;
  const { zero, axis, separator } = costAxis(rows.map(({ cost }) => cost));
  Object.assign(layout.xaxis, axis, { title: { text: `${kind} per image` } });
  Object.assign(layout.yaxis.title, { text: `certified accuracy at r = ${short(state.radius)}` });
  if (separator) {
    const line = { color: colour.grid, dash: "dash", width: 1 };
    layout.shapes = [{ type: "line", x0: separator, x1: separator, y0: 0, y1: 1, yref: "paper", line }];
  }
  const traces = rows.map(({ run, cost, share, band }) => ({
    x: [cost || zero], y: [share], mode: "markers", meta: [plain(run.label), costText(cost)],
    marker: { color: colour.of(run), size: 12, symbol: SYMBOLS[run.index % 8], line: { color: colour.surface, width: 1 } },
    error_y: { type: "data", symmetric: false, array: [band[1] - share], arrayminus: [share - band[0]], width: 4 },
    hovertemplate: `<b>%{meta[0]}</b><br>%{y:.3f}, 95 %: ${share3(band[0])} to ${share3(band[1])}<br>%{meta[1]} per image<extra></extra>`,
  }));
  return Plotly.react(byId("cost"), traces, { ...layout, hovermode: "closest" }, OPTIONS);
}

function numbers() {
  const radii = [...new Set([...data.radii, state.radius])].sort((a, b) => a - b);
  const rows = data.runs.filter((run) => run.shown).flatMap((run) => {
    const cell = (radius) => {
      const k = certified(run, radius), [low, high] = wilson(k, run.total);
      return `${share3(k / run.total)} (${share3(low)}–${share3(high)})`;
    };
    const found = [[run.label, whole(run.total), ...radii.map(cell)]];
    if (run.audit) {
      const attacked = radii.map((radius) => share3(robust(run.audit, radius) / run.audit.total));
      found.push([`${run.label}, under attack`, whole(run.audit.total), ...attacked]);
    }
    return found;
  });
  const header = ["run", "images", ...radii.map((radius) => `r=${short(radius)}`)];
  fillTable(byId("numbers-curves").querySelector("table"), "Certified accuracy (95 % Wilson interval over images)", header, rows);
  const costs = costRows().map(({ run, cost, share, band }) =>
    [run.label, costText(cost), share3(share), `${share3(band[0])}–${share3(band[1])}`]);
  const titles = ["run", "per image", `accuracy at r=${short(state.radius)}`, "95 % interval"];
  fillTable(byId("numbers-cost").querySelector("table"), "Cost and certified accuracy", titles, costs);
  const kind = byId("cost-kind").value, without = data.runs.filter((run) => run[kind] === null).map((run) => run.label);
  const zero = kind === "samples" && data.runs.some((run) => run.samples === 0);
  byId("cost-hint").textContent = [
    "Bars: 95 % Wilson intervals over the choice of images.",
    zero ? "Deterministic certificates take 0 samples; they stand left of the dashed line, because the axis is logarithmic." : "",
    kind === "seconds" ? "Seconds as each run measured them, on its own machine." : "",
    without.length ? `Not known, and not drawn: ${without.join(", ")}.` : "",
  ].filter(Boolean).join(" ");
}

function startCharts() {
  byId("band").checked = data.runs.length <= 4;
  byId("dashed").textContent = audited
    ? "Dashed: the accuracy that the attacks of the audit left, an upper bound for what can be certified." : "";
  if (data.runs.every((run) => run.samples === null)) byId("cost-kind").value = "seconds";
  const drawn = typeof Plotly !== "undefined";
  const draw = () => {
    numbers();
    return drawn ? Promise.all([drawCurves(), drawCost()]) : Promise.resolve();
  };
  for (const name of ["curves", "cost"]) {
    if (drawn) continue;
    byId(name).replaceWith(make("p", { class: "missing" }, "No chart: Plotly was not installed where this page was made. Here are its numbers."));
    byId(`numbers-${name}`).open = true;
  }
  state.listeners.push(draw);
  for (const id of ["band", "cost-kind"]) byId(id).addEventListener("change", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  draw().then(() => {
    if (drawn) {
      byId("curves").on("plotly_click", (event) => {
        const radius = event.xvals?.[0] ?? event.points?.[0]?.x;
        setRadius(GRID[Math.round(radius / STEP)]);
      });
    }
    document.documentElement.dataset.ready = String(Math.round(performance.now()));
  });
}
startCharts();
