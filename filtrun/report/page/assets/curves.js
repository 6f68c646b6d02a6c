// Learning curves of the runs compared.
const CURVES = 8;

function curveKeys() {
  const count = new Map();
  for (const run of RUNS) for (const name of Object.keys(run.curves)) count.set(name, (count.get(name) || 0) + 1);
  const first = (name) => (name === "train/loss" ? 0 : name.startsWith("train/") ? 2 : name.includes("/") ? 1 : 3);
  return [...count.keys()].sort((a, b) => first(a) - first(b) || count.get(b) - count.get(a) || a.localeCompare(b));
}

function renderCurves(shown) {
  const name = $("curve-key").value, box = $("curve-chart");
  const { runs, ticked, picked } = compared(shown, CURVES, (run) => own(run.curves, name));
  const said = ticked > CURVES ? `The first ${CURVES} of ${ticked} picked runs.` : ticked ? `${ticked} picked run${ticked > 1 ? "s" : ""}.`
    : `The first ${runs.length} runs of the table that logged it; pick runs there to choose.`;
  $("curve-note").textContent = runs.length ? `${said} At most ${DATA.points} points of each are kept.` : "";
  if (!runs.length) return box.replaceChildren(el("p", { class: "empty" }, `No ${picked ? "picked run" : "run shown"} has logged such a value.`));
  const log = $("curve-log").checked;
  const names = labels(runs);
  const curves = runs.map((run) => run.curves[name]);
  const ys = curves.flatMap((c) => c[1]).filter((v) => !log || v > 0);
  if (!ys.length) return box.replaceChildren(el("p", { class: "empty" }, "Nothing above zero to show on a logarithmic axis."));
  const { root, x, y } = frame(box, {
    say: `Line chart of ${name} over training steps for ${names.join("; ")}`, xs: curves.flatMap((c) => c[0]), ys,
    logX: false, logY: log, tellX: short, tellY: short, titleX: "training step", titleY: name });
  const lines = el("ul", { class: "legend" });
  runs.forEach((run, i) => {
    const points = curves[i][0].map((s, j) => [s, curves[i][1][j]]).filter(([, v]) => !log || v > 0);
    const style = { class: `line s${i}`, "stroke-dasharray": DASHES[i] };
    root.append(svg("polyline", { ...style, points: points.map(([s, v]) => `${x.at(s).toFixed(1)},${y.at(v).toFixed(1)}`).join(" ") }, svg("title", {}, names[i])));
    const last = curves[i][1].at(-1);
    lines.append(key(svg("svg", { width: 34, height: 10, "aria-hidden": "true" }, svg("line", { ...style, x1: 0, x2: 34, y1: 5, y2: 5 })),
      `${names[i]} (last ${short(last)})`));
  });
  box.append(lines);
}
