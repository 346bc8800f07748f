"""One picture and its mask, from the names that identify it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from rlr_fast.data.synthetic.board import BOARDS
from rlr_fast.data.synthetic.canvas import Canvas, expose, photograph, step
from rlr_fast.data.synthetic.defects import SURFACE_DEFECTS
from rlr_fast.data.synthetic.noise import Array, Stream
from rlr_fast.data.synthetic.objects import OBJECTS
from rlr_fast.data.synthetic.product import PART_DEFECTS, Fault, Product
from rlr_fast.data.synthetic.textures import TEXTURES

PRODUCTS: dict[str, Product] = {p.name: p for p in (*TEXTURES, *OBJECTS, *BOARDS)}

# A pixel counts as altered when a channel moves by more than this, of 1: three times the noise.
_VISIBLE = 0.03
# A defect covers this share of a square of the shorter side (10 pixels at 128 px), and moves the
# clearest quarter of its pixels by this much or more; failing that, the clearest attempt is taken.
_LEAST_AREA = 10 / 128**2
_LEAST_CHANGE = 0.085
_CLOSING = 0.012
_ATTEMPTS = 12
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Sample:
    """One picture of the set.

    Attributes:
        image: (H, W, 3) uint8.
        mask: (H, W) bool, True where the defect altered the picture; all False for a good one.
        good: (H, W, 3) uint8, the same picture without the defect; equals `image` outside `mask`.
        severity: 0 (subtle) to 1 (obvious) as drawn; 0 for a good picture.
    """

    image: Array
    mask: Array
    good: Array
    severity: float


def _picture(product: Product, size: tuple[int, int], stream: Stream, fault: Fault | None) -> Array:
    canvas = Canvas(size)
    part = fault is not None and fault.kind in PART_DEFECTS
    product.draw(canvas, stream, fault if part else None)
    if fault is not None and not part:
        SURFACE_DEFECTS[fault.kind](canvas, product, fault)
    return photograph(canvas, stream.child("light"))


def _altered(good: Array, bad: Array) -> Array:
    """Return the cleaned (H, W) mask of the pixels that a defect altered."""
    mask = np.abs(bad - good).max(axis=2) > _VISIBLE
    # Gaps narrower than a small fraction of the picture belong to the defect: a labeller would not
    # cut them out, and without their pixels the mask of a moved texture is lace.
    reach = max(1, round(_CLOSING * min(mask.shape)))
    padded = np.pad(mask, reach)
    near = ndimage.distance_transform_edt(~padded) <= reach
    closed = ndimage.distance_transform_edt(near) > reach
    mask = mask | closed[reach:-reach, reach:-reach]
    labels, count = ndimage.label(mask, np.ones((3, 3)))
    if count > 1:
        area = np.bincount(labels.ravel())
        # Specks far smaller than the defect are rounding at some distant edge.
        keep = area >= max(2, 0.02 * area[1:].max())
        keep[0] = False
        mask = keep[labels]
    return mask


def _confined(good: Array, bad: Array, mask: Array) -> Array:
    """Return ``bad`` with its changes kept to the mask.

    Changes fade to nothing at the threshold of the mask: cut off hard, the outskirts of a shadow or
    of a soft rim would leave a faint outline that gives the defect away.
    """
    change = np.abs(bad - good).max(axis=2)
    weight = step(_VISIBLE, 2.5 * _VISIBLE, change) * mask
    return good + (bad - good) * weight[..., None]


def render_sample(
    class_name: str,
    split: str,
    kind: str,
    index: int,
    *,
    size: tuple[int, int] = (256, 256),
    seed: int = 0,
) -> Sample:
    """Render one picture; a pure function of its arguments.

    Severity is spread evenly over [0, 1] as ``index`` grows, by a golden-ratio sequence that starts
    at a random place for each class and kind.

    Args:
        class_name: one of `PRODUCTS`.
        split: ``"train"`` or ``"test"``.
        kind: ``"good"`` or one of the class's defect kinds.
        index: number of the picture in its folder.
        size: (H, W) in pixels.
        seed: of the whole set.

    Returns:
        The picture, its mask, and the same picture without its defect.
    """
    product = PRODUCTS[class_name]
    stream = Stream(seed, class_name, split, kind, index)
    good_picture = _picture(product, size, stream, None)
    good = expose(good_picture, stream.child("sensor"))
    if kind == "good":
        return Sample(good, np.zeros(size, bool), good, 0.0)
    start = Stream(seed, class_name, split, kind).uniform("severity")
    severity = (start + index * _GOLDEN) % 1.0
    least = max(_LEAST_AREA * min(size) ** 2, 1)
    best: Sample | None = None
    clearest = 0.0
    for attempt in range(_ATTEMPTS):
        # A defect that falls where it hardly shows is drawn again elsewhere, a little stronger.
        strength = min(severity + 0.1 * attempt, 1.0)
        fault = Fault(kind, stream.child("defect", attempt), strength)
        bad_picture = _picture(product, size, stream, fault)
        mask = _altered(good_picture, bad_picture)
        if mask.sum() < least:
            continue
        bad_picture = _confined(good_picture, bad_picture, mask)
        change = float(np.quantile(np.abs(bad_picture - good_picture).max(axis=2)[mask], 0.75))
        if change > clearest:
            image = expose(bad_picture, stream.child("sensor"))
            best, clearest = Sample(image, mask, good, strength), change
        if clearest >= _LEAST_CHANGE:
            break
    if best is None:
        raise RuntimeError(
            f"no {kind} altered {least:.0f} pixels in {_ATTEMPTS} attempts: "
            f"{class_name=}, {split=}, {index=}, {size=}, {seed=}"
        )
    return best
