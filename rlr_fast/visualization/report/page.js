// The page: its data, the state of thresholds and filters, and who hears of a change.

const byId = (id) => document.getElementById(id);
const read = (id) => JSON.parse(byId(id).textContent);

const data = read("data");
const labeled = data.kind === "evaluation";
const promises = new Map(data.thresholds.map(([name, value, pooled]) => [name, { value, pooled }]));
const rows = read("rows")
  .map(([id, path, link, category, defect, score, pValue, calibrated, height, width, ...pictures]) => ({
    id, path, link, category, defect, score, pValue, height, width,
    calibrated: Boolean(calibrated),
    name: path.split(/[/\\]/).pop(),
    categoryName: category ?? "no class",
    bad: defect === null ? null : defect !== data.normal,
    picture: pictures[0],
    map: pictures[1],
    mask: pictures[2],
    text: `${path}\n${category ?? ""}\n${defect ?? ""}`.toLowerCase(),
  }))
  .sort((a, b) => a.id - b.id);
const categories = [...new Set(rows.map((row) => row.category))].sort();
const choices = categories.length === 1 ? categories : [ALL, ...categories];
const starts = new Map(
  categories.map((category) => {
    const own = rows.filter((row) => row.category === category);
    return [category, startOf(own, promises.get(category), data.alpha)];
  }),
);
const thresholds = new Map([...starts].map(([category, start]) => [category, start.value]));
const state = {
  category: categories.length === 1 ? categories[0] : ALL,
  withCalibrated: false,
  defect: ALL,
  decision: "all",
  text: "",
  order: labeled ? "misses" : "high",
  view: 1,
};

const flagged = (row) => row.score > thresholds.get(row.category);
const nameOf = (category) => (category === ALL ? "all classes" : (category ?? "no class"));

function verdict(row) {
  const above = flagged(row);
  if (row.bad === null) return { text: above ? "▲ flagged" : "● passed", flagged: above };
  if (row.bad) return { text: above ? "▲ found" : "✕ miss", flagged: above };
  return { text: above ? "◇ false alarm" : "● passed", flagged: above };
}

const histogram = new Histogram(byId("histogram"), setThreshold);
let common = null; // the threshold of all classes, once one is set for all

function middle() {
  return common ?? median(thresholds.values());
}

function setThreshold(value) {
  if (state.category === ALL) {
    common = value;
    for (const category of categories) thresholds.set(category, value);
  } else {
    common = null;
    thresholds.set(state.category, value);
  }
  if (histogram.holds(value)) showCounts();
  else showScores();
  later();
}

function reset() {
  common = null;
  for (const [category, start] of starts) {
    if (state.category === ALL || state.category === category) thresholds.set(category, start.value);
  }
  showScores();
  later();
}

const ROC = ["false alarms", "recall"];
const PR = ["recall", "precision"];

// What a new choice of class or rows changes: bars, curves, and all that a threshold changes.
function showScores() {
  const all = state.category === ALL;
  const chosen = rows.filter((row) => all || row.category === state.category);
  const of = all ? categories : [state.category];
  const limits = of.flatMap((category) => [starts.get(category).value, thresholds.get(category)]);
  const title = `Scores of ${nameOf(state.category)}: ${chosen.length} images`;
  histogram.draw(chosen, limits, title);
  const caption = byId("histogram-caption");
  caption.replaceChildren(title);
  if (labeled) {
    caption.append(make("i", { className: "normal" }), "normal", make("i", { className: "defect" }), "with a defect");
  }
  state.counted = counted(rows, state.category, state.withCalibrated);
  byId("not-counted").hidden = state.counted.length === chosen.length;
  if (labeled) {
    const { roc, pr } = curves(state.counted);
    const nothing = state.counted.some((row) => row.bad === false)
      ? "no image with a defect"
      : "no normal image counts";
    drawCurve(byId("roc"), roc, ROC, nothing);
    drawCurve(byId("pr"), pr, PR, nothing);
  }
  showCounts();
}

