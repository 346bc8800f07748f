// What is said at the top, of model, data, metrics and decisions; and tables.

// Tables of rows of texts, the first one the headings.
function fill(table, headings, lines, last) {
  const kind = (text) => (text === "where it starts" ? "text" : "");
  const head = make(
    "tr",
    {},
    ...headings.map((text) => make("th", { scope: "col", textContent: text, className: kind(text) })),
  );
  const body = lines.map((cells, i) => {
    const row = make("tr", { className: last && i === lines.length - 1 ? "total" : "" });
    cells.forEach((cell, j) => {
      const element = j === 0 ? make("th", { scope: "row" }) : make("td");
      if (cell instanceof Node) element.append(cell);
      else element.textContent = cell;
      element.className = kind(headings[j]);
      row.append(element);
    });
    return row;
  });
  table.replaceChildren(make("thead", {}, head), make("tbody", {}, ...body));
}

function pairs(list, items) {
  list.replaceChildren(
    ...items.map(([name, value, key]) => {
      const entry = make("dd", { textContent: value });
      if (key) entry.dataset.count = key;
      return make("div", {}, make("dt", { textContent: name }), entry);
    }),
  );
}

function showHead() {
  document.title = `${labeled ? "Evaluation" : "Prediction"} – rlr_fast report`;
  byId("title").textContent = labeled ? "Evaluation of an anomaly detector" : "Prediction of an anomaly detector";
  const notes = [...data.notes];
  if (data.stopped) notes.unshift("This report ends early: an error or an interruption stopped the command.");
  if (!rows.length) notes.unshift("There is no image in this report.");
  const open = categories.filter((category) => (promises.get(category)?.value ?? null) === null);
  if (open.length) {
    const which = open.length === categories.length ? "" : ` of ${open.map(nameOf).join(", ")}`;
    notes.push(
      `No promised threshold${which}: there are no calibration images, or too few. The scores stand here as ` +
        "they are, and the threshold starts at a place that claims nothing.",
    );
  }
  byId("notes").replaceChildren(
    ...notes.map((text) => make("p", { className: "note", textContent: text })),
  );
  const bad = rows.filter((row) => row.bad).length;
  const counts = labeled ? `${rows.length} (${rows.length - bad} normal, ${bad} with a defect)` : `${rows.length}`;
  pairs(byId("facts"), [
    ...data.facts,
    ["Images", counts],
    ["Files left out", `${data.failures.length}`],
    ["Date", data.date],
  ]);
  if (data.failures.length) {
    byId("failures").hidden = false;
    byId("failures").querySelector("summary").textContent = `Files left out: ${data.failures.length}`;
    byId("failures").querySelector("ul").append(
      ...data.failures.map((text) => make("li", { textContent: text })),
    );
  }
}

// In the order of the other lists of classes: an object has names that are numbers first.
const byClass = (values) => Object.entries(values).sort(([a], [b]) => (a < b ? -1 : 1));

function showMetrics() {
  if (!data.metrics) return;
  byId("metrics").hidden = false;
  const { headings, classes, mean } = data.metrics;
  const line = (name, values) => [
    name,
    ...Object.keys(headings).map((key) => (values[key] === null ? "–" : (100 * values[key]).toFixed(1))),
  ];
  const lines = byClass(classes).map(([name, values]) => line(name, values));
  fill(byId("metrics-table"), ["class", ...Object.values(headings)], [...lines, line("mean", mean)], true);
  if (!data.decisions) return;
  byId("decisions").hidden = false;
  const { alpha, pool, all } = data.decisions;
  byId("decisions-title").textContent =
    `Decisions at the promised rate of ${percent(alpha)}${pool ? ", all classes pooled" : ""}`;
  const errors = (name, counts) => [
    name,
    counts.threshold === null ? "" : number(counts.threshold),
    share(counts.false_alarms, counts.normal),
    share(counts.misses, counts.anomalous),
  ];
  fill(
    byId("decisions-table"),
    ["class", "threshold", "false alarms", "misses"],
    [...byClass(data.decisions.classes).map(([name, counts]) => errors(name, counts)), errors("in all", all)],
    true,
  );
}
