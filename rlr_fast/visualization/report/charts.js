// Histogram with the threshold as a slider, and curves, as SVG.

// The name of SVG, taken from an element of the page.
const SVG = document.getElementById("histogram").namespaceURI;

function svg(name, attributes, parent, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

const PLOT = { left: 44, right: 708, top: 26, bottom: 222 };
const BINS = 48;
const STEPS = 200;

class Histogram {
  constructor(root, onMove) {
    this.root = root;
    this.onMove = onMove;
    this.bars = svg("g", { role: "img" }, root);
    this.marks = svg("g", {}, root);
    this.slider = svg(
      "g",
      { id: "slider", role: "slider", tabindex: 0, "aria-orientation": "horizontal" },
      root,
    );
    this.line = svg("line", { y1: PLOT.top - 4, y2: PLOT.bottom }, this.slider);
    this.grip = svg("path", { class: "grip", d: "M-7,-12 h14 v9 l-7,8 l-7,-8 z" }, this.slider);
    this.label = svg("text", { y: 11 }, this.slider);
    this.slider.addEventListener("keydown", (event) => this.key(event));
    root.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      event.preventDefault();
      root.setPointerCapture(event.pointerId);
      this.slider.focus({ preventScroll: true });
      this.drag(event);
    });
    root.addEventListener("pointermove", (event) => {
      if (root.hasPointerCapture(event.pointerId)) this.drag(event);
    });
  }

  x(score) {
    const part = (score - this.low) / (this.high - this.low);
    return PLOT.left + Math.min(1, Math.max(0, part)) * (PLOT.right - PLOT.left);
  }

  // Draw the bars of rows; `limits` are thresholds that lie within, too.
  draw(rows, limits, title) {
    const values = [...rows.map((row) => row.score), ...limits];
    const low = values.reduce((a, b) => Math.min(a, b), Infinity);
    const high = values.reduce((a, b) => Math.max(a, b), -Infinity);
    const span = high > low ? high - low : Math.abs(high) || 1;
    this.low = (values.length ? low : 0) - 0.02 * span;
    this.high = (values.length ? high : 1) + 0.02 * span;
    const sums = bins(rows, this.low, this.high, BINS);
    const most = sums.reduce((a, b) => Math.max(a, b.normal + b.defect), 1);
    const width = (PLOT.right - PLOT.left) / BINS;
    const unit = (PLOT.bottom - PLOT.top) / most;
    this.bars.replaceChildren();
    this.bars.setAttribute("aria-label", title);
    sums.forEach((sum, i) => {
      let y = PLOT.bottom;
      for (const kind of ["normal", "defect"]) {
        if (!sum[kind]) continue;
        y -= sum[kind] * unit;
        const place = { x: PLOT.left + i * width + 0.5, y, width: width - 1, height: sum[kind] * unit };
        svg("rect", { class: kind, ...place }, this.bars);
      }
    });
    svg("path", { class: "axis", d: `M${PLOT.left},${PLOT.top} V${PLOT.bottom} H${PLOT.right}` }, this.bars);
    svg("text", { x: PLOT.left - 6, y: PLOT.top + 8, "text-anchor": "end" }, this.bars, most);
    svg("text", { x: PLOT.left - 6, y: PLOT.bottom, "text-anchor": "end" }, this.bars, 0);
    for (const score of ticks(this.low, this.high, 7)) {
      const x = this.x(score);
      svg("path", { class: "axis", d: `M${x},${PLOT.bottom} v4` }, this.bars);
      const place = { x, y: PLOT.bottom + 17, "text-anchor": "middle" };
      svg("text", place, this.bars, number(score));
    }
    const middle = { x: (PLOT.left + PLOT.right) / 2, y: PLOT.bottom + 34, "text-anchor": "middle" };
    svg("text", middle, this.bars, "image score (higher is more anomalous)");
  }

  // Whether a threshold lies within what is drawn.
  holds(value) {
    return this.low <= value && value <= this.high;
  }

  // Put the line at a threshold; where classes have their own, `own`, this is their median.
  set(value, name, own) {
    const each = own.length > 0;
    this.value = value;
    this.marks.replaceChildren();
    for (const limit of own) {
      const x = this.x(limit);
      svg("line", { class: "own-limit", x1: x, x2: x, y1: PLOT.bottom - 8, y2: PLOT.bottom + 4 }, this.marks);
    }
    const x = this.x(value);
    this.slider.classList.toggle("each", each);
    this.line.setAttribute("x1", x);
    this.line.setAttribute("x2", x);
    this.grip.setAttribute("transform", `translate(${x},${PLOT.top + 4})`);
    const left = x > (PLOT.left + PLOT.right) / 2;
    this.label.setAttribute("x", left ? x - 10 : x + 10);
    this.label.setAttribute("text-anchor", left ? "end" : "start");
    const text = each ? "each class at its own threshold" : `threshold ${number(value)}`;
    this.label.textContent = text;
    this.slider.setAttribute("aria-label", `Threshold of ${name}`);
    this.slider.setAttribute("aria-valuemin", this.low);
    this.slider.setAttribute("aria-valuemax", this.high);
    this.slider.setAttribute("aria-valuenow", value);
    this.slider.setAttribute("aria-valuetext", text);
  }

  move(value) {
    this.onMove(Math.min(this.high, Math.max(this.low, value)));
  }

  drag(event) {
    const box = this.root.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * 720;
    const part = (x - PLOT.left) / (PLOT.right - PLOT.left);
    this.move(this.low + part * (this.high - this.low));
  }

  key(event) {
    const step = (this.high - this.low) / STEPS;
    const moves = {
      ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10,
    };
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key in moves) this.move(this.value + moves[event.key] * step);
    else if (event.key === "Home") this.move(this.low);
    else if (event.key === "End") this.move(this.high);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }
}

