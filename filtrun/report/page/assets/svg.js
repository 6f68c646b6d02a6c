// Drawing of charts: elements, scales, axes and marks.
const SPACE = "http://www.w3.org/2000/svg";
const DASHES = ["", "7 4", "2 3", "9 3 2 3", "4 2", "12 4", "1 4", "6 2 2 2 2 2"];

function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS(SPACE, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children.filter(Boolean));
  return made;
}

const between = (low, high, a, b) => (value) => a + ((value - low) / (high - low || 1)) * (b - a);

function ticksOf(low, high, most) {
  const raw = (high - low) / Math.max(1, most) || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((f) => f * power).find((s) => s >= raw * 0.999999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) found.push(Number((i * step).toPrecision(12)));
  return found;
}

// A scale of numbers from a to b in pixels: {at, ticks}. A logarithmic one gives zero a place of its own before the rest.
function scaleOf(values, a, b, logarithmic, most) {
  const positive = logarithmic ? values.filter((v) => v > 0) : values;
  let low = Math.min(...positive), high = Math.max(...positive);
  if (!positive.length) return { at: () => (a + b) / 2, ticks: [0] };
  if (!logarithmic) {
    const room = (high - low) * 0.05 || Math.abs(high) * 0.05 || 1;
    const ends = [low - room, high + room];
    return { at: between(...ends, a, b), ticks: ticksOf(...ends, most) };
  }
  low = Math.log10(low); high = Math.log10(high);
  const room = (high - low) * 0.05 || 0.3;
  const zero = values.some((v) => v === 0);
  const start = zero ? a + Math.sign(b - a) * Math.min(48, Math.abs(b - a) * 0.15) : a;
  const place = between(low - room, high + room, start, b);
  const ticks = [];
  for (let power = Math.floor(low - room); power <= high + room; power += 1) {
    for (const factor of high - low > 2 ? [1] : high - low > 1 ? [1, 3] : [1, 2, 5]) ticks.push(factor * 10 ** power);
  }
  let shown = ticks.filter((t) => Math.log10(t) >= low - room && Math.log10(t) <= high + room);
  if (shown.length < 2) shown = ticksOf(10 ** (low - room), 10 ** (high + room), most).filter((t) => t > 0);
  const every = Math.ceil(shown.length / Math.max(2, most));
  shown = shown.filter((_, i) => i % every === 0);
  return { at: (v) => (v > 0 ? place(Math.log10(v)) : a), ticks: zero ? [0, ...shown] : shown };
}

// An empty chart in a box as wide as there is room: {root, plot, x, y}; `say` is its accessible name.
function frame(box, { say, xs, ys, logX, logY, tellX, tellY, titleX, titleY }) {
  const width = Math.max(260, box.clientWidth - 24), height = Math.round(Math.min(400, Math.max(260, width * 0.5)));
  const tickY = (v) => tellY(v);
  const inner = { top: 26, bottom: height - 46, right: width - 14 };
  const y = scaleOf(ys, inner.bottom, inner.top, logY, 5);
  inner.left = 14 + Math.min(96, Math.max(...y.ticks.map((t) => tickY(t).length)) * 7);
  const x = scaleOf(xs, inner.left + 10, inner.right - 6, logX, Math.floor(width / 110));
  const root = svg("svg", { role: "img", "aria-label": say, width, height, viewBox: `0 0 ${width} ${height}` });
  for (const t of y.ticks) {
    root.append(svg("line", { class: "grid", x1: inner.left, x2: inner.right, y1: y.at(t), y2: y.at(t) }),
      svg("text", { x: inner.left - 6, y: y.at(t) + 4, "text-anchor": "end" }, tickY(t)));
  }
  root.append(svg("line", { class: "axis", x1: inner.left, x2: inner.right, y1: inner.bottom, y2: inner.bottom }));
  for (const t of x.ticks) {
    root.append(svg("line", { class: "axis", x1: x.at(t), x2: x.at(t), y1: inner.bottom, y2: inner.bottom + 4 }),
      svg("text", { x: x.at(t), y: inner.bottom + 18, "text-anchor": "middle" }, tellX(t)));
  }
  root.append(svg("text", { x: inner.left, y: 14 }, titleY),
    svg("text", { x: inner.right, y: height - 8, "text-anchor": "end" }, titleX));
  box.replaceChildren(root);
  return { root, x, y };
}

const CLOSED = [
  (x, y, r) => `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0Z`,
  (x, y, r) => `M${x - r} ${y - r}h${2 * r}v${2 * r}h${-2 * r}Z`,
  (x, y, r) => `M${x} ${y - r}L${x + r} ${y + r}H${x - r}Z`,
  (x, y, r) => `M${x} ${y - r - 1}L${x + r + 1} ${y}L${x} ${y + r + 1}L${x - r - 1} ${y}Z`,
  (x, y, r) => `M${x} ${y + r}L${x + r} ${y - r}H${x - r}Z`,
];
const PLUS = (x, y, r) => `M${x - r} ${y}H${x + r}M${x} ${y - r}V${y + r}`;
const TIMES = (x, y, r) => `M${x - r} ${y - r}L${x + r} ${y + r}M${x + r} ${y - r}L${x - r} ${y + r}`;
const OPEN = [
  TIMES, PLUS, (x, y, r) => PLUS(x, y, r) + TIMES(x, y, r * 0.7),
  (x, y, r) => `M${x - r} ${y - r / 2}H${x + r}M${x - r} ${y + r / 2}H${x + r}`,
  (x, y, r) => `M${x - r / 2} ${y - r}V${y + r}M${x + r / 2} ${y - r}V${y + r}`,
  (x, y, r) => `M${x} ${y + r}V${y}L${x - r} ${y - r}M${x} ${y}L${x + r} ${y - r}`,
];
const SHAPES = [
  ...CLOSED.map((d) => ({ d, solid: true })), ...OPEN.map((d) => ({ d })), ...CLOSED.map((d) => ({ d })),
  ...[(x, y) => `M${x - 1} ${y}h2`, (x, y) => PLUS(x, y, 2.5)].flatMap((inner) => CLOSED.map((d) => ({ d: (x, y, r) => d(x, y, r + 1) + inner(x, y) }))),
];

// A mark of one of 26 shapes: a method is told by its shape, and its colour only helps.
function mark(kind, x, y, r = 5) {
  const { d, solid } = SHAPES[kind % SHAPES.length], colour = kind % 8;
  return svg("path", { d: d(x, y, r), class: `mark s${colour} ${solid ? `f${colour} solid` : ""}` });
}

const key = (drawn, text) => el("li", {}, drawn, text);
