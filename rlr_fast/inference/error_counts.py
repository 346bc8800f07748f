"""False alarms and misses of decisions on labeled images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlr_fast.files import readable_digest
from rlr_fast.inference.decisions import Rule


@dataclass(frozen=True)
class ErrorCounts:
    """False alarms and misses of a rule on labeled images.

    Attributes:
        calibration_images: Those that the threshold rests on; None for several classes.
        threshold: Image score above which an image is called anomalous; None likewise.
        normal: Normal images, without those that the rule was calibrated on.
        false_alarms: Of them, those called anomalous.
        anomalous: Images with a defect.
        misses: Of them, those called normal.
    """

    calibration_images: int | None
    threshold: float | None
    normal: int
    false_alarms: int
    anomalous: int
    misses: int

    def to_dict(self) -> dict[str, float | int | None]:
        """Return counts and rates; a rate of no images is None."""
        rates = {"false_alarm_rate": self.false_alarm_rate, "miss_rate": self.miss_rate}
        return vars(self) | rates

    @property
    def false_alarm_rate(self) -> float | None:
        """False alarms over normal images."""
        return self.false_alarms / self.normal if self.normal else None

    @property
    def miss_rate(self) -> float | None:
        """Misses over images with a defect."""
        return self.misses / self.anomalous if self.anomalous else None


def count_errors(
    rule: Rule, scores: ArrayLike, labels: ArrayLike, files: Sequence[Path]
) -> ErrorCounts | None:
    """Count a rule's errors; None where it has no threshold.

    Images that it was calibrated on do not count as normal images: their scores made the threshold.

    Args:
        rule: Of the images' class.
        scores: Image scores, (n,).
        labels: True for an anomalous image, (n,), bool.
        files: The images.
    """
    if rule.threshold is None:
        return None
    above, anomalous = rule.p_values(scores) <= rule.alpha, np.asarray(labels)
    normal = ~anomalous
    normal[normal] = ~calibrated_on(
        rule, [file for file, is_normal in zip(files, normal, strict=True) if is_normal]
    )
    counts = (normal, above & normal, anomalous, ~above & anomalous)
    return ErrorCounts(
        len(rule.scores.image), rule.threshold, *(int(part.sum()) for part in counts)
    )


def calibrated_on(rule: Rule, files: Sequence[Path]) -> NDArray[np.bool_]:
    """Return of each image (n,) whether a copy of it is among those that a rule rests on."""
    known = set(rule.scores.files)
    return np.array([readable_digest(file) in known for file in files], dtype=bool)


@dataclass(frozen=True)
class DecisionErrors:
    """The errors of a decider on a test set.

    Attributes:
        alpha: The false-alarm rate that its thresholds promise.
        pool: Whether they rest on all classes pooled.
        classes: Counts of each class that can be decided.
    """

    alpha: float
    pool: bool
    classes: dict[str, ErrorCounts]

    @property
    def total(self) -> ErrorCounts:
        """The counts of all classes together; their thresholds are their own."""
        names = ("normal", "false_alarms", "anomalous", "misses")
        sums = [sum(getattr(each, name) for each in self.classes.values()) for name in names]
        return ErrorCounts(None, None, *sums)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain values, under the key ``all`` the total."""
        classes = {name: counts.to_dict() for name, counts in self.classes.items()}
        total = self.total.to_dict()
        return {"alpha": self.alpha, "pool": self.pool, "all": total, "classes": classes}

    def table(self) -> str:
        """Return false alarms and misses per class and in all as text."""

        def share(part: int, whole: int) -> str:
            return f"{part} of {whole} ({100 * part / whole:.1f} %)" if whole else "-"

        rows = [("class", "threshold", "false alarms", "misses")]
        for name, each in [*self.classes.items(), ("in all", self.total)]:
            limit = "" if each.threshold is None else f"{each.threshold:.4g}"
            alarms = share(each.false_alarms, each.normal)
            rows.append((name, limit, alarms, share(each.misses, each.anomalous)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        ]
        pooled = ", all classes pooled" if self.pool else ""
        return "\n".join([f"decisions at alpha {self.alpha:g}{pooled}:", *lines])
