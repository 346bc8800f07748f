// Counts at thresholds, curves and bins: numbers from numbers.

const ALL = Symbol("all classes"); // null is an unknown class

// Rows, of a class or of all, that count: a normal image whose score made the threshold tells
// nothing of false alarms.
function counted(rows, category, withCalibrated) {
  return rows.filter(
    (row) =>
      (category === ALL || row.category === category) &&
      (withCalibrated || !(row.calibrated && row.bad === false)),
  );
}

// `flagged` says of a row whether its score is above the threshold.
function countErrors(rows, flagged) {
  const sum = { total: rows.length, flagged: 0, normal: 0, anomalous: 0, alarms: 0, misses: 0 };
  for (const row of rows) {
    const above = flagged(row);
    sum.flagged += above;
    if (row.bad === true) {
      sum.anomalous += 1;
      sum.misses += !above;
    } else if (row.bad === false) {
      sum.normal += 1;
      sum.alarms += above;
    }
  }
  sum.caught = sum.anomalous - sum.misses;
  // Among images with a defect alone, all that is flagged is right: that tells nothing.
  sum.precision = sum.normal && sum.flagged ? sum.caught / sum.flagged : null;
  sum.recall = sum.anomalous ? sum.caught / sum.anomalous : null;
  return sum;
}

// Points of both curves, from the highest threshold down; equal scores cross it together.
function curves(rows) {
  const sorted = rows.filter((row) => row.bad !== null).sort((a, b) => b.score - a.score);
  const bad = sorted.filter((row) => row.bad).length;
  const good = sorted.length - bad;
  const roc = [[0, 0]];
  const pr = [];
  let caught = 0;
  let alarms = 0;
  sorted.forEach((row, i) => {
    caught += row.bad;
    alarms += !row.bad;
    if (i + 1 < sorted.length && sorted[i + 1].score === row.score) return;
    roc.push([alarms / good, caught / bad]);
    pr.push([caught / bad, caught / (caught + alarms)]);
  });
  return { roc: good && bad ? roc : null, pr: good && bad ? pr : null };
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted.length ? sorted[Math.floor((sorted.length - 1) / 2)] : 0;
}

// Where the threshold of a class starts, and what may be said of that.
function startOf(rows, promised, alpha) {
  if ((promised?.value ?? null) !== null) {
    const rate = `new normal images at most ${percent(alpha)} are expected to score above it`;
    return {
      value: promised.value,
      short: `calibrated at ${percent(alpha)}${promised.pooled ? ", pooled" : ""}`,
      basis: promised.pooled
        ? `calibrated on all classes pooled: over their mix, and not in each, of ${rate}`
        : `calibrated: of ${rate}`,
    };
  }
  const normal = rows.filter((row) => row.bad === false).map((row) => row.score);
  if (normal.length) {
    return {
      value: normal.reduce((a, b) => Math.max(a, b)),
      short: "highest normal score",
      basis: "the highest score of the normal images here, which promises nothing",
    };
  }
  return {
    value: median(rows.map((row) => row.score)),
    short: "median",
    basis: "the median of the scores here, which promises nothing",
  };
}

// Round numbers between two, about `count` of them.
function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  const first = Math.ceil(low / step);
  const last = Math.floor(high / step);
  return Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step);
}

function bins(rows, low, high, count) {
  const sums = Array.from({ length: count }, () => ({ normal: 0, defect: 0 }));
  for (const row of rows) {
    const place = Math.floor(((row.score - low) / (high - low)) * count);
    sums[Math.min(count - 1, Math.max(0, place))][row.bad ? "defect" : "normal"] += 1;
  }
  return sums;
}

// Names as JSON are YAML, too, where what is not printable is escaped.
function toYaml(thresholds) {
  const hidden = /[\u007f-\u009f\u2028\u2029\ufeff\ufffe\uffff]/g;
  const escaped = (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0");
  return [...thresholds]
    .map(([name, value]) => `${JSON.stringify(name ?? "").replace(hidden, escaped)}: ${yamlNumber(value)}\n`)
    .join("");
}

// YAML 1.1 reads 1e-7 as text, and 1.0e-07 as a number.
function yamlNumber(value) {
  const text = String(value);
  const parts = text.match(/^(-?\d+)(\.\d+)?e([+-])(\d+)$/);
  return parts ? `${parts[1]}${parts[2] ?? ".0"}e${parts[3]}${parts[4].padStart(2, "0")}` : text;
}

function number(value) {
  return value === null ? "–" : String(Number(value.toPrecision(4)));
}

function percent(value, digits = 1) {
  return value === null ? "–" : `${Number((100 * value).toFixed(digits))} %`;
}

function share(part, whole) {
  return whole ? `${part} of ${whole} (${percent(part / whole)})` : "–";
}
