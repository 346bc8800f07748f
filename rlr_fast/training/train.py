"""Training: one model on all classes, checkpointed each epoch and resumable to the bit."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from rlr_fast.config import RLRConfig, TrainConfig, TrainExecution, level_name
from rlr_fast.data import DataSet, ImageFailure, Sample
from rlr_fast.data.check import counted
from rlr_fast.data.contents import describe_images
from rlr_fast.data.hold_out import MIN_IMAGES, hold_out
from rlr_fast.data.parts import cut
from rlr_fast.files import write_atomically
from rlr_fast.models.checkpoint import CONFIG_FILE, CheckpointError, load_config
from rlr_fast.models.environment import environment, start_device
from rlr_fast.models.precision import check_precision
from rlr_fast.models.reconstructor import Reconstructor
from rlr_fast.models.rlr import RLRModel
from rlr_fast.training.calibration import (
    CALIBRATION_FILE,
    Calibration,
    read_calibration,
    score_held_out,
    score_quantiles,
)
from rlr_fast.training.distributed import Processes, processes
from rlr_fast.training.feature_cache import cached_features
from rlr_fast.training.features import Features, FreshFeatures
from rlr_fast.training.progress import progress_bar
from rlr_fast.training.run_dir import (
    TrainingError,
    check_folder,
    check_trained,
    digest_images,
    lock_run,
    read_trained,
    tell_other_processes,
    write_settings,
    write_trained,
)
from rlr_fast.training.scales import fit_scales
from rlr_fast.training.score_fit import fit_score
from rlr_fast.training.trainer import Trainer
from rlr_fast.visualization import loss_curve

CURVE_FILE = "loss.png"

# On 400 photographs `accurate` loses 1 to 2 points of I-AUROC with half of its 1,200 steps.
_FEW_STEPS = 600

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a training run leaves.

    Attributes:
        out: The run's folder, a checkpoint for `RLRModel.from_pretrained`.
        history: Rows of the log: step, epoch, loss, level_0 …, grad_norm, lr, images_per_s; and
            diversity, that term of the loss, where it has one.
        failures: Images that could not be read and were left out: those to train on, then those to
            calibrate on, each by its place among them.
        images_per_s: Median over the run; NaN where the history is lost.
        began: Epochs that the run had when it was resumed; all of them, if it was finished.
    """

    out: Path
    history: list[dict[str, float]]
    failures: list[ImageFailure]
    images_per_s: float
    began: int


