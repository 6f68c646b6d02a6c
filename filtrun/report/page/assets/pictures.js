// Sample grids, differences of configuration, runs that did not finish, and where runs ran.
const BEFORE_AFTER = [["before", "before training"], ["after", "after training"]];
const MOST = 8;
let pictures = 12;

function renderPictures(shown) {
  const { runs, ticked, picked } = compared(shown, 500, (run) => Object.keys(run.images).length);
  const some = runs.slice(0, pictures);
  const names = labels(some);
  $("samples-note").textContent = runs.length
    ? `${some.length} of ${runs.length} ${ticked ? "picked runs" : "runs shown"} with sample grids, scaled down to fit the page.`
    + (DATA.left_out ? ` ${DATA.left_out} pictures were left out: unreadable, or no room.` : "")
    : `No ${picked ? "picked run" : "run shown"} has sample grids.`;
  $("pictures").replaceChildren(...some.map((run, i) => el("article", {}, el("h3", {}, names[i]), ...BEFORE_AFTER
    .filter(([kind]) => run.images[kind] !== undefined)
    .map(([kind, text]) => el("figure", {}, el("img", { src: DATA.images[run.images[kind]], alt: `Samples ${text} of ${names[i]}`, loading: "lazy" }),
      el("figcaption", {}, text))))));
  $("more-pictures").hidden = runs.length <= pictures;
}

function renderDifference(shown) {
  const { runs, ticked } = compared(shown, MOST);
  const chosen = ticked > 1 ? runs : shown.slice(0, 2);
  const table = $("difference");
  if (chosen.length < 2) {
    $("difference-note").textContent = "Pick two runs or more in the table to compare their configurations.";
    return table.replaceChildren();
  }
  const names = labels(chosen, (run) => `${run.methods} ${run.data} seed ${run.seed}`);
  const kept = (name) => !/^(stages|logger|environment\/)/.test(name);
  const rows = Object.keys(DATA.values).filter(kept).filter((k) => new Set(chosen.map((run) => setting(run, k))).size > 1);
  $("difference-note").textContent = `${ticked > 1 ? (ticked > MOST ? `The first ${MOST} of ${ticked} picked runs` : `${ticked} picked runs`) : "The first two runs of the table; pick runs to choose"}: `
    + (rows.length ? `${rows.length} setting${rows.length > 1 ? "s differ" : " differs"}, all others are equal.` : "all settings are equal.");
  table.replaceChildren(el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Setting"), ...names.map((name) => el("th", { scope: "col" }, name)))),
    el("tbody", {}, ...rows.map((k) => el("tr", {}, el("th", { scope: "row" }, k), ...chosen.map((run) => {
      const value = setting(run, k);
      return el("td", { class: `value ${value === undefined ? "absent" : ""}` }, value === undefined ? "absent" : value);
    })))));
}

function renderFailures() {
  const runs = RUNS.filter((run) => run.status !== "finished");
  const broken = DATA.broken.map((path) => el("article", {}, el("h3", {}, path), el("pre", {}, "This file is no record that can be read.")));
  $("failures").replaceChildren(...runs.map((run) => el("article", {}, el("h3", {}, label(run)),
    el("p", { class: "quiet" }, el("span", { class: "bad" }, run.status), ` · ${run.folder}`),
    el("pre", {}, run.error || "No error is recorded."), el("pre", { class: "quiet" }, run.command))), ...broken);
  if (!runs.length && !broken.length) $("failures").append(el("p", { class: "empty" }, "All runs finished."));
}

function renderEnvironment() {
  const keys = Object.keys(DATA.values).filter((k) => k.startsWith("environment/"));
  const kinds = new Map();
  for (const run of RUNS) {
    const mark = JSON.stringify(keys.map((k) => setting(run, k) ?? null));
    if (!kinds.has(mark)) kinds.set(mark, []);
    kinds.get(mark).push(run);
  }
  const columns = [...kinds.values()].sort((a, b) => b.length - a.length);
  $("environments").replaceChildren(el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Setting"),
    ...columns.map((runs) => el("th", { scope: "col" }, `${runs.length} run${runs.length > 1 ? "s" : ""}`)))),
  el("tbody", {}, ...keys.map((k) => el("tr", {}, el("th", { scope: "row" }, k.slice(12)),
    ...columns.map((runs) => el("td", { class: "value" }, setting(runs[0], k) ?? "–"))))));
}
