"""False alarms of decisions, promised and found, over random splits into calibration and test.

``python -m benchmarks.false_alarms`` splits simulated scores of normal images: four classes whose
scores have a light tail, a heavy one, ties, and none of a finite mean.
``python -m benchmarks.false_alarms --results results.csv --run RUN`` splits the scores that
``predict`` gave to a data set's test images, and counts misses, too. Both exit with 1 where a rate
is above alpha by more than three standard errors.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.arguments import fraction, positive
from rlr_fast.data.layouts import NORMAL
from rlr_fast.inference.decisions import Decider
from rlr_fast.models.checkpoint import CheckpointError, fetch_checkpoint
from rlr_fast.training.calibration import Calibration, ClassScores, trained_classes

ALPHAS = (0.01, 0.05, 0.1)
_ERRORS = 3  # standard errors that a rate may lie above alpha

Scores = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Found:
    """False alarms and misses over many splits.

    Attributes:
        group: Name of the class, ``all`` for all of them.
        pool: Whether the threshold was that of all classes pooled.
        alpha: The rate that was promised.
        images: Calibration images that the threshold rests on; the fewest of all classes.
        false_alarms: Mean rate over the splits; None where alpha needs more images.
        error: Its standard error.
        misses: Mean rate, NaN without images with a defect.
    """

    group: str
    pool: bool
    alpha: float
    images: int
    false_alarms: float | None
    error: float
    misses: float

    @property
    def holds(self) -> bool:
        """Whether no more was found than promised, within the error."""
        return self.false_alarms is None or self.false_alarms <= self.alpha + _ERRORS * self.error


def simulated(images: int, seed: int = 0) -> Scores:
    """Return scores of ``images`` normal images in each of four classes."""
    rng = np.random.default_rng(seed)
    return {
        "light": rng.normal(1.0, 0.1, images),
        "heavy": rng.lognormal(0.5, 1.0, images),
        "ties": np.round(rng.gamma(3.0, 1.0, images)),
        "cauchy": rng.standard_cauchy(images),
    }


def measure(
    normal: Scores,
    defects: Mapping[str, NDArray[np.float64]],
    alphas: Sequence[float],
    *,
    units: Mapping[str, float] = {},
    share: float = 0.5,
    splits: int = 1000,
    seed: int = 0,
) -> list[Found]:
    """Calibrate on a random share of each class's normal images and decide the others, many times.

    Args:
        normal: Scores of the normal images of each class.
        defects: Scores of images with a defect.
        alphas: False-alarm rates to promise.
        units: Of pooled classes, see `Decider`.
        share: Of the normal images, for calibration.
        splits: How often.
        seed: Of the splits.
    """
    rng = np.random.default_rng(seed)
    names = list(normal)
    settings = [(pool, alpha) for pool in (False, True) for alpha in alphas]
    alarms = np.zeros((len(settings), splits, len(names)))
    missed = np.full_like(alarms, np.nan)
    images: dict[tuple[int, str], int] = {}
    undecided = set()
    sizes = np.array([len(normal[n]) - round(share * len(normal[n])) for n in names])
    for split in range(splits):
        known, new = {}, {}
        for name in names:
            order = rng.permutation(normal[name])
            count = round(share * len(order))
            images_of = [(score, score, "") for score in order[:count].tolist()]
            known[name], new[name] = ClassScores.of(images_of, "split"), order[count:]
        calibration = Calibration({}, known)
        for i, (pool, alpha) in enumerate(settings):
            decider = Decider(calibration, alpha, pool, units)
            for j, name in enumerate(names):
                rule = decider.rule(name)
                assert rule is not None
                images[i, name] = len(rule.scores.image)
                if rule.threshold is None:
                    undecided.add((i, name))
                    continue
                alarms[i, split, j] = (new[name] > rule.threshold).mean()
                if len(defects.get(name, ())):
                    missed[i, split, j] = (defects[name] <= rule.threshold).mean()
    found = []
    for i, (pool, alpha) in enumerate(settings):
        # Of pooled classes the rate over their mix is promised, and none of a single class.
        groups = {"all": list(range(len(names)))}
        if not pool:
            groups |= {name: [j] for j, name in enumerate(names)}
        for group, members in groups.items():
            count = min(images[i, names[j]] for j in members)
            if any((i, names[j]) in undecided for j in members):
                found.append(Found(group, pool, alpha, count, None, np.nan, np.nan))
                continue
            rates = np.average(alarms[i][:, members], axis=1, weights=sizes[members])
            error = float(rates.std() / np.sqrt(splits))
            with_defects = [j for j in members if len(defects.get(names[j], ()))]
            misses = float(missed[i][:, with_defects].mean()) if with_defects else np.nan
            found.append(Found(group, pool, alpha, count, float(rates.mean()), error, misses))
    return found


def table(found: Sequence[Found]) -> str:
    """Return a Markdown table, in percent."""

    def percent(value: float | None) -> str:
        return "-" if value is None or np.isnan(value) else f"{100 * value:.2f}"

    lines = [
        "| class | thresholds | images | promised | false alarms | ± | misses |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in found:
        way = "pooled" if each.pool else "per class"
        rates = map(percent, (each.alpha, each.false_alarms, each.error, each.misses))
        lines.append(f"| {each.group} | {way} | {each.images} | {' | '.join(rates)} |")
    return "\n".join(lines)


def read_results(path: Path) -> tuple[Scores, Scores]:
    """Return scores of normal images and of those with a defect, by class; the folder says which.

    Args:
        path: ``results.csv`` of ``predict``, over test images in folders named good, or ok, or by
            defect.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no such file.
    """
    normal: dict[str, list[float]] = {}
    defects: dict[str, list[float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row.get("failure"):
                continue
            try:
                folder, name, score = Path(row["path"]).parent.name, row["class"], row["score"]
                kind = normal if folder in (NORMAL, "ok") else defects
                kind.setdefault(name, []).append(float(score))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path} is no results.csv of predict: {error!r}") from error
    return tuple({n: np.array(v) for n, v in kind.items()} for kind in (normal, defects))  # type: ignore[return-value]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return 1 where a promise did not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, help="results.csv of predict, over test images")
    parser.add_argument("--run", type=Path, help="the run that predicted: units of its classes")
    parser.add_argument("--images", type=positive, default=400, help="simulated images per class")
    parser.add_argument("--splits", type=positive, default=1000)
    parser.add_argument("--share", type=fraction, default=0.5, help="of the images, to calibrate")
    parser.add_argument("--alpha", type=fraction, nargs="+", default=ALPHAS)
    args = parser.parse_args(arguments)
    try:
        found = read_results(args.results) if args.results else (simulated(args.images), {})
        units = trained_classes(fetch_checkpoint(args.run)) if args.run else {}
    except (OSError, ValueError, CheckpointError) as error:
        parser.error(str(error))
    normal, defects = found
    few = [n for n, s in normal.items() if not 0 < round(args.share * len(s)) < len(s)]
    if few or not normal:
        parser.error(f"too few normal images to split at --share {args.share}: {', '.join(few)}")
    options = {"units": units, "splits": args.splits, "share": args.share}
    rates = measure(normal, defects, args.alpha, **options)
    print(table(rates))
    return 0 if all(each.holds for each in rates) else 1


if __name__ == "__main__":
    raise SystemExit(main())