def train(
    config: RLRConfig,
    recipe: TrainConfig,
    data: DataSet,
    out: Path,
    execution: TrainExecution = TrainExecution(),
    *,
    resume: bool = False,
    quiet: bool = False,
    progress: Callable[[str, int], object] = lambda what, images: None,
) -> TrainResult:
    """Train one model on the normal images of all classes and leave a checkpoint in ``out``.

    Minimizes eq. 13-14 with Adam. The features of the frozen backbone are computed once. Images are
    shuffled and perturbed by numbers that depend on seed, epoch, step and process alone, so that a
    resumed run sees what an uninterrupted one sees. With ``config.tile`` every tile of a picture is
    such an image; what is kept out are whole pictures, scored as prediction scores them.

    A share of each class's images is kept out (``recipe.calibration_share``), or the class's
    ``validation`` images are taken: their scores, in ``calibration.json``, are what decisions rest
    on, see `rlr_fast.inference.decisions`. Without any of them a run gives scores alone.

    Started by torchrun, all processes call this together. Process r of W computes and holds the
    features of images r, r + W, r + 2W, … and shuffles them by itself, so each number of processes
    has its own order of images and its own noise. A step is exact whatever their number: the
    gradient is that of the mean loss over the images that all of them took, ``batch_size`` of them.

    Args:
        config: The model.
        recipe: Epochs, batch size, learning rate, precision, seed.
        data: Its ``train`` samples are used, and its ``validation`` samples to calibrate on.
        out: Folder of the run: ``config.json``, ``model.safetensors``,
            ``training_state.safetensors``, ``run.json``, ``history.jsonl``, a TensorBoard log,
            ``loss.png``, ``calibration.json``. The first process alone reads and writes it.
        execution: Where and how to train; the result depends on it by rounding alone.
        resume: Go on from the last finished epoch of the run in ``out``, if there is one. Another
            number of processes may go on; the result is then not that of one uninterrupted run.
        quiet: No progress bar, and no line that says what is about to be trained.
        progress: Called with ``"features"`` or ``"train"`` and the number of images done since the
            last call; a resumed run first tells those of its finished epochs.

    Raises:
        ValueError: A class has no training images, an option does not fit the device, or the
            processes were not given the same run.
        BackendError: The backend cannot run on the device.
        TrainingError: ``out`` holds another run, another command works in it, the disk is full, the
            loss is not finite, or there are more processes than images.
        CacheError: The feature cache cannot be written.
        PeerError: Another process met one of these.
    """
    with processes() as group, contextlib.ExitStack() as stack:
        with group.together():
            device = start_device(execution)
            if config.diversity > 0 and recipe.loss_power != 1:
                raise ValueError(
                    "loss_power must be 1 beside the diversity of references, got "
                    f"loss_power={recipe.loss_power:g} and diversity={config.diversity:g}"
                )
            whole, data = data, hold_out(data, recipe.calibration_share, recipe.seed)
            _check_request(recipe, data, device, group)
            images = _training_images(data, config, group.workers(execution.workers))
            count = len(images.samples)
            if count < group.world_size:
                raise TrainingError(
                    f"{count} training images cannot be shared among {group.world_size} processes; "
                    f"start {count} at most"
                )
            record = {
                "model": config.to_dict(),
                "recipe": dataclasses.asdict(recipe),
                "data": describe_images(whole, whole.train)
                | {"kept_out_digest": describe_images(data, data.validation)["files_digest"]},
                "processes": group.world_size,
            }
            if group.is_main:
                check_folder(out, record, resume, data)
            torch.manual_seed(recipe.seed)
            model = RLRModel(config, backend=execution.backend).to(device)
            model.set_grad_checkpointing(execution.grad_checkpointing)
            if group.is_main:
                stack.enter_context(lock_run(out))
                check_folder(out, record, resume, data)  # another command may have been there
                tell_other_processes(out, record)
        group.agree(_decisive(record, model))
        digests: list[str | None] = []
        with group.together():
            if group.is_main:
                _tell_plan(model, recipe, data, images, execution, resume, quiet)
                digests = digest_images([s.path for s in images.pictures], execution.workers)
                check_trained(out, digests)
        features, samples, failures = _features(model, images, execution, quiet, progress, group)
        fit_scales(model, features, group)
        trainer = Trainer(
            model,
            recipe,
            features,
            out,
            group,
            compile=execution.compile,
            micro_batch_size=execution.micro_batch_size,
            progress=partial(progress, "train"),
        )
        with group.together():
            if group.is_main:
                record["environment"] = environment(device)
                record["way"] = {
                    "backend": execution.backend,
                    "compiled": execution.compile,
                    "grad_checkpointing": execution.grad_checkpointing,
                    "piece": execution.micro_batch_size,
                }
                failed = {failure.index for failure in failures}
                write_trained(out, [d for i, d in enumerate(digests) if i not in failed])
                write_settings(out, config.to_json(), record)
        trainer.fit(quiet)
        fitted = group.broadcast(lambda: _fitted_score(out, trainer.began == recipe.epochs))
        if fitted is not None:
            model.set_score(**fitted)
        else:
            fit_score(model, recipe, features, group)
            if model.uncertainty:  # its tensors are part of the checkpoint
                trainer.save()
        scores = score_quantiles(model, features, [s.category for s in samples], group)
        sources = {n: "validation" if whole.validation.get(n) else "held out" for n in data.classes}
        trained = group.broadcast(lambda: read_trained(out))
        calibration, unread = score_held_out(
            model, data.validation, sources, trained, group, group.workers(execution.workers)
        )
        failures += unread
        with group.together():
            if group.is_main:
                calibration = _later_calibration(out, model) or calibration
                if calibration is not None:
                    scores["calibration"] = dataclasses.asdict(calibration)
                write_atomically(out / CONFIG_FILE, model.config.to_json())
                write_atomically(out / CALIBRATION_FILE, json.dumps(scores, indent=2))
                if trainer.history:
                    loss_curve(trainer.history, out / CURVE_FILE)
        speeds = [row["images_per_s"] for row in trainer.history]
        speed = statistics.median(speeds) if speeds else math.nan
        return TrainResult(out, trainer.history, failures, speed, trainer.began)


