// The table of runs: filtered, sorted, one by one or as means over seeds.
const NAMES = [["methods", "Method"], ["task", "Task"], ["data", "Data"], ["model", "Model"], ["scale", "Scale"]];
const SPLITS = ["test", "tuned", "base"];

// Metrics of the runs shown: of each name the split that tells most, or all of them.
function metricKeys(runs) {
  const there = new Set(runs.flatMap((run) => Object.keys(run.metrics)));
  const keys = DATA.metrics.map((m) => m.key).filter((k) => there.has(k));
  if (state.all) return keys;
  const seen = new Map();
  for (const k of keys) {
    const name = k.slice(k.indexOf("/") + 1);
    const rank = SPLITS.indexOf(k.split("/")[0]);
    if (!seen.has(name) || (rank >= 0 && rank < seen.get(name).rank)) seen.set(name, { k, rank: rank < 0 ? 9 : rank });
  }
  return [...seen.values()].map((each) => each.k);
}

function columnsOf(runs) {
  const costs = DATA.costs.filter((c) => c.column && runs.some((run) => own(run.cost, c.key) !== undefined));
  const names = NAMES.map(([id, title]) => ({ id, title, get: (row) => row.runs[0][id] }));
  const numbers = [...metricKeys(runs), ...costs.map((c) => `cost/${c.key}`)].map((id) => ({
    id, title: titleOf(id), number: true, values: (row) => row.runs.map((run) => numberOf(run, id)).filter((v) => v !== undefined),
  }));
  for (const column of numbers) column.get = (row) => { const v = column.values(row); return v.length ? mean(v) : undefined; };
  const seeds = state.means
    ? { id: "seeds", title: "Seeds", number: true, get: (row) => row.runs.length, tell: (row) => String(row.runs.length) }
    : { id: "seed", title: "Seed", number: true, get: (row) => Number(row.runs[0].seed), tell: (row) => row.runs[0].seed };
  if (RUNS.some((run) => run.trials)) names.push({ id: "tuning", title: "Tuning", get: (row) => row.runs[0].tuning });
  return [...names, seeds, ...(state.means ? [] : [{ id: "status", title: "Status", get: (row) => row.runs[0].status }]), ...numbers,
    ...(state.means ? [] : [{ id: "folder", title: "Folder", get: (row) => row.runs[0].folder }])];
}

function sortedRows(rows, columns) {
  const column = columns.find((c) => c.id === state.sort);
  if (!column) return rows;
  const missing = (v) => v === undefined || Number.isNaN(v);
  return rows.map((row) => [column.get(row), row]).sort(([a], [b]) => {
    if (missing(a) || missing(b)) return missing(a) - missing(b);
    const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
    return state.down ? -order : order;
  }).map(([, row]) => row);
}

function heading(column) {
  const on = state.sort === column.id;
  const side = column.number ? better(column.id) : "";
  const arrow = side === "higher" ? " ↑" : side === "lower" && !isCost(column.id) ? " ↓" : "";
  const button = el("button", { type: "button", title: `Sort by ${column.title}${side ? `; ${side} is better` : ""}` },
    `${column.title}${arrow}${on ? (state.down ? " ▾" : " ▴") : ""}`);
  button.dataset.sort = column.id;
  button.addEventListener("click", () => {
    state.down = on ? !state.down : side === "higher";
    state.sort = column.id;
    render();
    document.querySelector(`#table [data-sort="${CSS.escape(column.id)}"]`)?.focus();
  });
  return el("th", { scope: "col", class: column.number ? "number" : "", "aria-sort": on ? (state.down ? "descending" : "ascending") : "none" }, button);
}

function cell(column, row) {
  if (column.id === "status") return el("td", { class: row.runs[0].status === "finished" ? "" : "bad" }, row.runs[0].status);
  if (column.tell) return el("td", { class: "number" }, column.tell(row));
  if (!column.number) return el("td", {}, String(column.get(row)));
  const values = column.values(row);
  if (!values.length) return el("td", { class: "number absent" }, "–");
  const deviation = row.runs.length > 1 ? spread(values) : null;
  const text = told(mean(values), column.id);
  return el("td", { class: "number" }, deviation ? `${text} ± ${told(deviation, column.id)}` : text);
}

function tick(row) {
  const box = el("input", { type: "checkbox", checked: row.runs.every((run) => state.ticked.has(run.id)) });
  box.setAttribute("aria-label", `Compare ${label(row.runs[0])}${row.runs.length > 1 ? ` and ${row.runs.length - 1} more seeds` : ""}`);
  box.addEventListener("change", () => {
    for (const run of row.runs) { if (box.checked) state.ticked.add(run.id); else state.ticked.delete(run.id); }
    renderCompared();
  });
  return el("td", { class: "tick" }, box);
}

// Draw the table; returns the runs in its order.
function renderTable(runs) {
  const rows = state.means ? grouped(runs).map((each) => ({ runs: each })) : runs.map((run) => ({ runs: [run] }));
  const columns = columnsOf(rows.flatMap((row) => row.runs));
  const sorted = sortedRows(rows, columns);
  const body = sorted.slice(0, state.rows).map((row) => el("tr", {}, tick(row), ...columns.map((c, i) => {
    const made = cell(c, row);
    return i ? made : el("th", { scope: "row" }, made.textContent);
  })));
  $("table").replaceChildren(
    el("thead", {}, el("tr", {}, el("th", { scope: "col", class: "tick" }, "Pick"), ...columns.map(heading))), el("tbody", {}, ...body));
  $("more").hidden = sorted.length <= state.rows;
  $("count").textContent = state.means ? `${sorted.length} settings of ${runs.length} runs` : `${runs.length} of ${RUNS.length} runs`;
  $("table-note").textContent = state.means
    ? "Means over seeds of finished runs, ± standard deviation of the sample. ↑ higher is better, ↓ lower is better."
    : "↑ higher is better, ↓ lower is better. Pick runs to compare them below.";
  return sorted.flatMap((row) => row.runs);
}
