"""A table of the paper, written: ours over the seeds beside what is published."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlr_fast.config import RLRConfig, TrainConfig
from rlr_fast.data import DataSet
from rlr_fast.data.check import counted
from rlr_fast.files import write_atomically
from rlr_fast.inference.metrics import HEADINGS
from rlr_fast.paper.folder import Metrics
from rlr_fast.paper.tables import CLASSES, Figures, Table, in_words, is_paper_data
from rlr_fast.visualization.fonts import one_line

REPORT_FILE = "table.md"

_PAPERS = ("image_auroc", "pixel_auroc")  # what the paper measures
_NOTHING = "–"
_WORDS = ("row", "method", "class", "source")

Finished = Mapping[str, Mapping[int, Metrics]]
"""Metrics by row and seed."""


def write_report(
    out: Path,
    table: Table,
    base: RLRConfig,
    recipe: TrainConfig,
    data: DataSet,
    seeds: Sequence[int],
    finished: Finished,
    left_out: Sequence[str],
) -> None:
    """Write ``table.json``, ``table.csv`` and ``table.md`` into ``out``, each whole or not at all.

    Args:
        out: An existing folder.
        table: What the rows are.
        base: The model that they vary.
        recipe: Of every run.
        data: What they learned from and were tested on.
        seeds: Those that were asked for.
        finished: What is known of each row.
        left_out: Files of ``data`` that cannot be read, a line each.

    Raises:
        OSError: A file cannot be written; the old one is as it was.
    """
    content = summary(table, base, recipe, data, seeds, finished, left_out)
    texts = {
        "table.json": json.dumps(content, indent=2, ensure_ascii=False),
        "table.csv": to_csv(content),
        REPORT_FILE: to_markdown(content),
    }
    for name, text in texts.items():
        # A file's name may have bytes that are no text; in JSON this is its own escape of them.
        write_atomically(out / name, text.encode("utf-8", "backslashreplace").decode())


def summary(
    table: Table,
    base: RLRConfig,
    recipe: TrainConfig,
    data: DataSet,
    seeds: Sequence[int],
    finished: Finished,
    left_out: Sequence[str],
) -> dict[str, Any]:
    """Return the table as plain values, in percent; see `write_report`.

    What is published stands in it only where ``data`` has the classes on which it was measured.
    """
    comparable = is_paper_data(table, data.classes)
    first = next((run for runs in finished.values() for run in runs.values()), None)
    rows = [
        {
            "name": row.name,
            "label": row.label,
            "changes": dict(row.changes),
            "seeds": list(runs),
            "seeds_wanted": len(set(seeds) | set(runs)),
            "mean": _over_seeds([run.mean for run in runs.values()]),
            "classes": {
                c: _over_seeds([run.classes[c] for run in runs.values()]) for c in data.classes
            },
            "paper": dict(row.paper) if comparable else {},
        }
        for row in table.rows
        for runs in (finished[row.name],)
    ]
    return {
        "table": table.name,
        "title": table.title,
        "unit": "percent",
        "data": {
            "name": in_words(data.classes),
            "root": str(data.root.absolute()),
            "layout": data.layout,
            "classes": list(data.classes),
            "train_images": sum(map(len, data.train.values())),
            "test_images": sum(map(len, data.test.values())),
            "left_out": list(left_out),
        },
        "model": base.to_dict(),
        "recipe": dataclasses.asdict(recipe),
        "unlike_the_paper": _unlike_the_paper(table, base, recipe),
        "note": table.note.format(**base.to_dict()),
        "protocol": None if first is None else first.protocol,
        "environment": None if first is None else first.environment,
        "rows": rows,
        "measured_on": table.data if table.source else "",
        "source": table.source if comparable else "",
        "peers": [dataclasses.asdict(peer) for peer in table.peers] if comparable else [],
        "paper_classes": {c: dict(f) for c, f in table.classes.items()} if comparable else {},
        "by_class": bool(table.classes),
    }


def _over_seeds(runs: Sequence[Mapping[str, float | None]]) -> dict[str, dict[str, float]]:
    """Mean and sample deviation of each metric, in percent, where it is defined."""
    found = {}
    for key in HEADINGS:
        values = [100 * v for run in runs if (v := run[key]) is not None]
        if values:
            found[key] = {"mean": statistics.fmean(values)}
            if len(values) > 1:
                found[key]["std"] = statistics.stdev(values)
    return found


def _unlike_the_paper(table: Table, base: RLRConfig, recipe: TrainConfig) -> list[str]:
    """Name the settings that are not the paper's, but for those that every row decides."""
    varied = set.intersection(*(set(row.changes) for row in table.rows))
    varied |= {"backbone_weights", "seed"}
    found = []
    for ours, before in (
        (base.to_dict(), RLRConfig().to_dict()),
        (dataclasses.asdict(recipe), dataclasses.asdict(TrainConfig())),
    ):
        for name, value in ours.items():
            if value != before[name] and name not in varied:
                found.append(f"{name} {_plain(value)} (paper: {_plain(before[name])})")
    if base.backbone_weights == "random":
        found.insert(0, "backbone_weights random: an untrained backbone")
    return found