def _tell_plan(
    model: RLRModel,
    recipe: TrainConfig,
    data: DataSet,
    images: _Images,
    execution: TrainExecution,
    resume: bool,
    quiet: bool,
) -> None:
    """Say what is about to be trained, and warn of what promises little."""
    held = _without_unfit(data, model.config, images, execution.workers)
    for line in _keyless_levels(model):
        _log.warning(line)
    count, (height, width) = len(images.samples), model.config.image_size
    steps = recipe.epochs * math.ceil(count / recipe.batch_size)
    if not resume and steps < _FEW_STEPS:
        _log.warning(_few_steps(count, steps, recipe))
    if not quiet:
        print(
            f"{images}, classes: {len(data.classes)}, {model.config.backbone} at {height} x "
            f"{width}, epochs: {recipe.epochs} ({steps} steps), on {model.device}",
            file=sys.stderr,
        )
        print(_calibration_plan(held, model.config, recipe.calibration_share), file=sys.stderr)


def _few_steps(images: int, steps: int, recipe: TrainConfig) -> str:
    """Say how many epochs of so few images would be enough steps."""
    enough = math.ceil(_FEW_STEPS / math.ceil(images / recipe.batch_size))
    return (
        f"{counted(steps, 'step')} of {min(images, recipe.batch_size)} images are few, and a model "
        f"that hardly learned finds little: --epochs {enough} or more help"
    )


