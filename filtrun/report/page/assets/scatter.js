// Quality against cost, with the points that no other beats in both.

// Places of the points on the Pareto front: at lowest cost, and better than every cheaper one. Equal points are all on it.
function pareto(points, higher) {
  const gain = (p) => (higher ? p.y : -p.y);
  const order = points.map((_, i) => i).sort((i, j) => points[i].x - points[j].x || gain(points[j]) - gain(points[i]));
  const front = [];
  let best = -Infinity, at = NaN;
  for (const i of order) {
    const p = points[i];
    if (gain(p) > best) { best = gain(p); at = p.x; front.push(i); } else if (gain(p) === best && p.x === at) front.push(i);
  }
  return front;
}

function pointsOf(shown, metric, cost) {
  const finished = shown.filter((run) => run.status === "finished");
  const groups = $("scatter-points").value === "means" ? grouped(finished) : finished.map((run) => [run]);
  return groups.map((group) => {
    const both = group.filter((run) => numberOf(run, metric) !== undefined && numberOf(run, cost) !== undefined);
    return both.length ? { runs: both, x: mean(both.map((run) => numberOf(run, cost))), y: mean(both.map((run) => numberOf(run, metric))) } : null;
  }).filter(Boolean);
}

// What points differ in that makes them unfit for one front: with names of values.
function unlike(points) {
  const parts = [["task", "tasks"], ["data", "data sets"], ["model", "models"], ["scale", "scales"], ["steps", "training steps"], ["batch", "batch sizes"]];
  const get = { steps: (run) => setting(run, "trainer.steps"), batch: (run) => setting(run, "trainer.batch_size") };
  return parts.map(([id, title]) => {
    const values = [...new Set(points.flatMap((p) => p.runs.map((run) => (get[id] ? get[id](run) : run[id]))))].filter((v) => v !== undefined);
    return values.length > 1 ? `${title} (${values.slice(0, 4).join(", ")}${values.length > 4 ? ", …" : ""})` : "";
  }).filter(Boolean);
}

// Offer what the runs shown have; what was chosen stays chosen as long as it is there.
function offer(select, keys, usual, tell) {
  const before = select.value;
  select.replaceChildren(...keys.map((k) => el("option", { value: k }, tell(k))));
  select.value = keys.includes(before) ? before : usual;
}

function offerScatter(shown) {
  const finished = shown.filter((run) => run.status === "finished");
  const count = (k) => finished.filter((run) => numberOf(run, k) !== undefined).length;
  const metrics = DATA.metrics.map((m) => m.key).filter(count).sort((a, b) => !better(a) - !better(b));
  const most = (keys) => keys.reduce((a, b) => (a && count(a) >= count(b) ? a : b), "");
  const main = metrics.filter((k) => k.startsWith("test/") && better(k));
  offer($("scatter-metric"), metrics, most(main.length ? main : metrics), (k) => `${titleOf(k)} · ${k}`);
  const costs = DATA.costs.map((c) => `cost/${c.key}`).filter(count);
  const varied = costs.filter((k) => new Set(finished.map((run) => numberOf(run, k))).size > 1);
  offer($("scatter-cost"), costs, varied[0] || costs[0] || "", titleOf);
}

function renderScatter(shown) {
  const metric = $("scatter-metric").value, cost = $("scatter-cost").value, box = $("scatter-chart");
  const points = metric && cost ? pointsOf(shown, metric, cost) : [];
  const mixed = unlike(points);
  $("front-head").hidden = !points.length;
  $("front").parentElement.hidden = !points.length;
  $("scatter-warning").hidden = !mixed.length;
  $("scatter-warning").textContent = `Not a fair comparison as it stands: the points mix ${mixed.join(", ")}. Filter the runs above to compare like with like.`;
  if (!points.length) {
    box.replaceChildren(el("p", { class: "empty" }, "No finished run shown has both values."));
    $("front").replaceChildren();
    $("front-note").textContent = "";
    return;
  }
  const side = better(metric);
  const higher = side !== "lower";
  const front = side ? pareto(points, higher) : [];
  const xs = points.map((p) => p.x), ys = points.map((p) => p.y);
  const positive = xs.filter((v) => v > 0);
  const logX = positive.length > 1 && xs.every((v) => v >= 0) && Math.max(...positive) > 20 * Math.min(...positive);
  const methods = [...new Set(points.map((p) => p.runs[0].methods))].sort();
  const { root, x, y } = frame(box, {
    say: `Scatter plot of ${titleOf(metric)} against ${titleOf(cost)}: ${points.length} points, ${front.length} on the Pareto front, listed in the table below`,
    xs, ys, logX, logY: false, tellX: (v) => told(v, cost), tellY: (v) => told(v, metric),
    titleX: `${titleOf(cost)} (lower is cheaper${logX ? ", logarithmic" : ""})`, titleY: `${titleOf(metric)}${side ? ` (${side} is better)` : ""}` });
  const place = (p) => [x.at(p.x), y.at(p.y)];
  if (front.length > 1) {
    root.append(svg("path", { class: "front", d: front.map((i, n) => {
      const [a, b] = place(points[i]);
      return n ? `H${a.toFixed(1)}V${b.toFixed(1)}` : `M${a.toFixed(1)} ${b.toFixed(1)}`;
    }).join("") }));
  }
  points.forEach((p, i) => {
    const title = `${label(p.runs[0])}${p.runs.length > 1 ? ` and ${p.runs.length - 1} more seeds` : ""}: ${told(p.y, metric)} at ${told(p.x, cost)}`;
    if (front.includes(i)) root.append(svg("circle", { class: "ring", cx: place(p)[0], cy: place(p)[1], r: 10 }));
    const drawn = mark(methods.indexOf(p.runs[0].methods), ...place(p));
    drawn.append(svg("title", {}, title));
    root.append(drawn);
  });
  const legend = el("ul", { class: "legend" });
  methods.forEach((name, i) => legend.append(key(svg("svg", { width: 14, height: 14, "aria-hidden": "true" }, mark(i, 7, 7)), name)));
  if (side) legend.append(key(svg("svg", { width: 24, height: 24, "aria-hidden": "true" }, svg("circle", { class: "ring", cx: 12, cy: 12, r: 10 })), "on the Pareto front"));
  box.append(legend);
  $("front-note").textContent = side ? "No other point shown is at least as good at no more cost, and better in one of the two." : "This metric has no better side, so there is no front.";
  $("front").replaceChildren(el("thead", {}, el("tr", {}, ...["Method", "Data", "Model", "Seeds"].map((t) => el("th", { scope: "col" }, t)),
    ...[cost, metric].map((k) => el("th", { scope: "col", class: "number" }, titleOf(k))))),
  el("tbody", {}, ...front.map((i) => points[i]).map((p) => el("tr", {}, el("th", { scope: "row" }, p.runs[0].methods), el("td", {}, p.runs[0].data),
    el("td", {}, p.runs[0].model), el("td", {}, p.runs.map((run) => run.seed).join(", ")), el("td", { class: "number" }, told(p.x, cost)),
    el("td", { class: "number" }, told(p.y, metric))))));
}