function showCounts() {
  const all = state.category === ALL;
  const own = new Set(all && common === null ? thresholds.values() : []);
  const each = own.size > 1; // one may hold for all, as one that is calibrated on all does
  const value = all ? middle() : thresholds.get(state.category);
  histogram.set(value, nameOf(state.category), each ? [...own] : []);
  const field = byId("threshold");
  if (document.activeElement !== field) field.value = each ? "" : value;
  field.placeholder = each ? "each its own" : "";
  const moved = !all && value !== starts.get(state.category).value;
  byId("basis").textContent = all
    ? each ? "Each class has its own threshold; moving the line sets one for all." : "One threshold for all classes."
    : `${moved ? "Moved. It started at " : "It stands at "}${number(starts.get(state.category).value)}: ${starts.get(state.category).basis}.`;
  const sum = countErrors(state.counted, flagged);
  const cards = [["Flagged", share(sum.flagged, sum.total), "flagged"]];
  if (labeled) {
    cards.push(
      ["◇ False alarms", share(sum.alarms, sum.normal), "alarms"],
      ["✕ Misses", share(sum.misses, sum.anomalous), "misses"],
      ["Precision", percent(sum.precision), "precision"],
      ["Recall", percent(sum.recall), "recall"],
    );
  }
  pairs(byId("counts"), cards);
  if (labeled) {
    // Classes with their own thresholds are no point of one curve.
    const rate = sum.normal ? sum.alarms / sum.normal : null;
    drawPoint(byId("roc"), each ? null : [rate, sum.recall], ROC);
    drawPoint(byId("pr"), each ? null : [sum.recall, sum.precision], PR);
  }
}

function showThresholds() {
  const headings = ["class", "threshold", "where it starts", "flagged"];
  if (labeled) headings.push("false alarms", "misses", "precision", "recall");
  const cells = (chosen) => {
    const sum = countErrors(chosen, flagged);
    const few = [share(sum.flagged, sum.total)];
    if (!labeled) return few;
    return [
      ...few, share(sum.alarms, sum.normal), share(sum.misses, sum.anomalous),
      percent(sum.precision), percent(sum.recall),
    ];
  };
  const lines = categories.map((category) => {
    const button = make("button", { type: "button", className: "plain", textContent: nameOf(category) });
    button.addEventListener("click", () => setCategory(category));
    const chosen = counted(rows, category, state.withCalibrated);
    return [button, number(thresholds.get(category)), starts.get(category).short, ...cells(chosen)];
  });
  const all = counted(rows, ALL, state.withCalibrated);
  if (categories.length > 1) lines.push(["in all", "", "", ...cells(all)]);
  fill(byId("thresholds-table"), headings, lines, categories.length > 1);
  byId("yaml").value = toYaml(thresholds);
  byId("yaml").rows = Math.min(12, thresholds.size + 1);
  byId("copied").textContent = "";
}

const DECISIONS = {
  all: ["all", () => true],
  flagged: ["▲ flagged", flagged],
  passed: ["● passed", (row) => !flagged(row)],
};
if (labeled) {
  Object.assign(DECISIONS, {
    alarms: ["◇ false alarms", (row) => row.bad === false && flagged(row)],
    misses: ["✕ misses", (row) => row.bad === true && !flagged(row)],
    errors: ["✕ ◇ both errors", (row) => row.bad !== flagged(row)],
  });
}

const above = (row) => row.score - thresholds.get(row.category);
const ORDERS = {
  high: ["highest score first", (a, b) => b.score - a.score],
  low: ["lowest score first", (a, b) => a.score - b.score],
  near: ["nearest to the threshold first", (a, b) => Math.abs(above(a)) - Math.abs(above(b))],
  files: ["as the files", () => 0],
};
if (labeled) {
  Object.assign(ORDERS, {
    // Images with a defect first, the farthest below the threshold at the top; and the other way.
    misses: ["worst misses first", (a, b) => b.bad - a.bad || above(a) - above(b)],
    alarms: ["worst false alarms first", (a, b) => a.bad - b.bad || above(b) - above(a)],
  });
}

function selected() {
  const keep = DECISIONS[state.decision][1];
  const words = state.text.toLowerCase();
  return rows
    .filter(
      (row) =>
        (state.category === ALL || row.category === state.category) &&
        (state.defect === ALL || row.defect === state.defect) &&
        row.text.includes(words) &&
        keep(row),
    )
    .sort((a, b) => ORDERS[state.order][1](a, b) || a.id - b.id);
}

const gallery = new Gallery(byId("grid"), verdict, labeled, (place) =>
  viewer.open(gallery.rows, place, state.view),
);
const viewer = new Viewer(byId("viewer"), describe, labeled, (place) => gallery.focus(place));
const choice = new ViewChoice(byId("views"), setView);

function describe(row, place, count) {
  const limit = thresholds.get(row.category);
  const facts = [
    ["Decision", verdict(row).text],
    ["Score", `${row.score}`],
    ["Threshold", `${limit}`],
    ["Class", row.categoryName],
  ];
  if (row.defect !== null) facts.push(["Defect", row.defect]);
  if (row.pValue !== null) facts.push(["p-value", number(row.pValue)]);
  if (row.calibrated) facts.push(["Calibration", "its score is one of those that made the threshold"]);
  facts.push(["File", row.path], ["Pixels", `${row.width} × ${row.height}`], ["Place", `${place + 1} of ${count}`]);
  return facts;
}