def _keyless_levels(model: RLRModel) -> list[str]:
    """Say of which levels MLKA sees no key from anywhere, and so adds nothing."""
    if "mlka" not in model.config.attention:
        return []
    lines = []
    levels = cast("list[Reconstructor]", list(model.levels))
    for place, level in zip(model.config.out_indices, levels, strict=True):
        window = level.window
        grid = [side // level.patch for side in level.grid]
        if all(side // 2 >= tokens - 1 for side, tokens in zip(window, grid, strict=True)):
            lines.append(
                f"level {level_name(place)}: the window of {window[0]} x {window[1]} covers the "
                f"grid of {grid[0]} x {grid[1]} tokens from everywhere, so MLKA has no key and "
                "gives nothing; smaller --windows or a larger --image-size help"
            )
    return lines


def _fitted_score(out: Path, finished: bool) -> dict[str, Any] | None:
    """Return the score that a run was given when it ended: another fit differs by rounding."""
    if not finished or not (out / CALIBRATION_FILE).exists():
        return None
    config = load_config(out / CONFIG_FILE)
    return {"level_offsets": config.level_offsets, "level_weights": config.level_weights}


def _later_calibration(out: Path, model: RLRModel) -> Calibration | None:
    """Return what a run of the same weights holds already: it may be of images taken later."""
    try:
        previous = read_calibration(out)
    except CheckpointError as error:
        _log.warning("%s; it is written anew", error)
        return None
    return previous if previous is not None and previous.is_of(model) else None


def _without_unfit(
    data: DataSet, config: RLRConfig, images: _Images, workers: int | None
) -> dict[str, list[Sample]]:
    """Return of each class the images that calibrate, and tell how many have no tiles."""
    if config.tiles is None:
        return {name: data.validation.get(name, []) for name in data.classes}
    held, lost = {}, [failure.error for failure in images.failures]
    for name in data.classes:
        samples = data.validation.get(name, [])
        _, _, failures = cut(samples, config.tiles, workers)
        unfit = {failure.index for failure in failures}
        held[name] = [sample for i, sample in enumerate(samples) if i not in unfit]
        lost += [failure.error for failure in failures]
    if lost:
        _log.warning("%s left out, such as: %s", counted(len(lost), "image"), lost[0])
    return held


def _calibration_plan(held: Mapping[str, Sequence[Sample]], config: RLRConfig, share: float) -> str:
    """Say how many images there are of each class to calibrate decisions on."""
    images = sum(map(len, held.values()))
    line = f"{counted(images, 'image')} not trained on, to calibrate decisions"
    if not images:
        line += ": predict will give scores alone until rlr-fast calibrate is run"
    small = [name for name, samples in held.items() if not samples]
    if share and small:
        tiles = "" if config.tiles is None else ", or none as large as a tile"
        line += f"; none of {', '.join(small)} (fewer than {MIN_IMAGES} images{tiles})"
    return line


def _check_request(
    recipe: TrainConfig,
    data: DataSet,
    device: torch.device,
    processes: Processes,
) -> None:
    data.require_train()
    check_precision(recipe.precision, device)
    if processes.world_size > 1 and device.type not in ("cpu", "cuda"):
        raise ValueError(f"several processes need device cpu or cuda, got {str(device)!r}")


def _decisive(record: dict[str, Any], model: RLRModel) -> dict[str, Any]:
    """Return by name what all processes of a run must have in common."""
    values = {f"{p} {k}": v for p in ("model", "recipe", "data") for k, v in record[p].items()}
    # Each machine may keep images and weights where it likes; their digests decide.
    del values["data root"], values["model backbone_weights"]
    return values | {"fingerprint of the backbone": model.backbone.fingerprint}


@dataclass(frozen=True)
class _Images:
    """What is trained on: ``samples``, which are whole pictures or tiles of them.

    ``places`` are those of each sample's picture; ``failures`` are pictures that have no tiles.
    """

    pictures: list[Sample]
    samples: list[Sample]
    places: list[int]
    failures: list[ImageFailure]

    def __str__(self) -> str:
        images = counted(len(self.pictures) - len(self.failures), "image")
        if self.samples is self.pictures:
            return images
        return f"{counted(len(self.samples), 'tile')} of {images}"


def _training_images(data: DataSet, config: RLRConfig, workers: int | None) -> _Images:
    pictures = [sample for group in data.train.values() for sample in group]
    if config.tiles is None:
        return _Images(pictures, pictures, list(range(len(pictures))), [])
    images = _Images(pictures, *cut(pictures, config.tiles, workers))
    error = _lost_class(pictures, images.failures)
    if error is not None:
        raise error
    return images


def _lost_class(pictures: list[Sample], failures: list[ImageFailure]) -> TrainingError | None:
    """Return the error of classes of which nothing is left, if there are any."""
    failed = {failure.index for failure in failures}
    readable = {sample.category for i, sample in enumerate(pictures) if i not in failed}
    empty = {sample.category for sample in pictures} - readable
    if not empty:
        return None
    reason = next(f.error for f in failures if pictures[f.index].category in empty)
    return TrainingError(f"no training image of {', '.join(sorted(empty))} can be read: {reason}")


def _features(
    model: RLRModel,
    images: _Images,
    execution: TrainExecution,
    quiet: bool,
    progress: Callable[[str, int], object],
    processes: Processes,
) -> tuple[Features, list[Sample], list[ImageFailure]]:
    """Return the features of this process's share, their samples, and all processes' failures."""
    samples = images.samples
    mine = samples[processes.rank :: processes.world_size]
    with (
        processes.together(),
        progress_bar("features", len(mine), quiet or not processes.is_main) as bar,
    ):
        threads = processes.workers(execution.workers)

        def done(images: int) -> None:
            bar.update(images)
            progress("features", images)

        features: Features
        if execution.cache == "none":
            features = FreshFeatures(model, mine, threads, done)
        else:
            features = cached_features(
                model,
                mine,
                execution.cache_dir,
                execution.cache,
                workers=threads,
                progress=done,
                sharers=processes.local_world_size,
            )
    shares = processes.all_gather(features.failures)
    failed = {failure.index: failure for failure in images.failures}
    for rank, share in enumerate(shares):
        for failure in share:  # of a picture once, whatever the number of its tiles
            place = images.places[rank + processes.world_size * failure.index]
            failed[place] = ImageFailure(place, failure.error)
    failures = [failed[place] for place in sorted(failed)]
    error = _lost_class(images.pictures, failures)
    if error is not None:
        raise processes.alike(error)
    mine_failed = {failure.index for failure in features.failures}
    return features, [s for i, s in enumerate(mine) if i not in mine_failed], failures
