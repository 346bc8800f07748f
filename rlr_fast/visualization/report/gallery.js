// A grid of which only what is seen is in the document, and one image large.

// Pixels: least width of a tile, what it has around its picture, and the gap between tiles.
const TILE = { width: 184, border: 16, caption: 70, gap: 10 };
const OVERSCAN = 2; // rows of tiles above and below what is seen
const PRINTED = 60; // tiles on paper
const REST = 120; // milliseconds without scrolling
const VIEWS = ["Picture", "Heat map", "Overlay", "Mask"];

function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

function layer(source, kind) {
  return make("img", { src: source, className: kind, alt: "", decoding: "async", draggable: false });
}

// The picture of a row in a view, at most `width` x `height`.
function frame(row, view, width, height, truth) {
  const factor = Math.min(width / row.width, height / row.height);
  const box = make("div", { className: "frame" });
  // A line of a few pixels must stay visible.
  box.style.width = `${Math.max(6, Math.round(row.width * factor))}px`;
  box.style.height = `${Math.max(6, Math.round(row.height * factor))}px`;
  box.dataset.view = view;
  if (view === 1 || view === 3) box.append(layer(row.picture, "picture"));
  if (view === 2) box.append(layer(row.map, "heat"));
  if (view === 3) box.append(layer(row.map, "over"));
  if (view === 3 && row.mask && truth) box.append(layer(row.mask, "outline"));
  if (view === 4 && row.mask) box.append(layer(row.mask, "pixels"));
  if (view === 4 && !row.mask) {
    const text = row.bad === false ? "no defect" : truth ? "no mask" : "no mask: no pixel threshold";
    box.append(make("div", { className: "nothing", textContent: text }));
  }
  return box;
}

// A group of buttons, one of which is on.
class ViewChoice {
  constructor(root, onChange) {
    this.onChange = onChange;
    this.buttons = VIEWS.map((name, i) => {
      const button = make("button", { type: "button", role: "radio" }, `${name} `);
      button.append(make("kbd", { textContent: i + 1 }));
      button.addEventListener("click", () => onChange(i + 1));
      return button;
    });
    root.append(...this.buttons);
    root.addEventListener("keydown", (event) => {
      const turn = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
      if (!turn) return;
      event.preventDefault();
      event.stopPropagation();
      const next = ((this.view - 1 + turn + VIEWS.length) % VIEWS.length) + 1;
      onChange(next);
      this.buttons[next - 1].focus();
    });
  }

  set(view) {
    this.view = view;
    this.buttons.forEach((button, i) => {
      button.setAttribute("aria-checked", i + 1 === view);
      button.tabIndex = i + 1 === view ? 0 : -1;
    });
  }
}

