"""The seven metrics of multi-class anomaly detection, for one class at a time.

Write TP(t) and FP(t) for the number of anomalous and normal samples whose score is >= t, P and N
for all of them, and let t run over every distinct score, from high to low. Samples of equal score
cross the threshold together, so the result does not depend on their order.

    AUROC    = area under TP / P over FP / N, trapezoids
    AP       = sum over t of (TP(t) - TP(t')) / P * TP(t) / (TP(t) + FP(t)), t' the one before t
    F1-max   = max over t of 2 TP(t) / (TP(t) + FP(t) + P)
    AUPRO    = area under PRO(t) over FP(t) / N from 0 to max_fpr, trapezoids, divided by max_fpr
    PRO(t)   = mean over all anomalous regions of the part of the region whose score is >= t

A region is a connected component of one ground truth mask, diagonal neighbors included
(8-connectivity), as in the evaluation code that MVTec publishes with MVTec-AD. FP(t) / N counts the
normal pixels of all images, the anomalous images too. The curve is cut at ``max_fpr`` by linear
interpolation. Numbers from 200 equidistant thresholds, as some papers report, differ slightly.

Image metrics are scikit-learn's. Pixel metrics are computed here: one sort, which carries the
region of each pixel along, serves all four. With scikit-learn's first three they take 22 times the
CPU time (median of 5 pairs of runs on 200 maps of 256 x 256) and three times the memory.

A metric without meaning is NaN: without an anomalous or without a normal sample there is nothing to
tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

HEADINGS = {
    "image_auroc": "I-AUROC",
    "image_ap": "I-AP",
    "image_f1max": "I-F1max",
    "pixel_auroc": "P-AUROC",
    "pixel_ap": "P-AP",
    "pixel_f1max": "P-F1max",
    "aupro": "AUPRO",
}
"""The metrics in the order in which they are returned and printed, with their column headings."""

_EIGHT_CONNECTED = np.ones((3, 3), dtype=bool)


def class_metrics(
    scores: ArrayLike,
    labels: ArrayLike,
    score_maps: ArrayLike,
    masks: ArrayLike,
    max_fpr: float = 0.3,
) -> dict[str, float]:
    """Return the seven metrics of one class; the formulas stand at the top of this module.

    Takes about five times the memory of float32 ``score_maps`` on top of its arguments.

    Args:
        scores: Image scores, (n,), floating point, higher means more anomalous.
        labels: True for an anomalous image, (n,), bool.
        score_maps: Pixel scores, (n, H, W), floating point; float32 is the fast case, and no dtype
            is rounded.
        masks: True for an anomalous pixel, (n, H, W), bool. The mask of an anomalous image may be
            empty (a defect smaller than a pixel); that of a normal image must be.
        max_fpr: False positive rate up to which AUPRO integrates, in (0, 1].

    Returns:
        The metrics as fractions, in the order and under the keys of `HEADINGS`. Image metrics are
        NaN unless both kinds of images are present, pixel metrics unless both kinds of pixels are.

    Raises:
        ValueError: For a wrong shape or dtype, a score that is NaN or infinite, an anomalous pixel
            in an image labeled normal, or ``max_fpr`` outside (0, 1].
    """
    image_scores, image_labels = _scored("scores", scores, "labels", labels, ndim=1)
    pixel_scores, pixel_labels = _scored("score_maps", score_maps, "masks", masks, ndim=3)
    if not 0 < max_fpr <= 1:
        raise ValueError(f"max_fpr must be in (0, 1], got {max_fpr=}")
    if len(pixel_scores) != len(image_scores):
        raise ValueError(
            "score_maps must have as many images as scores, "
            f"got {len(pixel_scores)} maps and {len(image_scores)} scores"
        )
    contradictory = pixel_labels.any(axis=(1, 2)) & ~image_labels
    if contradictory.any():
        raise ValueError(
            "masks must be empty where labels is False, "
            f"got anomalous pixels in image {int(contradictory.argmax())}"
        )
    values = (
        *_image_metrics(image_scores, image_labels),
        *_pixel_metrics(pixel_scores, pixel_labels, max_fpr),
    )
    return dict(zip(HEADINGS, values, strict=True))


def _image_metrics(
    scores: NDArray[np.floating], labels: NDArray[np.bool_]
) -> tuple[float, float, float]:
    if labels.all() or not labels.any():
        return (math.nan,) * 3
    precision, recall, _ = precision_recall_curve(labels, scores)
    # Both are 0 where nothing but normal images scores as high.
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)
    return (
        float(roc_auc_score(labels, scores)),
        float(average_precision_score(labels, scores)),
        float(f1.max()),
    )


def _pixel_metrics(
    score_maps: NDArray[np.floating], masks: NDArray[np.bool_], max_fpr: float
) -> tuple[float, float, float, float]:
    curve = _curve(score_maps, masks)
    if curve is None:
        return (math.nan,) * 4
    return _auroc(curve), _average_precision(curve), _f1_max(curve), _aupro(curve, max_fpr)


def mean_metrics(per_class: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each metric over the classes, every class with the same weight.

    A class in which a metric is undefined (NaN) is left out of the mean of that metric, and of no
    other. A metric that no class defines is NaN.

    Args:
        per_class: The metrics of each class, all with the same keys.

    Returns:
        The mean of each metric, in the order of the first class.

    Raises:
        ValueError: If there is no class, or if the classes differ in their metrics.
    """
    if not per_class:
        raise ValueError(f"per_class must hold at least one class, got {per_class=}")
    keys = list(next(iter(per_class.values())))
    for name, metrics in per_class.items():
        if set(metrics) != set(keys):
            raise ValueError(
                f"per_class must give every class the metrics {keys}, "
                f"got {list(metrics)} for {name!r}"
            )
    mean = {}
    for key in keys:
        defined = [float(m[key]) for m in per_class.values() if not math.isnan(m[key])]
        mean[key] = math.fsum(defined) / len(defined) if defined else math.nan
    return mean


