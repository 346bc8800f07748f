"""Metrics of degenerate scores, against scikit-learn and exact fractions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score

from rlr_fast.inference.metrics import HEADINGS, class_metrics
from tests.attack.damage import Random

Found = tuple[str, bytes]


def exact(scores: NDArray[np.floating], labels: NDArray[np.bool_]) -> tuple[float, float, float]:
    """Return AUROC, AP and F1-max by counting in fractions; NaN with one kind of sample alone."""
    positives, negatives = int(labels.sum()), int((~labels).sum())
    if not positives or not negatives:
        return (math.nan,) * 3
    area = precision_sum = best = Fraction(0)
    tp = fp = 0
    for score in sorted(set(scores.tolist()), reverse=True):
        at = scores == score
        more_tp, more_fp = int((at & labels).sum()), int((at & ~labels).sum())
        area += Fraction(more_fp, negatives) * Fraction(2 * tp + more_tp, 2 * positives)
        tp, fp = tp + more_tp, fp + more_fp
        precision_sum += Fraction(more_tp, positives) * Fraction(tp, tp + fp)
        best = max(best, Fraction(2 * tp, tp + fp + positives))
    return float(area), float(precision_sum), float(best)


def exact_aupro(maps: NDArray[np.floating], masks: NDArray[np.bool_], limit: Fraction) -> float:
    """Return the area under the per-region overlap by counting in fractions."""
    regions = []
    for score_map, mask in zip(maps, masks, strict=True):
        labeled, count = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [score_map[labeled == i + 1] for i in range(count)]
    normal = maps[~masks]
    if not regions or not len(normal):
        return math.nan
    points = [(Fraction(0), Fraction(0))]
    for score in sorted(set(maps.reshape(-1).tolist()), reverse=True):
        overlap = sum(Fraction(int((r >= score).sum()), len(r)) for r in regions) / len(regions)
        points.append((Fraction(int((normal >= score).sum()), len(normal)), overlap))
    area = Fraction(0)
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 >= limit:
            break
        if x1 > limit:
            y1 = y0 + (limit - x0) / (x1 - x0) * (y1 - y0)
            x1 = limit
        area += (x1 - x0) * (y0 + y1) / 2
    return float(area / limit)


def _scores(random: Random, shape: tuple[int, ...]) -> NDArray[np.floating]:
    kinds = (
        lambda: np.zeros(shape),
        lambda: random.integers(-2, 3, shape).astype(float),
        lambda: random.standard_normal(shape),
        lambda: random.choice([-0.0, 0.0, 1e-45, -1e-45], shape),
        lambda: random.choice([-3e38, 3e38, 1.0], shape),
        lambda: 1 + random.integers(0, 3, shape) * 2.0**-24,
    )
    values = kinds[int(random.integers(len(kinds)))]()
    kind = str(random.choice(["f2", "f4", "f4", "f8", ">f4"]))
    return (values.clip(-6e4, 6e4) if kind == "f2" else values).astype(kind)


def metrics(random: Random, count: int) -> Iterator[Found]:
    """All seven metrics of small classes with ties, one kind of sample, one pixel, none at all."""
    for _ in range(count):
        images = int(random.integers(0, 6))
        size = (int(random.integers(1, 5)), int(random.integers(1, 5)))
        labels = random.random(images) < random.choice([0, 0.5, 1])
        share = random.choice([0, 0.2, 0.6, 1])
        masks = (random.random((images, *size)) < share) & labels[:, None, None]
        scores, maps = _scores(random, (images,)), _scores(random, (images, *size))
        limit = Fraction(int(random.integers(1, 21)), 20)
        with np.errstate(over="ignore"):  # differences of scores, which are compared with 0 alone
            found = class_metrics(scores, labels, maps, masks, float(limit))
        # Half precision is widened without a change, and so has the same ties.
        flat, marked = maps.reshape(-1), masks.reshape(-1)
        aupro = exact_aupro(maps, masks, Fraction(float(limit)))
        expected = (*exact(scores, labels), *exact(flat, marked), aupro)
        for name, value in zip(HEADINGS, expected, strict=True):
            if not math.isclose(found[name], value, rel_tol=1e-9, abs_tol=1e-12) and not (
                math.isnan(found[name]) and math.isnan(value)
            ):
                yield f"{name}: {found[name]!r}, exactly {value!r}; {images} of {size}", b""
        if labels.any() and not labels.all():
            with np.errstate(over="ignore"):
                theirs = roc_auc_score(labels, scores), average_precision_score(labels, scores)
            if not np.allclose(theirs, (found["image_auroc"], found["image_ap"])):
                yield f"scikit-learn has {theirs}", b""


def attack(
    count: int, seed: int, only: str | None = None
) -> Iterator[tuple[str, int, list[Found]]]:
    """Yield the attack with its tries and what was found."""
    if only is None or only in "metrics":
        yield "metrics", count, list(metrics(np.random.default_rng([seed, 9]), count))