class Gallery {
  // `verdict` says of a row what its tile tells: {text, flagged}.
  constructor(root, verdict, truth, onOpen) {
    Object.assign(this, { root, verdict, truth, onOpen });
    this.rows = [];
    this.tiles = new Map();
    this.view = 1;
    this.active = 0;
    this.printing = false;
    let waiting = false;
    const later = () => {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => {
        waiting = false;
        this.render();
      });
    };
    this.moving = 0;
    const scrolled = () => {
      clearTimeout(this.moving);
      this.moving = setTimeout(() => this.rest(), REST);
      later();
    };
    addEventListener("scroll", scrolled, { passive: true });
    addEventListener("resize", later);
    addEventListener("beforeprint", () => this.print(true));
    addEventListener("afterprint", () => this.print(false));
    root.addEventListener("keydown", (event) => this.key(event));
    root.addEventListener("click", (event) => {
      const tile = event.target.closest(".tile");
      if (!tile) return;
      this.active = Number(tile.dataset.place);
      this.onOpen(this.active);
    });
    root.addEventListener("focusin", (event) => {
      const tile = event.target.closest(".tile");
      if (tile) this.activate(Number(tile.dataset.place));
    });
  }

  show(rows) {
    this.rows = rows;
    this.active = Math.min(this.active, Math.max(0, rows.length - 1));
    this.clear();
    this.render();
  }

  setView(view) {
    this.view = view;
    const focused = this.tiles.get(this.active)?.contains(document.activeElement);
    this.clear();
    this.render();
    if (focused) this.tiles.get(this.active)?.focus({ preventScroll: true });
  }

  // Colors are costly to paint without a GPU: tiles that scrolling brings get them when it rests.
  rest() {
    this.moving = 0;
    for (const tile of this.root.querySelectorAll(".fresh")) tile.classList.remove("fresh");
  }

  clear() {
    this.root.replaceChildren();
    this.tiles.clear();
  }

  print(on) {
    this.printing = on;
    const left = this.rows.length > PRINTED;
    document.getElementById("printed").textContent = left
      ? `The first ${PRINTED} of ${this.rows.length} images.`
      : "";
    this.clear();
    this.render();
  }

  render() {
    const all = this.root.clientWidth + TILE.gap;
    this.columns = Math.max(1, Math.floor(all / (TILE.width + TILE.gap)));
    const width = this.printing ? TILE.width : Math.floor(all / this.columns) - TILE.gap;
    const focused = this.root.contains(document.activeElement);
    if (width !== this.width) this.clear(); // their pictures have another size
    this.width = width;
    const step = width - TILE.border + TILE.caption + TILE.gap;
    this.step = step;
    this.root.style.height = `${Math.ceil(this.rows.length / this.columns) * step}px`;
    const top = -this.root.getBoundingClientRect().top;
    const first = Math.max(0, Math.floor(top / step) - OVERSCAN) * this.columns;
    const last = (Math.ceil((top + innerHeight) / step) + OVERSCAN) * this.columns;
    const wanted = new Set();
    const [from, to] = this.printing ? [0, PRINTED] : [first, last];
    for (let i = from; i < Math.min(to, this.rows.length); i += 1) wanted.add(i);
    // The tile with the focus stays, or keys would lead nowhere.
    if (this.rows.length && !this.printing) wanted.add(this.active);
    for (const [place, tile] of this.tiles) {
      if (wanted.has(place)) continue;
      tile.remove();
      this.tiles.delete(place);
    }
    for (const place of [...wanted].sort((a, b) => a - b)) {
      let tile = this.tiles.get(place);
      if (!tile) {
        tile = this.tile(place);
        const after = [...this.root.children].find((other) => Number(other.dataset.place) > place);
        this.root.insertBefore(tile, after ?? null);
        this.tiles.set(place, tile);
      }
      const x = (place % this.columns) * (width + TILE.gap);
      tile.style.transform = `translate(${x}px,${Math.floor(place / this.columns) * step}px)`;
    }
    if (focused && !this.root.contains(document.activeElement)) {
      this.tiles.get(this.active)?.focus({ preventScroll: true });
    }
  }

  tile(place) {
    const row = this.rows[place];
    const { text, flagged } = this.verdict(row);
    const tile = make("button", { type: "button", className: flagged ? "tile flagged" : "tile" });
    tile.classList.toggle("fresh", this.moving !== 0);
    const box = make("span", { className: "box" });
    const side = this.width - TILE.border;
    tile.style.width = `${this.width}px`;
    tile.style.height = `${this.step - TILE.gap}px`;
    box.style.height = `${side}px`;
    box.append(frame(row, this.view, side, side, this.truth));
    const verdict = make("span", { className: "verdict" });
    verdict.append(make("span", { textContent: text }), make("span", { textContent: number(row.score) }));
    const kind = row.defect === null ? row.categoryName : `${row.categoryName} · ${row.defect}`;
    tile.append(
      box,
      verdict,
      make("span", { className: "name", textContent: row.name, title: row.path }),
      make("span", { className: "kind", textContent: kind, title: kind }),
    );
    tile.dataset.place = place;
    tile.dataset.id = row.id;
    this.mark(tile, place === this.active);
    tile.setAttribute("role", "option");
    tile.setAttribute("aria-setsize", this.rows.length);
    tile.setAttribute("aria-posinset", place + 1);
    tile.setAttribute("aria-label", `${row.name}, ${kind}, ${text}, score ${number(row.score)}`);
    return tile;
  }

  mark(tile, active) {
    tile.tabIndex = active ? 0 : -1;
    tile.setAttribute("aria-selected", active);
  }

  activate(place) {
    const before = this.tiles.get(this.active);
    if (before) this.mark(before, false);
    this.active = place;
    const tile = this.tiles.get(place);
    if (tile) this.mark(tile, true);
  }

  // Scroll to a tile and give it the focus.
  focus(place) {
    if (!this.rows.length) return;
    this.activate(place);
    this.render();
    const tile = this.tiles.get(place);
    tile.focus({ preventScroll: true });
    const box = tile.getBoundingClientRect();
    const bar = document.querySelector(".sticky");
    const stays = getComputedStyle(bar).position === "sticky";
    const covered = (stays ? bar.offsetHeight : 0) + TILE.gap;
    if (box.top < covered) scrollBy(0, box.top - covered);
    else if (box.bottom > innerHeight) scrollBy(0, box.bottom - innerHeight + TILE.gap);
  }

  key(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const page = Math.max(1, Math.floor(innerHeight / this.step)) * this.columns;
    const last = this.rows.length - 1;
    const moves = {
      ArrowLeft: this.active - 1,
      ArrowRight: this.active + 1,
      ArrowUp: this.active - this.columns,
      ArrowDown: this.active + this.columns,
      PageUp: this.active - page,
      PageDown: this.active + page,
      Home: 0,
      End: last,
    };
    if (!(event.key in moves)) return;
    event.preventDefault();
    this.focus(Math.min(last, Math.max(0, moves[event.key])));
  }
}

