// What the records hold, how it is told, and which runs are chosen.
const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
RUNS.forEach((run, i) => { run.id = i; });
const METRIC = new Map(DATA.metrics.map((m) => [m.key, m]));
const COST = new Map(DATA.costs.map((c) => [c.key, c]));
const state = { words: "", choices: {}, means: false, all: false, sort: null, down: false, ticked: new Set(), rows: 500 };
const $ = (id) => document.getElementById(id);

// An element with properties and children; text is only ever text, never HTML.
function el(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "class") made.className = value;
    else if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children.filter((c) => c !== null && c !== undefined));
  return made;
}

function setting(run, key) {
  const column = Object.hasOwn(DATA.values, key) ? DATA.values[key] : null;
  return column && column.runs[run.id] >= 0 ? column.values[column.runs[run.id]] : undefined;
}

// What a run holds for a key of `filtrun table --where`.
function held(run, key) {
  const name = key === "method" ? "methods" : key;
  if (["name", "status", "seed", "task", "data", "model", "methods", "scale", "folder", "cell", "error"].includes(name)) return run[name];
  if (name.startsWith("cost/")) return own(run.cost, name.slice(5));
  const metric = own(run.metrics, name);
  return metric === undefined ? setting(run, name) : metric;
}

const own = (values, key) => (Object.hasOwn(values, key) ? values[key] : undefined);

function meets(run, word) {
  const found = /^([\w./@+-]+?)(!=|<=|>=|=|<|>|~)(.+)$/.exec(word);
  if (!found) {
    const text = [run.name, run.folder, run.status, run.task, run.data, run.model, run.methods, run.command, run.error].join("\n");
    return text.toLowerCase().includes(word.toLowerCase());
  }
  const [, key, sign, wanted] = found;
  const value = held(run, key);
  if (value === undefined) return sign === "!=";
  const [a, b] = [Number(value), Number(wanted)];
  const numbers = String(value).trim() !== "" && !Number.isNaN(a) && !Number.isNaN(b);
  const same = numbers ? a === b : String(value).toLowerCase() === wanted.toLowerCase();
  if (sign === "=") return same;
  if (sign === "!=") return !same;
  if (sign === "~") return String(value).toLowerCase().includes(wanted.toLowerCase());
  if (!numbers) return false;
  return { "<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b }[sign];
}

function chosenRuns() {
  const words = state.words.split(/\s+/).filter(Boolean);
  return RUNS.filter((run) => Object.entries(state.choices).every(([key, value]) => !value || run[key] === value)
    && words.every((word) => meets(run, word)));
}

// Runs that compute the same but for the seed; the same cell found twice counts once.
function grouped(runs) {
  const groups = new Map();
  for (const run of runs) {
    if (run.status !== "finished") continue;
    if (!groups.has(run.group)) groups.set(run.group, new Map());
    groups.get(run.group).set(run.cell, run);
  }
  return [...groups.values()].map((cells) => [...cells.values()]);
}

const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;

// Standard deviation of a sample (n - 1); null of fewer than two.
function spread(values) {
  if (values.length < 2) return null;
  const middle = mean(values);
  return Math.sqrt(values.reduce((a, v) => a + (v - middle) ** 2, 0) / (values.length - 1));
}

function short(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e15 || size < 1e-4) return value.toExponential(2);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(4)));
}

function scaled(value, step, units, digits = 3) {
  let place = 0;
  while (Math.abs(value) >= step && place < units.length - 1) { value /= step; place += 1; }
  return `${Number(value.toPrecision(digits))} ${units[place]}`.trim();
}

function toldCost(value, key) {
  const kind = COST.get(key)?.kind;
  if (kind === "bytes") return scaled(value, 1000, ["B", "KB", "MB", "GB", "TB"]);
  if (kind === "seconds") {
    if (value > 0 && value < 1) return `${Number((value * 1000).toPrecision(3))} ms`;
    return value < 120 ? `${Number(value.toPrecision(3))} s` : value < 7200 ? `${(value / 60).toFixed(1)} min` : `${(value / 3600).toFixed(1)} h`;
  }
  return key.includes("flops") ? scaled(value, 1000, ["", "k", "M", "G", "T", "P"]) : short(value);
}

function toldMetric(value, key) {
  const form = /^\.(\d+)(f|%)$/.exec(METRIC.get(key)?.form || "");
  if (!form) return short(value);
  return form[2] === "%" ? `${(value * 100).toFixed(Number(form[1]))}%` : value.toFixed(Number(form[1]));
}

const isCost = (key) => key.startsWith("cost/");
const told = (value, key) => (isCost(key) ? toldCost(value, key.slice(5)) : toldMetric(value, key));
const better = (key) => (isCost(key) ? "lower" : METRIC.get(key)?.better || "");
const titleOf = (key) => (isCost(key) ? COST.get(key.slice(5))?.title : METRIC.get(key)?.title) || key;
const numberOf = (run, key) => (isCost(key) ? own(run.cost, key.slice(5)) : own(run.metrics, key));
const label = (run) => `${run.methods}, ${run.data}, ${run.model}, seed ${run.seed}`;

// Names of runs of one list: those that would read alike are told apart by their folders.
function labels(runs, tell = label) {
  const names = runs.map(tell);
  return runs.map((run, i) => (names.filter((name) => name === names[i]).length > 1 ? `${names[i]}, ${run.folder.split("/").at(-1)}` : names[i]));
}

// The ticked runs that the filter leaves, or the first of the table when none is; of either those that have what is asked for.
function compared(shown, most, has = () => true) {
  const ticked = shown.filter((run) => state.ticked.has(run.id));
  const found = (ticked.length ? ticked : shown).filter(has);
  return { runs: found.slice(0, most), ticked: ticked.length ? found.length : 0, picked: ticked.length > 0 };
}
