"""Tests of the metrics against scikit-learn and against a slow, obvious AUPRO."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from rlr_fast.inference import metrics
from rlr_fast.inference.metrics import HEADINGS, class_metrics, format_table, mean_metrics

KEYS = [
    "image_auroc",
    "image_ap",
    "image_f1max",
    "pixel_auroc",
    "pixel_ap",
    "pixel_f1max",
    "aupro",
]


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def image_metrics(scores, labels):
    """AUROC, AP and F1-max of images, each with a single pixel."""
    one = (len(scores), 1, 1)
    found = class_metrics(scores, labels, np.zeros(one, np.float32), labels.reshape(one))
    return [found[key] for key in KEYS[:3]]


def pixel_metrics(maps, masks, max_fpr=0.3):
    """AUROC, AP, F1-max and AUPRO of pixels."""
    images = np.zeros(len(maps), np.float32)
    found = class_metrics(images, masks.any(axis=(1, 2)), maps, masks, max_fpr)
    return [found[key] for key in KEYS[3:]]


def aupro(maps, masks, max_fpr=0.3):
    return pixel_metrics(maps, masks, max_fpr)[3]


def ranking_metrics(scores, labels):
    """AUROC, AP and F1-max of samples (n,), as images and as the pixels of one row."""
    return image_metrics(scores, labels), pixel_metrics(scores[None, None], labels[None, None])[:3]


def components(mask):
    """Regions of one mask by flood fill, diagonal neighbors included, as sets of (y, x)."""
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)}
    regions = []
    while left:
        todo = [left.pop()]
        region = set(todo)
        while todo:
            y, x = todo.pop()
            for near in [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]:
                if near in left:
                    left.remove(near)
                    region.add(near)
                    todo.append(near)
        regions.append(region)
    return regions


def slow_aupro(score_maps, masks, max_fpr):
    """The definition of AUPRO in rational numbers, one threshold and one region at a time."""
    limit = Fraction(max_fpr)
    normal = int((~masks).sum())
    regions = [(i, r) for i, mask in enumerate(masks) for r in components(mask)]
    curve = [(Fraction(0), Fraction(0))]
    for threshold in sorted(set(score_maps.ravel().tolist()), reverse=True):
        above = score_maps >= threshold
        parts = [Fraction(sum(bool(above[i][p]) for p in r), len(r)) for i, r in regions]
        curve.append(
            (Fraction(int((above & ~masks).sum()), normal), Fraction(sum(parts), len(parts)))
        )
    area = Fraction(0)
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 >= limit or x1 == x0:
            continue
        if x1 > limit:
            x1, y1 = limit, y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
        area += (x1 - x0) * (y0 + y1) / 2
    return float(area / limit)


def sklearn_f1_max(labels, scores):
    precision, recall, _ = precision_recall_curve(labels, scores)
    with np.errstate(invalid="ignore"):
        return np.nanmax(2 * precision * recall / (precision + recall))


def random_maps(seed, levels=None, shape=(4, 13, 11), shift=0.6, dtype=np.float32):
    """Masks with several regions each, some touching at a corner, the first image normal."""
    rng = np.random.default_rng(seed)
    masks = rng.random(shape) < 0.2
    masks[0] = False
    maps = rng.normal(size=shape) + shift * masks
    if levels is not None:
        maps = np.round(maps * levels) / levels
    return maps.astype(dtype), masks


SCORES = [
    pytest.param(None, np.float32, id="no-ties"),
    pytest.param(2, np.float32, id="ties-across-the-two-kinds"),
    pytest.param(None, np.float16, id="half-precision"),
    pytest.param(None, np.float64, id="double-precision-is-not-rounded"),
    pytest.param(2, np.float64, id="ties-in-double"),
]


@pytest.mark.parametrize(("levels", "dtype"), SCORES)
@pytest.mark.parametrize("seed", [0, 1])
def test_ranking_metrics_equal_scikit_learn(seed, levels, dtype):
    scores, labels = random_maps(seed, levels, (2000,), dtype=dtype)
    expected = [
        roc_auc_score(labels, scores),
        average_precision_score(labels, scores),
        sklearn_f1_max(labels, scores),
    ]
    for found in ranking_metrics(scores, labels):
        assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("scores", "labels", "expected"),
    [
        pytest.param([1, 2, 3, 4], [0, 0, 1, 1], (1, 1, 1), id="perfect"),
        pytest.param([4, 3, 2, 1], [0, 0, 1, 1], (0, (1 / 3 + 1 / 2) / 2, 2 / 3), id="reversed"),
        pytest.param([5, 5, 5, 5], [0, 1, 0, 0], (0.5, 0.25, 0.4), id="constant"),
        pytest.param([0.0, -0.0], [0, 1], (0.5, 0.5, 2 / 3), id="both-zeros-tie"),
        pytest.param([-2, -1, 1e-40], [0, 1, 1], (1, 1, 1), id="negative-and-subnormal"),
        pytest.param([-1, 1], [1, 0], (0, 0.5, 2 / 3), id="negative-below-positive"),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ranking_metrics_by_hand(scores, labels, expected, dtype):
    scores, labels = np.array(scores, dtype), np.array(labels, bool)
    for found in ranking_metrics(scores, labels):
        assert found == pytest.approx(expected, abs=1e-12)


def test_scores_that_differ_by_the_least_are_not_tied():
    scores, labels = np.array([1.0, 1.0 + 1e-12]), np.array([False, True])
    assert [found[0] for found in ranking_metrics(scores, labels)] == [1, 1]
    neighbors = np.array([1, np.nextafter(np.float32(1), np.float32(2))], np.float32)
    assert [found[0] for found in ranking_metrics(neighbors, labels)] == [1, 1]
    single = ranking_metrics(scores.astype(np.float32), labels)
    assert [found[0] for found in single] == [0.5, 0.5]


@pytest.mark.parametrize("max_fpr", [0.05, 0.3, 1.0])
@pytest.mark.parametrize(("levels", "dtype"), SCORES)
def test_aupro_equals_definition(levels, dtype, max_fpr):
    for seed in range(3):
        maps, masks = random_maps(seed, levels, dtype=dtype)
        expected = slow_aupro(maps, masks, max_fpr)
        assert aupro(maps, masks, max_fpr) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "mask", "max_fpr", "expected"),
    [
        pytest.param([9, 8, 1, 0], [1, 1, 0, 0], 0.3, 1, id="perfect"),
        pytest.param([0, 1, 8, 9], [1, 1, 0, 0], 0.3, 0, id="reversed"),
        pytest.param([5, 5, 5, 5], [1, 1, 0, 0], 0.3, 0.15, id="one-tie-crosses-the-limit"),
        pytest.param([9, 7, 8, 6], [1, 1, 0, 0], 0.5, 0.5, id="limit-on-a-vertical-step"),
        pytest.param([9, 7, 8, 6], [1, 1, 0, 0], 0.75, 2 / 3, id="limit-after-a-vertical-step"),
        # Regions of 1 and 3 pixels: the small one counts as much as the large one.
        pytest.param([9, 5, 1, 1, 1, 0], [1, 0, 1, 1, 1, 0], 0.5, 0.5, id="regions-weigh-the-same"),
    ],
)
def test_aupro_by_hand(scores, mask, max_fpr, expected):
    maps = np.array(scores, np.float32)[None, None, :]
    masks = np.array(mask, bool)[None, None, :]
    assert aupro(maps, masks, max_fpr) == pytest.approx(expected, abs=1e-12)


def test_corner_neighbors_are_one_region():
    # 8-connectivity: pixel (0, 0) hangs on the region of two; with 4 there would be two regions.
    masks = np.zeros((1, 3, 4), bool)
    masks[0, 0, 0] = masks[0, 1, 1] = masks[0, 1, 2] = True
    maps = np.zeros((1, 3, 4), np.float32)
    maps[0, 0, 0] = 2
    maps[~masks] = 1
    assert aupro(maps, masks, 1.0) == pytest.approx((1 / 3 + 1 / 3) / 2, abs=1e-12)


def test_regions_of_two_images_are_not_joined():
    # One pixel found of 1, none found of 3: overlap (1 + 0) / 2, whereas 1 / 4 if they were one.
    masks = np.zeros((2, 1, 6), bool)
    masks[0, 0, 0] = masks[1, 0, :3] = True
    maps = np.where(masks, 0, 1).astype(np.float32)
    maps[0, 0, 0] = 2
    assert aupro(maps, masks, 1.0) == pytest.approx(0.5, abs=1e-12)


def test_class_metrics_are_in_order_and_plain_numbers():
    maps, masks = random_maps(3, levels=4)
    labels = masks.any(axis=(1, 2))
    scores = maps.max(axis=(1, 2))
    found = class_metrics(scores, labels, maps, masks, max_fpr=0.2)
    assert list(found) == KEYS == list(HEADINGS)
    assert all(type(value) is float for value in found.values())
    assert list(found.values()) == [
        *image_metrics(scores, labels),
        *pixel_metrics(maps, masks, 0.2),
    ]


def test_class_metrics_default_limit_is_0_3():
    maps, masks = random_maps(4)
    found = class_metrics(maps.max(axis=(1, 2)), masks.any(axis=(1, 2)), maps, masks)
    assert found["aupro"] == pytest.approx(slow_aupro(maps, masks, 0.3), abs=1e-12)


@pytest.mark.parametrize(
    "transform",
    [
        pytest.param(lambda s: 1000 * s - 7, id="affine-makes-all-negative"),
        pytest.param(np.exp, id="exp"),
        pytest.param(np.cbrt, id="odd-root-keeps-signs"),
    ],
)
def test_metrics_depend_on_ranks_only(transform):
    maps, masks = random_maps(5, levels=8)
    labels = masks.any(axis=(1, 2))
    scores = maps.max(axis=(1, 2)).astype(np.float64)
    before = class_metrics(scores, labels, maps, masks)
    assert class_metrics(transform(scores), labels, transform(maps), masks) == before


def test_metrics_do_not_depend_on_sample_order():
    maps, masks = random_maps(6, levels=2)
    scores, labels = maps.max(axis=(1, 2)), masks.any(axis=(1, 2))
    forward = class_metrics(scores, labels, maps, masks)
    reverse = class_metrics(scores[::-1], labels[::-1], maps[::-1], masks[::-1])
    assert reverse == pytest.approx(forward, abs=1e-12)


def test_strided_maps_are_read_in_their_own_order():
    maps, masks = random_maps(7)
    strided = np.asfortranarray(maps)
    assert pixel_metrics(strided, masks) == pixel_metrics(maps, masks)
    assert pixel_metrics(strided, np.asfortranarray(masks)) == pixel_metrics(maps, masks)


def test_arguments_are_left_unchanged():
    maps, masks = random_maps(8)
    maps.flat[:2] = -0.0
    before = maps.copy(), masks.copy()
    class_metrics(maps.max(axis=(1, 2)), masks.any(axis=(1, 2)), maps, masks)
    assert maps.tobytes() == before[0].tobytes()
    assert (masks == before[1]).all()


def test_pixels_are_sorted_once_for_all_pixel_metrics(monkeypatch):
    sizes = []
    sort = metrics._sort_descending

    def counted(scores, regions):
        sizes.append(scores.size)
        return sort(scores, regions)

    monkeypatch.setattr(metrics, "_sort_descending", counted)
    maps, masks = random_maps(9)
    class_metrics(maps.max(axis=(1, 2)), masks.any(axis=(1, 2)), maps, masks)
    assert sizes == [maps.size]


IMAGE, PIXEL = set(KEYS[:3]), set(KEYS[3:])


@pytest.mark.parametrize(
    ("labels", "anomalous", "undefined"),
    [
        pytest.param([0, 0], slice(0), IMAGE | PIXEL, id="only-normal-images"),
        pytest.param([0, 1], slice(0), PIXEL, id="no-anomalous-pixel"),
        pytest.param([1, 1], slice(3), IMAGE, id="only-anomalous-images"),
        pytest.param([1, 1], slice(None), IMAGE | PIXEL, id="only-anomalous-pixels"),
        pytest.param([], slice(None), IMAGE | PIXEL, id="no-image"),
    ],
)
def test_undefined_metrics_are_nan_without_a_warning(labels, anomalous, undefined):
    labels = np.array(labels, bool)
    maps = np.random.default_rng(0).random((len(labels), 4, 5)).astype(np.float32)
    masks = np.zeros(maps.shape, bool)
    masks[labels, :, anomalous] = True
    found = class_metrics(np.arange(len(labels), dtype=np.float32), labels, maps, masks)
    assert {key for key, value in found.items() if math.isnan(value)} == undefined


def arguments(**changed):
    maps, masks = random_maps(0)
    good = {
        "scores": maps.max(axis=(1, 2)),
        "labels": masks.any(axis=(1, 2)),
        "score_maps": maps,
        "masks": masks,
    }
    return good | {key: change(good.get(key)) for key, change in changed.items()}


def spoiled(value):
    def change(array):
        array = array.copy()
        array.flat[1] = value
        return array

    return change


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        pytest.param(
            {"scores": spoiled(np.nan)}, "^scores must be finite, got 1 val", id="nan-score"
        ),
        pytest.param({"score_maps": spoiled(np.inf)}, "^score_maps must be finite", id="inf-pixel"),
        pytest.param(
            {"score_maps": lambda a: a[:, None]}, r"^score_maps.*\(n, H, W\)", id="channel"
        ),
        pytest.param({"score_maps": lambda a: a.astype(int)}, "^score_maps.*float", id="int-map"),
        pytest.param({"scores": lambda a: a[:, None]}, r"^scores.*\(n,\)", id="column-of-scores"),
        pytest.param({"labels": lambda a: a.astype(int)}, "^labels must be bool", id="int-labels"),
        pytest.param({"masks": lambda a: 255 * a.astype("u1")}, "^masks must be bool", id="0-255"),
        pytest.param({"masks": lambda a: a[:, 1:]}, "^masks must have the shape", id="mask-size"),
        pytest.param({"labels": lambda a: a[1:]}, "^labels must have the shape", id="label-count"),
        pytest.param(
            {"scores": lambda a: a[1:], "labels": lambda a: a[1:]},
            "^score_maps must have as many images as scores",
            id="one-score-short",
        ),
        pytest.param({"masks": spoiled(True)}, "^masks must be empty.*image 0", id="normal-mask"),
        pytest.param({"max_fpr": lambda _: 0.0}, "^max_fpr", id="empty-limit"),
        pytest.param({"max_fpr": lambda _: 1.5}, "^max_fpr", id="limit-above-all"),
        pytest.param({"max_fpr": lambda _: math.nan}, "^max_fpr", id="nan-limit"),
    ],
)
def test_wrong_arguments_are_named(changed, message):
    with pytest.raises(ValueError, match=message):
        class_metrics(**arguments(**changed))


def test_anomalous_image_may_have_an_empty_mask():
    maps, masks = random_maps(0)
    labels = np.ones(4, bool)
    labels[1] = False
    masks[1] = False  # images 0 (anomalous, nothing marked) and 1 (normal) have empty masks
    found = class_metrics(maps.max(axis=(1, 2)), labels, maps, masks)
    assert not any(math.isnan(value) for value in found.values())


def test_mean_leaves_out_undefined_classes_of_each_metric():
    per_class = {
        "bottle": {"image_auroc": 0.5, "aupro": 0.25},
        "cable": {"image_auroc": 1.0, "aupro": math.nan},
    }
    assert mean_metrics(per_class) == {"image_auroc": 0.75, "aupro": 0.25}
    alone = mean_metrics({"cable": per_class["cable"]})
    assert alone["image_auroc"] == 1
    assert math.isnan(alone["aupro"])


def test_mean_refuses_no_class_and_unlike_classes():
    with pytest.raises(ValueError, match=r"^per_class must hold at least one"):
        mean_metrics({})
    with pytest.raises(ValueError, match=r"^per_class must give every class.*'cable'"):
        mean_metrics({"bottle": {"aupro": 1.0}, "cable": {"image_ap": 1.0}})


def test_table_is_aligned_and_in_percent():
    values = [0.98765, 1.0, 0.5, 0.0449, 0.04451, math.nan, 0.9]
    per_class = {
        "metal_nut": dict(zip(KEYS, values, strict=True)),
        "cable": dict.fromkeys(KEYS, 1.0),
    }
    assert format_table(per_class, dict.fromkeys(KEYS, 0.75)).splitlines() == [
        "class      I-AUROC   I-AP  I-F1max  P-AUROC   P-AP  P-F1max  AUPRO",
        "------------------------------------------------------------------",
        "metal_nut     98.8  100.0     50.0      4.5    4.5        -   90.0",
        "cable        100.0  100.0    100.0    100.0  100.0    100.0  100.0",
        "------------------------------------------------------------------",
        "mean          75.0   75.0     75.0     75.0   75.0     75.0   75.0",
    ]
