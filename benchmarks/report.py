"""Tables and plots of `benchmarks/README.md`, made from the records and from nothing else.

``python -m benchmarks.report`` reads ``benchmarks/results/*.json``, draws plots beside them and
writes everything between the markers of the README. Every table names its record.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.record import RESULTS, read_records
from benchmarks.timing import in_words
from rlr_fast.files import write_atomically

README = Path(__file__).resolve().parent / "README.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
Result = dict[str, Any]  # its key "rival" is the name of a baseline, or of ours


class Record(NamedTuple):
    """A record, the folder of its plots, and all records by file name, itself among them."""

    name: str
    content: dict[str, Any]
    folder: Path
    every: dict[str, dict[str, Any]]

    @property
    def source(self) -> str:
        """What a table of it names."""
        return f"from `{self.name}`"


# What an H100 allows, for the limits in the plots: bytes/s of its memory, powers of two per second.
# A record of `benchmarks.microbenchmarks` from the same device replaces them by what was measured.
_LIMITS = {"H100": (3.0e12, 3.7e12), "H200": (4.3e12, 3.7e12)}


def figures(records: dict[str, dict[str, Any]], folder: Path) -> str:
    """Return the Markdown of all records, with plots drawn into ``folder``."""
    parts = []
    for name, content in records.items():
        parts.append(_heading(name, content))
        results, this = content["results"], Record(name, content, folder, records)
        for suite, write in _WRITERS.items():
            mine = [r for r in results if r.get("suite") == suite]
            if mine:
                parts.append(write(mine, this))
    return "\n\n".join(parts)


def _heading(name: str, content: dict[str, Any]) -> str:
    facts = content["environment"]
    packages = ", ".join(f"{k} {v}" for k, v in facts["packages"].items() if v)
    lines = [
        f"### Record `{name}`",
        "",
        f"- device: {facts['device_name']} ({facts['device']}), {facts['threads']} host threads",
        f"- made: {content['made']}, commit `{content['commit'] or 'unknown'}`",
        f"- command: `{content['command']}`",
        f"- versions: Python {facts['python']}, {packages}",
    ]
    more = [f"{k} {facts[k]}" for k in ("cuda", "cudnn", "driver") if facts.get(k)]
    if more:
        lines[-1] += ", " + ", ".join(more)
    for title, key in (("clocks before", "clocks"), ("clocks after", "clocks_after")):
        if content.get(key):
            lines.append(f"- {title}: " + ", ".join(f"{k} {v}" for k, v in content[key].items()))
    counts: dict[str, int] = {}
    for result in content["results"]:
        counts[result["outcome"]] = counts.get(result["outcome"], 0) + 1
    lines.append("- outcomes: " + ", ".join(f"{n} {k}" for k, n in counts.items()))
    return "\n".join(lines)


def _bytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _cell(result: Result | None) -> str:
    if result is None:
        return ""
    if result["outcome"] != "ok":
        outcome = str(result["outcome"])
        return {"unavailable": "n/a", "wrong": "WRONG"}.get(outcome, outcome)
    if "median_s" not in result:
        return "checked"
    text = in_words(result["median_s"])
    if "graph_median_s" in result:
        text += f" ({in_words(result['graph_median_s'])})"
    return text


def _table(
    rows: Sequence[str], columns: Sequence[str], cell: Callable[[str, str], str], corner: str
) -> str:
    lines = [f"| {corner} | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {r} | " + " | ".join(cell(r, c) for c in columns) + " |" for r in rows]
    return "\n".join(lines)


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _operators(results: list[Result], record: Record) -> str:
    parts = [
        f"**Operators** ({record.source}): median time; in brackets the replay of a CUDA graph. "
        "Host, where it stands, is what enqueuing the longest direction takes; memory its peak."
    ]
    problems = _unique(_problem(r) for r in results)
    for problem in problems:
        mine = [r for r in results if _problem(r) == problem]
        by_way = {(r["rival"], r["direction"]): r for r in mine}
        directions = _unique(r["direction"] for r in mine)
        names = _unique(r["rival"] for r in mine)
        names = [n for n in names if any(by_way.get((n, d), {}).get("outcome") != "unavailable"
                                         for d in directions)]  # fmt: skip

        def cell(baseline: str, column: str, by_way: Any = by_way, ways: Any = directions) -> str:
            if column == "host":
                hosts = [
                    r["host_s"] for d in ways if "host_s" in (r := by_way.get((baseline, d), {}))
                ]
                return in_words(max(hosts)) if hosts else ""
            if column != "memory":
                return _cell(by_way.get((baseline, column)))
            peaks = [by_way[baseline, d].get("peak_bytes") for d in ways if (baseline, d) in by_way]
            return _bytes(max(p for p in peaks if p is not None)) if any(peaks) else ""

        host = ["host"] if any("host_s" in r for r in mine) else []
        columns = [*directions, *host, "memory"]
        parts.append(f"`{problem}`\n\n" + _table(names, columns, cell, "baseline"))
    labels = {r["rival"]: r["label"] for r in results}
    parts.append("Baselines: " + "; ".join(f"`{n}`: {text}" for n, text in labels.items()) + ".")
    missing = {r["rival"]: r["reason"] for r in results if r["outcome"] == "unavailable"}
    if missing:
        parts.append(
            "Could not run here: " + "; ".join(f"`{n}`: {why}" for n, why in missing.items()) + "."
        )
    speedups = _speedups(results, record)
    return "\n\n".join([*parts, *([speedups] if speedups else [])])


def _problem(r: Result) -> str:
    return f"{r['operator']}-{r['shape']}-B{r['batch']}-{r['dtype']}"


def _speedups(results: list[Result], record: Record) -> str:
    """Draw the forward and backward times of every baseline over ours, at the largest batch."""
    timed = [r for r in results if r["outcome"] == "ok" and "median_s" in r]
    ours = "triton" if any(r["rival"] == "triton" for r in timed) else "tiled"
    best = {(_problem(r), r["direction"]): r["median_s"] for r in timed if r["rival"] == ours}
    largest: dict[str, int] = {}
    for r in timed:
        key = f"{r['operator']} {r['shape']}"
        largest[key] = max(largest.get(key, 0), r["batch"])
    chosen = [r for r in timed if r["batch"] == largest[f"{r['operator']} {r['shape']}"]]
    groups = _unique(f"{_problem(r)} {r['direction']}" for r in chosen if r["direction"] != "both")
    names = [n for n in _unique(r["rival"] for r in chosen) if n != ours]
    if not groups or not names or not best:
        return ""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(9, 0.34 * len(groups) + 1.6), layout="constrained")
    for i, baseline in enumerate(names):
        points = [
            (r["median_s"] / best[_problem(r), r["direction"]],
             groups.index(f"{_problem(r)} {r['direction']}"))
            for r in chosen
            if r["rival"] == baseline and r["direction"] != "both"
            and (_problem(r), r["direction"]) in best
        ]  # fmt: skip
        if points:
            xs, ys = zip(*points, strict=True)
            axes.scatter(xs, ys, label=baseline, marker="osD^v<>PX*hd"[i % 12], s=30)
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xscale="log", xlabel=f"time over that of {ours} (right of 1: slower than {ours})")
    axes.set_yticks(range(len(groups)), groups, fontsize=7)
    axes.invert_yaxis()
    axes.grid(axis="x", which="both", alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    file = _save(figure, record, "baselines")
    return f"![Times over ours, from {record.name}]({file})"


def _model(results: list[Result], record: Record) -> str:
    def what(r: Result) -> str:
        level = f" level {r['level']} ({r['grid']})" if "level" in r else ""
        return f"{r['part']}{level}, batch {r['batch']}, {r['dtype']}"

    by_row = {(what(r), r["rival"]): r for r in results}
    backends = _unique(r["rival"] for r in results)

    def cell(row: str, column: str) -> str:
        backend, _, kind = column.partition(" ")
        result = by_row.get((row, backend))
        if kind == "memory":
            return _bytes(result["peak_bytes"]) if result and "peak_bytes" in result else ""
        return _cell(result)

    columns = [c for b in backends for c in (b, f"{b} memory")]
    table = _table(_unique(what(r) for r in results), columns, cell, "part")
    return f"**Model**, paper preset ({record.source}): median time and peak memory.\n\n{table}"


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Exponent p of value ~ size^p over the three largest sizes; NaN for less than two."""
    if len(sizes) < 2:
        return math.nan
    pairs = sorted(zip(sizes, values, strict=True))[-3:]
    x, y = (np.log([pair[i] for pair in pairs]) for i in (0, 1))
    return float(np.polyfit(x, y, 1)[0])


