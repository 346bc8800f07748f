"""Rows of reports for tests: small pictures, made scores, and names that would break a page."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rlr_fast.visualization.report import ReportImage, ReportWriter

SCALE = (0.0, 2.0)
HOSTILE = (
    "<img src=x onerror=window.hacked=1>.png",
    "</script><script>window.hacked=2</script>.png",
    "<!--<script>.png",
    "a,b\"c'd;e\nf\r\tg&amp;.png",
    "javascript:window.hacked=3;.png",
    "\u2028 ü 漢 🜁 \x7f \udcff.png",
    "@ROWS@@FACTS@@SCRIPT@.png",
)


def image(path: str, category: str | None, score: float, **more: object) -> ReportImage:
    """Return a row whose picture is gray, with a map that is 1 everywhere."""
    values = {
        "image": np.full((8, 12, 3), 128, dtype=np.uint8),
        "score_map": np.ones((4, 6), dtype=np.float32),
        "size": (80, 120),
    }
    return ReportImage(Path(path), category, score, **(values | more))  # type: ignore[arg-type]


def labeled(count: int = 60, classes: tuple[str, ...] = ("bolt", "cloth")) -> list[ReportImage]:
    """Return rows of labeled images; scores of both kinds overlap, and some are equal."""
    random = np.random.default_rng(0)
    mask = np.zeros((4, 6), dtype=bool)
    mask[1:3, 2:4] = True
    rows = []
    for i in range(count):
        bad = i % 3 == 0
        score = round(float(random.normal(1.6 if bad else 1.0, 0.4)), 2)
        defect = ("hole", "scratch")[i % 2] if bad else "good"
        name = f"{classes[i % len(classes)]}/test/{defect}/{i:03d}.png"
        category = classes[i % len(classes)]
        rows.append(image(name, category, score, defect=defect, mask=mask if bad else None))
    return rows


def write(out: Path, rows: list[ReportImage], kind: str = "evaluation", **more: object) -> Path:
    """Write a report of rows, without calibration; return the page."""
    out.mkdir(parents=True, exist_ok=True)
    facts = {"Checkpoint": "run", "Backbone": "some <b>network</b>"}
    with ReportWriter(out, kind, SCALE, facts, **more) as report:  # type: ignore[arg-type]
        for i, row in enumerate(rows):
            report.add(i, row)
    return out / "report.html"