const SQUARE = { left: 40, right: 250, top: 12, bottom: 216 };
const squareX = (value) => SQUARE.left + value * (SQUARE.right - SQUARE.left);
const squareY = (value) => SQUARE.bottom - value * (SQUARE.bottom - SQUARE.top);

// A curve in the unit square; `nothing` says why there is none.
function drawCurve(root, points, names, nothing) {
  root.replaceChildren();
  const { left, right, top, bottom } = SQUARE;
  const [x, y] = [squareX, squareY];
  svg("path", { class: "axis", d: `M${left},${top} V${bottom} H${right}` }, root);
  for (const value of [0, 0.5, 1]) {
    svg("text", { x: x(value), y: bottom + 15, "text-anchor": "middle" }, root, value);
    svg("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, root, value);
  }
  svg("text", { x: (left + right) / 2, y: bottom + 33, "text-anchor": "middle" }, root, names[0]);
  const turned = { transform: `translate(12,${(top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle" };
  svg("text", turned, root, names[1]);
  if (!points) {
    svg("text", { x: (left + right) / 2, y: (top + bottom) / 2, "text-anchor": "middle" }, root, nothing);
    return;
  }
  const way = points.map(([a, b]) => `${x(a).toFixed(2)},${y(b).toFixed(2)}`).join(" L");
  svg("path", { class: "curve-line", d: `M${way}` }, root);
}

// Put the threshold's point on a curve, or take it away: null.
function drawPoint(root, point, names) {
  root.querySelector(".point")?.remove();
  root.setAttribute("role", "img");
  root.setAttribute("aria-label", `${names[1]} over ${names[0]}`);
  if (!root.querySelector(".curve-line") || !point || point.includes(null)) return;
  const [x, y] = point;
  const mark = svg("circle", { class: "point", r: 5.5, cx: squareX(x), cy: squareY(y) }, root);
  mark.dataset.x = x;
  mark.dataset.y = y;
  const told = `at the threshold ${percent(y)} and ${percent(x)}`;
  root.setAttribute("aria-label", `${names[1]} over ${names[0]}; ${told}`);
}