def _scaling(results: list[Result], record: Record) -> str:
    return "\n\n".join(
        _scaling_along(axis, mine, record)
        for axis in ("tokens", "batch")
        if (mine := [r for r in results
                     if r["axis"] == axis and r["outcome"] == "ok" and "median_s" in r])
    )  # fmt: skip


def _scaling_along(axis: str, timed: list[Result], record: Record) -> str:
    plt = _pyplot()
    operators = _unique(r["operator"] for r in timed)
    figure, grid = plt.subplots(
        2, len(operators), figsize=(4.6 * len(operators), 7), squeeze=False, layout="constrained"
    )
    slopes: dict[tuple[str, str], str] = {}
    what, symbol = {"tokens": ("tokens", "N"), "batch": ("the batch", "B")}[axis]
    for column, operator in enumerate(operators):
        for direction, style in (("forward", "-"), ("both", "--")):
            for i, baseline in enumerate(_unique(r["rival"] for r in timed)):
                mine = [
                    r for r in timed
                    if (r["operator"], r["direction"]) == (operator, direction)
                    and r["rival"] == baseline
                ]  # fmt: skip
                if not mine:
                    continue
                sizes = [r[axis] for r in mine]
                for row, field in enumerate(("median_s", "peak_bytes")):
                    values = [max(r[field], 1e-9) for r in mine]
                    p = slope(sizes, values)
                    grid[row][column].plot(
                        sizes, values, style, marker="o", markersize=3, color=f"C{i}",
                        label=f"{baseline} {direction}, {symbol}^{p:.2f}",
                    )  # fmt: skip
                    slopes[f"{operator} {direction} {baseline}", field] = f"{p:.2f}"
        limit = _limit(timed, axis, operator, record)
        if limit is not None:
            label, sizes, values = limit
            grid[0][column].plot(sizes, values, ":", color="black", label=label)
        for row, label in enumerate(("time, s", "peak memory, bytes")):
            axes = grid[row][column]
            axes.set(
                xscale="log", yscale="log", xlabel=f"{axis} {symbol}", ylabel=label, title=operator
            )
            axes.grid(which="both", alpha=0.2)
            axes.legend(fontsize=6)
    file = _save(figure, record, f"scaling-{axis}")
    rows = _unique(key for key, _ in slopes)
    fields = {"time": "median_s", "memory": "peak_bytes"}
    table = _table(rows, list(fields), lambda r, c: slopes[r, fields[c]], f"exponent of {symbol}")
    first = timed[0]
    fixed = f"batch {first['batch']}" if axis == "tokens" else f"N = {first['tokens']}"
    return (
        f"**Scaling with {what}** ({record.source}): d = {first['width']}, window "
        f"{first['window']}, {fixed}, {first['dtype']}. Exponent p of {symbol}^p over the three "
        f"largest sizes.\n\n{table}\n\n"
        f"![Time and memory against {what}, from {record.name}]({file})"
    )