def format_table(per_class: Mapping[str, Mapping[str, float]], mean: Mapping[str, float]) -> str:
    """Return metrics as a plain-text table in percent: a row per class, a rule, the mean.

    Args:
        per_class: The metrics of each class, as fractions, by the keys of `HEADINGS`.
        mean: The mean of each metric, as a fraction.

    Returns:
        The lines of the table, joined by newlines, with none at the end. NaN prints as "-".
    """

    def row(name: str, metrics: Mapping[str, float]) -> list[str]:
        percents = [100 * metrics[key] for key in HEADINGS]
        return [name, *("-" if math.isnan(value) else f"{value:.1f}" for value in percents)]

    header = ["class", *HEADINGS.values()]
    body = [row(name, metrics) for name, metrics in per_class.items()]
    last = row("mean", mean)
    widths = [max(map(len, column)) for column in zip(header, *body, last, strict=True)]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))

    def line(cells: list[str]) -> str:
        first, *numbers = cells
        aligned = [f"{cell:>{w}}" for cell, w in zip(numbers, widths[1:], strict=True)]
        return "  ".join([f"{first:<{widths[0]}}", *aligned])

    return "\n".join([line(header), rule, *map(line, body), rule, line(last)])


@dataclass(frozen=True)
class _Curve:
    """What lies above each threshold, from the highest threshold to the lowest.

    Thresholds at which only normal samples are added lie on a horizontal piece of the ROC and PRO
    curves, where no metric changes or improves; only the ends of such a piece are kept. This leaves
    a few per cent of the thresholds of a class and changes no result.
    """

    true_positives: NDArray[np.int64]  # (thresholds,)
    false_positives: NDArray[np.int64]  # (thresholds,)
    overlap: NDArray[np.float64]  # (thresholds,), mean over the regions of the part above


def _curve(score_maps: NDArray[np.floating], masks: NDArray[np.bool_]) -> _Curve | None:
    """Return the curve of pixels, their regions told apart, or None where it has no meaning."""
    regions = np.zeros(masks.shape, dtype=np.uint32)  # 0 for normal pixels, else the region, from 1
    count = 0
    for i in np.flatnonzero(masks.any(axis=(1, 2))):
        labeled, more = ndimage.label(masks[i], structure=_EIGHT_CONNECTED)
        regions[i] = np.where(labeled > 0, labeled + count, 0)
        count += more
    areas = np.bincount(regions.reshape(-1), minlength=1)  # (1 + regions,)
    if areas[0] == 0 or len(areas) == 1:
        return None
    last, regions = _sort_descending(score_maps.reshape(-1), regions.reshape(-1))
    anomalous = np.flatnonzero(regions)  # (P,), ranks
    above = np.flatnonzero(last) + 1  # (distinct scores,), samples at or above each

    rises = np.unique(np.searchsorted(above, anomalous, side="right"))
    kept = np.union1d(rises, np.append(rises[rises > 0] - 1, len(above) - 1))
    above = above[kept]
    true_positives = np.searchsorted(anomalous, above)

    share = 1 / (areas[1:].astype(np.float64) * (len(areas) - 1))  # of one pixel in the overlap
    overlap = np.concatenate([[0.0], np.cumsum(share[regions[anomalous] - 1])])  # (1 + P,)
    overlap = overlap[true_positives]
    return _Curve(true_positives, above - true_positives, overlap)