function showGallery() {
  const chosen = selected();
  byId("shown").textContent = `${chosen.length} of ${rows.length} images`;
  byId("empty").hidden = chosen.length > 0;
  byId("empty").textContent = rows.length ? "No image fits these filters." : "There is no image.";
  gallery.show(chosen);
}

let waiting = false;
function later() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    showThresholds();
    showGallery();
  });
}

function setView(view) {
  state.view = view;
  choice.set(view);
  gallery.setView(view);
}

function setCategory(category) {
  state.category = category;
  for (const select of document.querySelectorAll(".class-choice")) {
    select.value = choices.indexOf(category);
  }
  showScores();
  later();
}

// Fill a select with [value, text]; values are places in the list, since names are any text.
function options(select, values, text, chosen, onChange) {
  select.replaceChildren(
    ...values.map((value, i) => make("option", { value: i, textContent: text(value) })),
  );
  select.value = values.indexOf(chosen);
  select.addEventListener("change", () => onChange(values[Number(select.value)]));
}

function start() {
  showHead();
  showMetrics();
  for (const kind of ["red", "green", "blue", "opacity"]) {
    for (const element of document.querySelectorAll(`[data-table=${kind}]`)) {
      element.setAttribute("tableValues", data.tables[kind].join(" "));
    }
  }
  const { red, green, blue } = data.tables;
  const stops = red.map((value, i) => `rgb(${[value, green[i], blue[i]].map((c) => Math.round(255 * c))})`);
  byId("scale-bar").style.background = `linear-gradient(90deg, ${stops})`;
  const [low, high] = data.scale;
  byId("scale-text").textContent = data.relative
    ? "Colors of a heat map: the middle is the pixel threshold of its class, where it has one."
    : `Colors of a heat map: ${number(low)} at the left, ${number((low + high) / 2)} in the middle, ${number(high)} at three quarters.`;
  if (labeled) byId("scale-text").textContent += " In the overlay, a cyan line surrounds the ground truth.";

  for (const select of document.querySelectorAll(".class-choice")) {
    options(select, choices, nameOf, state.category, (category) => setCategory(category));
  }
  const defects = [ALL, ...[...new Set(rows.map((row) => row.defect))].sort()];
  byId("defect-label").hidden = !labeled;
  options(byId("defect-filter"), defects, (defect) => (defect === ALL ? "all" : `${defect}`), ALL, (defect) => {
    state.defect = defect;
    showGallery();
  });
  options(byId("decision-filter"), Object.keys(DECISIONS), (key) => DECISIONS[key][0], "all", (key) => {
    state.decision = key;
    showGallery();
  });
  options(byId("order"), Object.keys(ORDERS), (key) => ORDERS[key][0], state.order, (key) => {
    state.order = key;
    showGallery();
  });
  byId("text-filter").addEventListener("input", (event) => {
    state.text = event.target.value;
    showGallery();
  });
  byId("threshold").addEventListener("input", (event) => {
    if (Number.isFinite(event.target.valueAsNumber)) setThreshold(event.target.valueAsNumber);
  });
  byId("threshold").addEventListener("blur", showCounts);
  byId("reset").addEventListener("click", reset);
  const known = rows.filter((row) => row.calibrated && row.bad === false).length;
  byId("calibrated-label").hidden = known === 0;
  byId("calibrated-label").querySelector("span").textContent =
    `Count the ${known} normal images that the thresholds rest on, too`;
  byId("with-calibrated").addEventListener("change", (event) => {
    state.withCalibrated = event.target.checked;
    showScores();
    later();
  });
  byId("copy").addEventListener("click", copy);
  for (const figure of document.querySelectorAll(".curve")) figure.hidden = !labeled;
  byId("scores").hidden = byId("gallery").hidden = rows.length === 0;

  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches?.("input:not([type=checkbox]), textarea, select");
    if (typing || event.altKey || event.ctrlKey || event.metaKey) return;
    if (!/^[1-4]$/.test(event.key)) return;
    event.preventDefault();
    if (viewer.isOpen) viewer.setView(Number(event.key));
    else setView(Number(event.key));
  });
  choice.set(state.view);
  if (!rows.length) return;
  showScores();
  showThresholds();
  showGallery();
}

async function copy() {
  const text = byId("yaml");
  text.focus();
  text.select();
  let done = false;
  try {
    await navigator.clipboard.writeText(text.value);
    done = true;
  } catch {
    done = document.execCommand("copy"); // where the browser grants no clipboard to a file
  }
  byId("copied").textContent = done ? "✓ Copied." : "Selected: press Ctrl+C.";
}

start();