def _limit(
    timed: list[Result], axis: str, operator: str, record: Record
) -> tuple[str, list[int], list[float]] | None:
    """Return the least time of a forward pass on a known GPU, with the name of its source."""
    device = record.content["environment"]["device_name"]
    known = [limits for key, limits in _LIMITS.items() if key in device]
    if not known:
        return None
    (bandwidth, rate), source = known[0], "by arithmetic"
    for file, other in record.every.items():
        if other["environment"]["device_name"] != device:
            continue
        values = {
            r["name"]: r["value"]
            for r in other["results"]
            if r.get("suite") == "microbenchmarks" and r["outcome"] == "ok"
        }
        powers = [v for k, v in values.items() if k.startswith("powers of two")]
        if powers and "device copy" in values:
            bandwidth, rate = values["device copy"] * 1e12, max(powers) * 1e12
            source = f"from {file}"
    mine = [r for r in timed if r["operator"] == operator and r["direction"] == "forward"]
    mine = sorted({r[axis]: r for r in mine}.values(), key=lambda r: r[axis])

    def least(r: Result) -> float:
        seen = min(r["window"] ** 2, r["tokens"])
        keys = seen if operator == "lca" else r["tokens"] - seen
        return max(
            r["least_bytes"] / bandwidth, r["batch"] * r["heads"] * r["tokens"] * keys / rate
        )

    return f"forward limit, {source}", [r[axis] for r in mine], [least(r) for r in mine]