class Viewer {
  // `describe` gives pairs of name and text that stand beside an image.
  constructor(dialog, describe, truth, onClose) {
    Object.assign(this, { dialog, describe, truth });
    this.part = (name) => dialog.querySelector(`#${name}`);
    this.choice = new ViewChoice(this.part("viewer-views"), (view) => this.setView(view));
    this.part("close").addEventListener("click", () => dialog.close());
    this.part("previous").addEventListener("click", () => this.turn(-1));
    this.part("next").addEventListener("click", () => this.turn(1));
    dialog.addEventListener("close", () => onClose(this.place));
    dialog.addEventListener("keydown", (event) => {
      const turn = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
      if (!turn || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      this.turn(turn);
    });
    addEventListener("resize", () => this.isOpen && this.draw());
  }

  get isOpen() {
    return this.dialog.open;
  }

  open(rows, place, view) {
    Object.assign(this, { rows, place, view });
    this.choice.set(view);
    this.dialog.showModal();
    this.draw();
    this.part("next").focus();
  }

  setView(view) {
    this.view = view;
    this.choice.set(view);
    this.draw();
  }

  turn(by) {
    this.place = Math.min(this.rows.length - 1, Math.max(0, this.place + by));
    this.draw();
  }

  draw() {
    const row = this.rows[this.place];
    this.dialog.dataset.id = row.id;
    this.part("viewer-title").textContent = row.name;
    const stage = this.part("stage");
    const height = Math.max(200, innerHeight * 0.76);
    const box = frame(row, this.view, Math.max(200, stage.clientWidth), height, this.truth);
    stage.replaceChildren(box);
    const facts = this.describe(row, this.place, this.rows.length);
    this.part("viewer-facts").replaceChildren(
      ...facts.flatMap(([name, text]) => [
        make("dt", { textContent: name }),
        make("dd", { textContent: text }),
      ]),
    );
    const file = this.part("viewer-file");
    file.hidden = row.link === null;
    if (row.link !== null) file.href = row.link;
    // Not `disabled`: that would take the focus, and the keys, from the dialog.
    this.part("previous").setAttribute("aria-disabled", this.place === 0);
    this.part("next").setAttribute("aria-disabled", this.place === this.rows.length - 1);
  }
}
