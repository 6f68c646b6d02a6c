// The page is put together, and what is clicked is answered.
let shown = [];

function renderCompared() {
  renderCurves(shown);
  renderPictures(shown);
  renderDifference(shown);
}

function render() {
  const runs = chosenRuns();
  shown = renderTable(runs);
  offerScatter(shown);
  renderScatter(shown);
  renderCompared();
}

function fillChoices() {
  for (const [id, title] of [["task", "Task"], ["data", "Data"], ["model", "Model"], ["methods", "Method"], ["status", "Status"]]) {
    const values = [...new Set(RUNS.map((run) => run[id]))].sort();
    const select = el("select", { id: `choose-${id}` }, el("option", { value: "" }, "all"), ...values.map((v) => el("option", { value: v }, v)));
    select.addEventListener("change", () => { state.choices[id] = select.value; render(); });
    $("choices").append(el("label", {}, title, select));
  }
}

function fillTop() {
  $("title").textContent = DATA.title;
  $("made").textContent = `Made ${DATA.made}${DATA.where.length ? `; only runs for which ${DATA.where.join(", ")}` : ""}. Everything here is from records of runs.`;
  const count = (values) => new Set(values).size;
  const open = RUNS.filter((run) => run.status !== "finished").length;
  const tiles = [["Runs", RUNS.length], ["Settings", count(RUNS.map((r) => r.group))], ["Methods", count(RUNS.map((r) => r.methods))],
    ["Tasks", count(RUNS.map((r) => r.task))], ["Data sets", count(RUNS.map((r) => r.data))], ["Not finished", open]];
  $("tiles").append(...tiles.map(([title, value]) => el("div", {}, el("dt", {}, title), el("dd", {}, value.toLocaleString("en")))));
  $("tuning-note").textContent = `${DATA.tuning.line}.`;
  $("tuning-warning").textContent = DATA.tuning.warnings.join("; ");
  $("tuning-warning").hidden = !DATA.tuning.warnings.length;
  for (const head of document.querySelectorAll("main section[id] > h2")) {
    $("sections").append(el("li", {}, el("a", { href: `#${head.parentElement.id}` }, head.textContent)));
  }
}

function stored(value) {
  try { // a browser may keep nothing for a file opened from disk
    if (value) localStorage.setItem("filtrun-theme", value);
    return localStorage.getItem("filtrun-theme");
  } catch { return null; }
}

function theme(value) {
  if (value) document.documentElement.dataset.theme = value;
  $("theme").setAttribute("aria-pressed", String(dark()));
}

const dark = () => (document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";

function toggle(id, name) {
  $(id).addEventListener("click", () => {
    state[name] = !state[name];
    $(id).setAttribute("aria-pressed", String(state[name]));
    render();
  });
}

fillTop();
fillChoices();
$("curve-key").append(...curveKeys().map((name) => el("option", { value: name }, name)));
theme(["dark", "light"].includes(stored()) ? stored() : "");
$("theme").addEventListener("click", () => { const next = dark() ? "light" : "dark"; theme(next); stored(next); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => theme(""));
let waiting = 0;
$("words").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(() => { state.words = $("words").value; render(); }, 120); });
$("filter").addEventListener("submit", (event) => event.preventDefault());
$("filter").addEventListener("reset", () => { state.words = ""; state.choices = {}; setTimeout(render); });
toggle("means", "means");
toggle("all-metrics", "all");
$("untick").addEventListener("click", () => { state.ticked.clear(); render(); });
$("more").addEventListener("click", () => { state.rows += 500; render(); });
$("more-pictures").addEventListener("click", () => { pictures += 24; renderPictures(shown); });
for (const id of ["curve-key", "curve-log"]) $(id).addEventListener("change", () => renderCurves(shown));
for (const id of ["scatter-metric", "scatter-cost", "scatter-points"]) $(id).addEventListener("change", () => renderScatter(shown));
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; renderCurves(shown); renderScatter(shown); } });
renderFailures();
renderEnvironment();
render();
document.documentElement.dataset.ready = "yes";