def _check(results: list[Result], record: Record) -> str:
    failed = [r for r in results if r["outcome"] != "ok"]
    worst = max((max(r["errors"].values()) for r in results if r["outcome"] == "ok"), default=0.0)
    text = (
        f"**Checks** ({record.source}): {len(results) - len(failed)} of {len(results)} problems "
        "equal the definition in output and all gradients; largest relative error "
        f"{worst:.1e}."
    )
    lines = [f"- `{_problem(r)}` failed: {r['reason']}" for r in failed]
    return "\n".join([text, *([""] if lines else []), *lines])


def _microbenchmarks(results: list[Result], record: Record) -> str:
    by_row = {r["name"]: r for r in results}

    def cell(row: str, column: str) -> str:
        r = by_row[row]
        if r["outcome"] != "ok":
            return r["reason"] if column == "value" else ""
        if column == "value":
            return f"{r['value']:.3g} {r['unit']}"
        skip = ("suite", "name", "outcome", "value", "unit")
        return ", ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
            for k, v in r.items()
            if k not in skip and not isinstance(v, dict)
        )

    return f"**What the GPU does** ({record.source})\n\n" + _table(
        list(by_row), ["value", "more"], cell, "measured"
    )


def _tiles(results: list[Result], record: Record) -> str:
    parts = [
        f"**Tile search** ({record.source}): the five candidates with which the whole call is "
        "fastest, and the table's own; device time of the kernel, and of the call with all its "
        "kernels."
    ]
    for group in _unique(f"{r['kernel']} {_problem(r)}" for r in results):
        mine = [r for r in results if f"{r['kernel']} {_problem(r)}" == group]
        timed = sorted((r for r in mine if r["outcome"] == "ok"), key=lambda r: r["call_s"])
        shown = timed[:5] + [r for r in timed[5:] if r["own"]]
        rows = {" ".join(f"{k}={v}" for k, v in r["tiles"].items() if v): r for r in shown}

        def cell(row: str, column: str, rows: Any = rows) -> str:
            if column == "table's":
                return "yes" if rows[row]["own"] else ""
            return in_words(rows[row]["median_s" if column == "kernel" else "call_s"])

        columns = ["kernel", "call", "table's"]
        parts.append(f"`{group}`\n\n" + _table(list(rows), columns, cell, "tiles"))
        failed = len(mine) - len(timed)
        if failed:
            parts.append(f"{failed} candidates did not compile or failed the check.")
    return "\n\n".join(parts)


