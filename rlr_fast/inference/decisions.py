"""Decisions on images and their pixels, from the scores of normal images kept in a checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlr_fast.data.images import resize_mask
from rlr_fast.inference.conformal import (
    check_alpha,
    images_needed,
    p_values,
    smallest_alpha,
    threshold,
)
from rlr_fast.training.calibration import Calibration, ClassScores

ALPHA = 0.05
"""The false-alarm rate where none is asked for."""

CALIBRATE = "rlr-fast calibrate scores normal images that the run was not trained on"


@dataclass(frozen=True)
class Decision:
    """What is decided of an image.

    Attributes:
        p_value: See `rlr_fast.inference.conformal`.
        threshold: The image is anomalous if its score is above; None where the calibration has too
            few images for alpha.
        anomalous: Whether it is; None without a threshold.
        mask: Pixels above the pixel threshold, (h, w) of the score map, bool; None without one.
    """

    p_value: float
    threshold: float | None
    anomalous: bool | None
    mask: NDArray[np.bool_] | None

    @property
    def area(self) -> float | None:
        """The share of the pixels that is marked."""
        return None if self.mask is None else float(self.mask.mean())

    def box(self, size: tuple[int, int]) -> tuple[int, int, int, int] | None:
        """Return x, y, width and height around all that is marked, None where nothing is.

        Args:
            size: (height, width) of the image's file, whose pixels the box is in.
        """
        if self.mask is None or not self.mask.any():
            return None
        x, width = _extent(self.mask.any(axis=0), size[1])
        y, height = _extent(self.mask.any(axis=1), size[0])
        return x, y, width, height


def _extent(line: ArrayLike, length: int) -> tuple[int, int]:
    """Return start and length of what is marked along an axis, after resizing it to ``length``."""
    marked = np.asarray(line)
    places = np.flatnonzero(resize_mask(marked[None], (1, length)))
    if not len(places):  # in an image smaller than its map, marks between the pixels' centers
        return min(int(np.flatnonzero(marked)[0] * length / len(marked)), length - 1), 1
    return int(places[0]), int(places[-1] - places[0] + 1)


@dataclass(frozen=True, eq=False)
class Rule:
    """How images of a class, or of all classes pooled, are decided.

    At most a share of ``alpha`` of normal images has a score above ``threshold``; and at most a
    share of ``alpha`` has any pixel above ``pixel_threshold``: the same rule for the highest pixel
    of each image's score map, which is not smoothed. Each promise is one of its own, and holds for
    images that are exchangeable with the calibration's, see `rlr_fast.inference.conformal`.

    Attributes:
        name: Of the class; None for all of them pooled.
        scores: Of the calibration images, in the rule's unit.
        unit: Score that counts as 1 in ``scores``.
        alpha: False-alarm rate.
        threshold: Of image scores; None where there are too few calibration images for alpha.
        pixel_threshold: Of the pixels of score maps; None likewise.
    """

    name: str | None
    scores: ClassScores
    unit: float
    alpha: float
    threshold: float | None
    pixel_threshold: float | None

    def p_values(self, scores: ArrayLike) -> NDArray[np.float64]:
        """Return the p-values (n,) of image scores (n,); at most ``alpha`` is anomalous."""
        return p_values(self.scores.image, np.asarray(scores, dtype=np.float64) / self.unit)

    def decide(self, score: float, score_map: ArrayLike) -> Decision:
        """Decide an image by its score and score map (h, w)."""
        p_value = float(self.p_values(score))
        limit, pixels = self.threshold, self.pixel_threshold
        return Decision(
            p_value,
            limit,
            None if limit is None else p_value <= self.alpha,
            None if pixels is None else np.asarray(score_map) > pixels,
        )

    def scale(self, low: float) -> tuple[float, float] | None:
        """Return the color scale from ``low`` that has the pixel threshold in its middle, if any.

        None without a threshold above ``low``.
        """
        if self.pixel_threshold is None or self.pixel_threshold <= low:
            return None
        return low, 2 * self.pixel_threshold - low


class Decider:
    """The rules of a calibration at one false-alarm rate.

    Args:
        calibration: Of a checkpoint, see `rlr_fast.training.calibration.read_calibration`.
        alpha: False-alarm rate, in (0, 1).
        pool: Decide every image by the scores of all classes, each in its class's ``units``.
            ``alpha`` then holds over the mix of classes in the calibration, not for each of them.
        units: Of each class, a score that does not depend on the calibration images and makes it
            comparable with others: the highest of its training images, see
            `rlr_fast.training.calibration.trained_classes`. Without those of all classes scores are
            pooled as they are, and so are those that decide an image of unknown class.

    Raises:
        ValueError: ``alpha`` is out of its range.
    """

    def __init__(
        self,
        calibration: Calibration,
        alpha: float = ALPHA,
        pool: bool = False,
        units: Mapping[str, float] = {},
    ) -> None:
        self.alpha, self.pool = check_alpha(alpha), pool
        self._scoring = calibration.scoring
        self._rules = {n: self._rule(n, scores) for n, scores in calibration.classes.items()}
        self._own = self._rules
        self._pooled = self._rule(None, _pooled(calibration.classes, {}))
        if pool and all(units.get(name, 0) > 0 for name in calibration.classes):
            scores = _pooled(calibration.classes, units)
            self._rules = {n: self._rule(None, scores, units[n]) for n in calibration.classes}
        elif pool:
            self._rules = dict.fromkeys(calibration.classes, self._pooled)

    def _rule(self, name: str | None, scores: ClassScores, unit: float = 1.0) -> Rule:
        limits = [threshold(values, self.alpha) for values in (scores.image, scores.pixel)]
        image, pixel = (None if limit is None else _in_scores(limit, unit) for limit in limits)
        return Rule(name, scores, unit, self.alpha, image, pixel)

    def rule(self, category: str | None) -> Rule | None:
        """Return how an image is decided.

        Args:
            category: Its class; None if it is not known: the pooled scores decide.

        Returns:
            None where the class has no calibration images: the pooled ones are of others.
        """
        return self._pooled if category is None else self._rules.get(category)

    def own_rule(self, category: str | None) -> Rule | None:
        """Return the rule of an image's own class, whatever is pooled; else that of `rule`."""
        return self._own.get(category or "") or self.rule(category)

    def identity(self) -> dict[str, Any]:
        """Return by name what decides, as JSON has it."""
        rules = [(r.name, r.scores.image, r.scores.pixel, r.unit) for r in self._rules.values()]
        content = json.dumps([*rules, (self._pooled.scores.image, self._pooled.scores.pixel)])
        digest = hashlib.sha256(content.encode()).hexdigest()[:12]
        return {"alpha": self.alpha, "pool": self.pool, "digest of the calibration": digest}

    def check_scoring(self, scoring: Mapping[str, Any]) -> None:
        """Refuse scores that are made otherwise than those of the calibration.

        Args:
            scoring: From `rlr_fast.training.calibration.scoring_identity`.

        Raises:
            ValueError: Names what is different.
        """
        names = sorted(self._scoring.keys() | scoring.keys())
        pairs = [(name, self._scoring.get(name), scoring.get(name)) for name in names]
        changed = [f"{name} was {old}, now {new}" for name, old, new in pairs if old != new]
        if changed:
            raise ValueError(
                f"the calibration is of other scores ({'; '.join(changed)}); {CALIBRATE}"
            )

    def undecided(self, categories: Collection[str | None]) -> str | None:
        """Say which of the images' classes cannot be decided and what would help, in a line."""
        rules = {category: self.rule(category) for category in categories}
        missing = sorted(str(category) for category, rule in rules.items() if rule is None)
        few = {
            "all classes pooled" if rule.name is None else rule.name: len(rule.scores.image)
            for rule in rules.values()
            if rule is not None and rule.threshold is None
        }
        told = []
        if missing:
            told.append(f"there are no calibration images of {', '.join(missing)}; {CALIBRATE}")
        if few:
            smallest = smallest_alpha(min(few.values()))
            pooled, needed = len(self._pooled.scores.image), images_needed(self.alpha)
            told.append(
                f"alpha={self.alpha:g} needs {needed} calibration images, there "
                f"are {', '.join(f'{n} of {name}' for name, n in sorted(few.items()))}; possible "
                f"is --alpha {smallest:g} or more"
                + (
                    f", or --pool (all {pooled} together)"
                    if pooled > max(few.values()) and pooled >= needed
                    else ""
                )
            )
        return "; ".join(told) or None


def _in_scores(limit: float, unit: float) -> float:
    """Return the largest score that is, in the rule's unit, not above the limit."""
    score = limit * unit
    while score / unit > limit:
        score = math.nextafter(score, -math.inf)
    while (above := math.nextafter(score, math.inf)) / unit <= limit:
        score = above
    return score


def _pooled(classes: Mapping[str, ClassScores], units: Mapping[str, float]) -> ClassScores:
    """Return the scores of all classes, each in its unit; 1 where a class has none."""
    images = [
        (image / units.get(name, 1.0), pixel / units.get(name, 1.0), file)
        for name, scores in classes.items()
        for image, pixel, file in zip(scores.image, scores.pixel, scores.files, strict=True)
    ]
    return ClassScores.of(images, "pooled")