def _sort_descending(
    scores: NDArray[np.floating], regions: NDArray[np.uint32]
) -> tuple[NDArray[np.bool_], NDArray[np.uint32]]:
    """Sort by falling score; return where a run of equal scores ends, and the sorted regions.

    The bits of a float32, read as an integer, keep its order once the negative numbers are
    reversed. Above a sample's region in one 64-bit integer they sort in place by NumPy's vectorized
    sort, without an index to gather by: less than half of the time of ``argsort``.
    """
    if scores.dtype != np.float32:
        order = np.argsort(-scores, kind="stable")
        scores = scores[order]
        return _ends_of_runs(scores), regions[order]
    bits = (scores + np.float32(0)).view(np.int32)  # -0.0 + 0.0 is 0.0, so that the zeros tie
    bits ^= ~(bits >> 31) & np.int32(0x7FFFFFFF)
    packed = bits.view(np.uint32).astype(np.uint64)
    del bits
    packed <<= np.uint64(32)
    packed |= regions
    packed.sort()
    regions = packed.astype(np.uint32)  # the lower half
    packed >>= np.uint64(32)
    return _ends_of_runs(packed), regions


def _ends_of_runs(values: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Return True at the last of each run of equal values, (n,)."""
    last = np.ones(len(values), dtype=bool)
    np.not_equal(values[1:], values[:-1], out=last[:-1])
    return last


def _auroc(curve: _Curve) -> float:
    tp, fp = curve.true_positives, curve.false_positives
    # Twice the area in whole numbers: exact below 4e9 samples.
    area = np.dot(np.diff(fp, prepend=0), tp + np.concatenate([[0], tp[:-1]]))
    return int(area) / (2 * int(tp[-1]) * int(fp[-1]))


def _average_precision(curve: _Curve) -> float:
    tp, fp = curve.true_positives, curve.false_positives
    return float(np.dot(np.diff(tp, prepend=0), tp / (tp + fp)) / tp[-1])


def _f1_max(curve: _Curve) -> float:
    tp, fp = curve.true_positives, curve.false_positives
    return float(np.max(2 * tp / (tp + fp + tp[-1])))


def _aupro(curve: _Curve, max_fpr: float) -> float:
    fpr = np.concatenate([[0.0], curve.false_positives / curve.false_positives[-1]])
    overlap = np.concatenate([[0.0], curve.overlap])
    inside = int(np.searchsorted(fpr, max_fpr, side="right"))
    if inside < len(fpr):
        part = (max_fpr - fpr[inside - 1]) / (fpr[inside] - fpr[inside - 1])
        at_limit = overlap[inside - 1] + part * (overlap[inside] - overlap[inside - 1])
        fpr = np.append(fpr[:inside], max_fpr)
        overlap = np.append(overlap[:inside], at_limit)
    area = np.dot(np.diff(fpr), overlap[1:] + overlap[:-1]) / 2
    return float(area / max_fpr)


def _scored(
    scores_name: str,
    scores: ArrayLike,
    labels_name: str,
    labels: ArrayLike,
    ndim: int,
) -> tuple[NDArray[np.floating], NDArray[np.bool_]]:
    """Check scores and the labels that go with them; widen float16, which has no fast sort."""
    score_array, label_array = np.asarray(scores), np.asarray(labels)
    if score_array.dtype.kind != "f":
        raise ValueError(f"{scores_name} must be floating point, got {score_array.dtype}")
    if label_array.dtype != np.bool_:
        raise ValueError(
            f"{labels_name} must be bool, got {label_array.dtype} (compare with a threshold first)"
        )
    if score_array.ndim != ndim:
        expected = {1: "(n,)", 3: "(n, H, W)"}[ndim]
        raise ValueError(f"{scores_name} must have shape {expected}, got {score_array.shape}")
    if score_array.shape != label_array.shape:
        raise ValueError(
            f"{labels_name} must have the shape of {scores_name}, "
            f"got {label_array.shape} and {score_array.shape}"
        )
    if not np.isfinite(score_array).all():
        bad = int(score_array.size - np.isfinite(score_array).sum())
        raise ValueError(f"{scores_name} must be finite, got {bad} values that are NaN or infinite")
    if score_array.dtype == np.float16:
        score_array = score_array.astype(np.float32)
    return score_array, label_array