def _kernels(results: list[Result], record: Record) -> str:
    def mode(r: Result) -> str:
        return r["direction"] + (", deterministic" if r["deterministic"] else "")

    parts = [f"**Kernels** ({record.source}): device time of each, as often as a call launches it."]
    for problem in _unique(_problem(r) for r in results):
        by_mode = {mode(r): r for r in results if _problem(r) == problem}
        # Template arguments of PyTorch's kernels would fill the page.
        short: dict[str, dict[str, float]] = {m: {} for m in by_mode}
        for m, r in by_mode.items():
            for name, seconds in r["kernels_s"].items():
                plain = name.removeprefix("void ").partition("<")[0]
                short[m][plain] = short[m].get(plain, 0.0) + seconds
        names = _unique(name for times in short.values() for name in times)

        def cell(name: str, column: str, short: Any = short) -> str:
            return in_words(short[column][name]) if name in short[column] else ""

        parts.append(f"`{problem}`\n\n" + _table(names, list(by_mode), cell, "kernel"))
    return "\n\n".join(parts)


def _throughput(results: list[Result], record: Record) -> str:
    def what(r: Result) -> str:
        return f"{r['what']}, {r['rival']}, {r['dtype']}, batch {r['batch']}"

    def cell(row: str, column: str) -> str:
        mine = [r for r in results if what(r) == row]
        if column == "images/s":
            return " and ".join(f"{r['images_per_s']:.3g}" for r in mine)
        if column == "peak memory":
            return _bytes(mine[0]["peak_bytes"]) if mine[0]["peak_bytes"] else ""
        return ", ".join(f"{part} {share:.1%}" for part, share in mine[-1]["shares"].items())

    rows = _unique(what(r) for r in results)
    columns = ["images/s", "peak memory", "the time of an epoch"]
    table = _table(rows, columns, cell, "training")
    return f"**Training**, from the second epoch on ({record.source})\n\n{table}"


def _jobs(results: list[Result], record: Record) -> str:
    rows = {r["job"]: r for r in results}

    def cell(row: str, column: str) -> str:
        r = rows[row]
        if column == "images":
            return str(r["images"])
        if column == "peak memory":
            return _bytes(r["peak_bytes"]) if "peak_bytes" in r else ""
        if column == "images/s" and "median_s" in r:
            return f"{r['images'] / r['median_s']:.3g}"
        return _cell(r) if column == "time" else ""

    first = results[0]
    table = _table(list(rows), ["images", "time", "images/s", "peak memory"], cell, "job")
    return (
        f"**Whole jobs** ({record.source}): preset `{first['preset']}` at {first['image_size']} "
        f"pixels, files of {first['file_size']}, batch {first['batch']}, {first['dtype']}.\n\n"
        f"{table}"
    )


def _distance(results: list[Result], record: Record) -> str:
    def what(r: Result) -> str:
        return f"level {r['level']}, batch {r['batch']}, {r['direction']}, {r['dtype']}"

    by_row = {(what(r), r["rival"]): r for r in results}
    table = _table(
        _unique(what(r) for r in results),
        _unique(r["rival"] for r in results),
        lambda row, baseline: _cell(by_row.get((row, baseline))),
        "token distance",
    )
    return f"**Distance**, for loss and score ({record.source}): median time.\n\n{table}"


_WRITERS: dict[str, Callable[..., str]] = {
    "check": _check,
    "operators": _operators,
    "scaling": _scaling,
    "model": _model,
    "distance": _distance,
    "jobs": _jobs,
    "throughput": _throughput,
    "microbenchmarks": _microbenchmarks,
    "tiles": _tiles,
    "kernels": _kernels,
}


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, record: Record, kind: str) -> str:
    """Save a plot beside its record; return its path as the README links it."""
    record.folder.mkdir(parents=True, exist_ok=True)
    path = record.folder / f"{Path(record.name).stem}-{kind}.png"
    figure.savefig(path, dpi=130, metadata={"Software": None})  # equal records, equal files
    _pyplot().close(figure)
    return f"{record.folder.name}/{path.name}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the figures into the README."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path, default=README)
    options = parser.parse_args(arguments)
    try:
        text = options.readme.read_text(encoding="utf-8")
        records = read_records(options.results)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        parser.error(f"{options.readme} has no markers {BEGIN} and, behind it, {END}")
    if not records:
        parser.error(f"--results: there is no record in {str(options.results)!r}")
    body = figures(records, options.results)
    write_atomically(options.readme, f"{before}{BEGIN}\n\n{body}\n\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