def _plain(value: Any) -> str:
    return ", ".join(map(_plain, value)) if isinstance(value, (list, tuple)) else str(value)


# CSV: a line for each row, class and source


def to_csv(content: Mapping[str, Any]) -> str:
    """Return `summary`'s content as CSV: a line per row and class, ours and what is published.

    Metrics are in percent; ``class`` is ``mean`` for the mean over the classes.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    keys = [*HEADINGS, *(f"{key}_std" for key in HEADINGS)]
    writer.writerow(["row", "class", "source", "seeds", *keys])
    for row in content["rows"]:
        for name, metrics in (("mean", row["mean"]), *row["classes"].items()):
            if metrics:
                writer.writerow(
                    [row["name"], name, "this table", len(row["seeds"])]
                    + [_number(metrics.get(key, {}).get("mean")) for key in HEADINGS]
                    + [_number(metrics.get(key, {}).get("std")) for key in HEADINGS]
                )
        for name, figures in (("mean", row["paper"]), *content["paper_classes"].items()):
            if figures:
                writer.writerow(_published(row["name"], name, content["source"], figures))
    for peer in content["peers"]:
        writer.writerow(_published(peer["method"], "mean", peer["source"], peer["figures"]))
    return text.getvalue()


def _published(row: str, name: str, source: str, figures: Figures) -> list[str]:
    values = [_number(figures.get(key)) for key in HEADINGS]
    return [row, name, source, "", *values, *("" for _ in HEADINGS)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


# Markdown


def to_markdown(content: Mapping[str, Any]) -> str:
    """Return `summary`'s content as a page of Markdown."""
    number = content["table"]
    kind = "Table " if number[-1].isdigit() else ""
    parts = [f"# {kind}{number}: {content['title']}", _what_it_is(content)]
    if content["by_class"]:
        parts += [_methods(content), "## By class", _classes(content)]
    else:
        parts.append(_variations(content))
    parts += [_left_out(content), _settings(content), _protocol(content)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _what_it_is(content: Mapping[str, Any]) -> str:
    data = content["data"]
    epochs = content["recipe"]["epochs"]
    classes = counted(len(data["classes"]), "class", "classes")
    if not data["name"]:
        about = f"{classes}, not those of the paper's data sets"
    else:
        about = f"{data['name']}, {classes}" if data["name"] in CLASSES else data["name"]
    lines = [
        f"Data: {one_line(data['root'])}: {about}; {data['train_images']} training and "
        f"{data['test_images']} test images; one model for all classes.",
        f"Ours: after {_last_of(epochs)}, in percent, mean over the classes; mean ± "
        "standard deviation over the seeds, as many as a row says.",
    ]
    if content["source"]:
        lines.append(f"Paper: {content['source']}.")
    elif content["measured_on"]:
        lines.append(
            f"The paper measured this table on {content['measured_on']}, so its figures do not "
            "stand here."
        )
    if content["note"]:
        lines.append(content["note"])
    return "  \n".join(lines)


def _last_of(epochs: int) -> str:
    return "one epoch" if epochs == 1 else f"the last of {epochs} epochs"


def _variations(content: Mapping[str, Any]) -> str:
    with_paper = bool(content["source"])
    keys = [*_PAPERS, *(key for key in HEADINGS if key not in _PAPERS)]
    header = ["row"]
    for key in keys:
        header += [HEADINGS[key], "paper"] if with_paper and key in _PAPERS else [HEADINGS[key]]
    body = []
    for row in content["rows"]:
        cells = [row["label"]]
        for key in keys:
            cells.append(_ours(row["mean"], key))
            if with_paper and key in _PAPERS:
                cells.append(_number(row["paper"].get(key)) or _NOTHING)
        body.append([*cells, _seeds(row)])
    return _grid([*header, "seeds"], body)


def _methods(content: Mapping[str, Any]) -> str:
    body = [
        [p["method"], *(_number(p["figures"].get(k)) or _NOTHING for k in HEADINGS), p["source"]]
        for p in content["peers"]
    ]
    for row in content["rows"]:
        if row["paper"]:
            figures = [_number(row["paper"].get(key)) or _NOTHING for key in HEADINGS]
            body.append([row["label"], *figures, content["source"]])
        ours = [f"**{_ours(row['mean'], key)}**" for key in HEADINGS]
        body.append([f"**{row['label']}, rlr_fast**", *ours, f"this table, {_seeds(row)} seeds"])
    return _grid(["method", *HEADINGS.values(), "source"], body)


def _classes(content: Mapping[str, Any]) -> str:
    paper = content["paper_classes"]
    header = ["class", *HEADINGS.values()]
    if paper:
        header += [f"paper {HEADINGS[key]}" for key in _PAPERS]
    body = []
    for row in content["rows"]:
        lines = [(name, metrics, paper.get(name, {})) for name, metrics in row["classes"].items()]
        lines.append(("mean", row["mean"], row["paper"]))
        for name, metrics, figures in lines:
            cells = [name, *(_ours(metrics, key) for key in HEADINGS)]
            if paper:
                cells += [_number(figures.get(key)) or _NOTHING for key in _PAPERS]
            body.append(cells)
    return _grid(header, body)


def _ours(metrics: Mapping[str, Mapping[str, float]], key: str) -> str:
    if key not in metrics:
        return _NOTHING
    text = _number(metrics[key]["mean"])
    return f"{text} ± {_number(metrics[key]['std'])}" if "std" in metrics[key] else text


def _seeds(row: Mapping[str, Any]) -> str:
    return f"{len(row['seeds'])} of {row['seeds_wanted']}"


def _left_out(content: Mapping[str, Any]) -> str:
    lines = content["data"]["left_out"]
    if not lines:
        return ""
    return "Left out, for they could not be read:\n\n" + "\n".join(
        f"- {one_line(line)}" for line in lines
    )


def _settings(content: Mapping[str, Any]) -> str:
    unlike = content["unlike_the_paper"]
    if not unlike:
        return "Settings: the paper's."
    return "Settings that are not the paper's:\n\n" + "\n".join(f"- {line}" for line in unlike)


def _protocol(content: Mapping[str, Any]) -> str:
    if content["protocol"] is None:
        return "Protocol: nothing is measured yet."
    told = {k: v for k, v in content["protocol"].items() if k not in ("data", "setting")}
    lines = [f"- {name.replace('_', ' ')}: {_listed(value)}" for name, value in told.items()]
    return "Protocol:\n\n" + "\n".join(lines)


def _listed(value: Any) -> str:
    return " × ".join(map(str, value)) if isinstance(value, list) else str(value)


def _grid(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    rule = ["---" if name in _WORDS else "--:" for name in header]
    lines = [header, rule, *body]
    return "\n".join("| " + " | ".join(map(_cell, cells)) + " |" for cells in lines)


def _cell(text: str) -> str:
    return one_line(text).replace("|", "\\|")
