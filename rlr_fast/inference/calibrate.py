"""Calibration of a trained model on normal images that it has not seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rlr_fast.config import InferenceExecution, Tiles
from rlr_fast.data import DataSet, ImageFailure, Sample
from rlr_fast.data.check import counted
from rlr_fast.data.contents import describe_images
from rlr_fast.data.hold_out import hold_out
from rlr_fast.files import file_digest, readable_digest
from rlr_fast.models.rlr import RLRModel
from rlr_fast.pictures.batches import check_placed
from rlr_fast.pictures.scored_files import score_files
from rlr_fast.training.calibration import (
    Calibration,
    ClassScores,
    mean_quantiles,
    pixel_quantiles,
    scoring_identity,
    write_calibration,
)
from rlr_fast.training.run_dir import read_trained


def calibration_images(
    data: DataSet, run: Mapping[str, Any] | None, split: str | None = None
) -> dict[str, list[Sample]]:
    """Return a data set's normal images that a run was not trained on, by class.

    Args:
        data: A data set, with all its classes.
        run: Settings of the run, see `rlr_fast.training.run_dir.read_run`, if there are any.
        split: ``train`` or ``test`` for the normal images of that split. By default, of the data
            that the run was trained on the images that were kept out; of other data those in
            ``validation/good``, or all images of plain folders.

    Raises:
        ValueError: There are none, the run was trained on them, or there is a choice to make.
    """
    is_own = is_trained_on(data, run)
    if is_own and run is not None:
        recipe = run["recipe"]
        data = hold_out(data, recipe.get("calibration_share", 0.0), recipe["seed"])
    if split == "test":
        images = {n: [s for s in data.test[n] if not s.is_anomaly] for n in data.classes}
    elif split == "train" and is_own:
        raise ValueError(f"the run was trained on the images of {str(data.root)!r}; take others")
    elif split is None and (is_own or any(data.validation.values())):
        images = data.validation
    elif split == "train" or data.layout == "folder":
        images = data.train
    else:
        raise ValueError(
            f"{str(data.root)!r} has no images in validation/good; say by --split train or test "
            "which normal images to take"
        )
    chosen = {name: samples for name, samples in images.items() if samples}
    if not chosen:
        kept = "the run was trained on all of them, see --calibration-share" if is_own else "none"
        raise ValueError(
            f"there are no normal images to calibrate on in {str(data.root)!r}: {kept}"
        )
    return chosen


def is_trained_on(data: DataSet, run: Mapping[str, Any] | None) -> bool:
    """Return whether a data set is the one that a run was trained on, wherever it lies.

    Args:
        data: A data set, with all its classes.
        run: Settings of the run, if there are any.
    """
    if run is None:
        return False
    names = run["data"]["classes"]
    if not set(names) <= set(data.classes):
        return False
    images = describe_images(data, {name: data.train[name] for name in names})
    return bool(images["files_digest"] == run["data"]["files_digest"])


def without_copies(
    images: Mapping[str, Sequence[Path]], checkpoint: Path
) -> tuple[dict[str, list[Path]], list[Path]]:
    """Return a run's own kept-out images without copies of those it was trained on; and these.

    Args:
        images: Files of each class.
        checkpoint: Folder of the run.

    Raises:
        TrainingError: The run's list of its images is damaged.
    """
    trained = read_trained(checkpoint)
    copies = {
        p for paths in images.values() for p in paths if trained and readable_digest(p) in trained
    }
    kept = {name: [p for p in paths if p not in copies] for name, paths in images.items()}
    return {name: paths for name, paths in kept.items() if paths}, sorted(copies)


def check_not_trained_on(images: Mapping[str, Sequence[Path]], checkpoint: Path) -> None:
    """Refuse images that a run was trained on, under whatever names: they score too low.

    Args:
        images: Files of each class.
        checkpoint: Folder of the run.

    Raises:
        ValueError: There are some.
        TrainingError: The run's list of its images is damaged.
    """
    trained = read_trained(checkpoint)
    files = [path for paths in images.values() for path in paths]
    known = [path for path in files if trained and readable_digest(path) in trained]
    if known:
        raise ValueError(
            f"the run was trained on {len(known)} of these {counted(len(files), 'image')}, such as "
            f"{str(known[0])!r}; take others"
        )


def calibrate(
    model: RLRModel,
    images: Mapping[str, Sequence[Path]],
    checkpoint: Path,
    previous: Calibration | None,
    execution: InferenceExecution = InferenceExecution(),
    *,
    source: str,
    tiles: Tiles | None = None,
    progress: Callable[[int], object] | None = None,
) -> tuple[Calibration, list[str]]:
    """Score normal images and keep the scores in a checkpoint; the model stays as it is.

    Args:
        model: The checkpoint's model, on its device.
        images: Files of each class, all of them normal, none of them trained on.
        checkpoint: Folder of the run.
        previous: The run's calibration. Classes without new images keep their scores there if
            these were made in the same way.
        execution: Precision, batch size and threads; predictions with another precision are not
            decided by these scores.
        source: Where the images come from, in words.
        tiles: Score every picture at its own resolution in tiles; by default the model's, if it has
            any.
        progress: Called with the number of files done since the last call.

    Returns:
        What the checkpoint holds now, and what is wrong with files that could not be read.

    Raises:
        ValueError: No image of a class can be read, or the execution does not fit the model.
        OSError: The scores cannot be written.
    """
    check_placed(model, execution)
    model.eval()
    tiles = tiles or model.config.tiles
    files = [(name, path) for name, paths in images.items() for path in paths]
    scores: dict[str, list[tuple[float, float, str]]] = {name: [] for name in images}
    quantiles: list[torch.Tensor] = []
    failures: list[str] = []
    for outcomes in score_files(model, (path for _, path in files), execution, tiles):
        for outcome in outcomes:
            if isinstance(outcome, ImageFailure):
                failures.append(str(outcome.error))
                continue
            name, path = files[outcome.index]
            highest = float(outcome.score_map.max())
            scores[name].append((outcome.score, highest, file_digest(path)))
            quantiles.append(pixel_quantiles(outcome.score_map))
        if progress is not None:
            progress(len(outcomes))
    empty = [name for name, of_class in scores.items() if not of_class]
    if empty:
        reason = next(iter(failures), "no files")
        raise ValueError(f"no image of {', '.join(empty)} can be read: {reason}")
    scoring = scoring_identity(model, execution.precision, tiles)
    kept = previous.classes if previous is not None and previous.scoring == scoring else {}
    new = {name: ClassScores.of_files(of_class, source) for name, of_class in scores.items()}
    calibration = Calibration(scoring, dict(sorted((kept | new).items())))
    write_calibration(checkpoint, calibration, mean_quantiles(torch.stack(quantiles)))
    return calibration, failures
