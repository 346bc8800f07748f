"""A trained model as one callable, for clusters that map a function over batches of a table."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from rlr_fast.config import InferenceExecution
from rlr_fast.config.rules import require, suggest
from rlr_fast.data.images import ImageFailure, resize_image
from rlr_fast.inference.conformal import check_alpha
from rlr_fast.inference.decisions import CALIBRATE, Decider
from rlr_fast.models.checkpoint import fetch_checkpoint
from rlr_fast.models.rlr import RLRModel
from rlr_fast.pictures.batches import load_model, score_batches
from rlr_fast.pictures.scored_files import NOT_FINITE, score_files
from rlr_fast.pictures.tiling import predict_tiled
from rlr_fast.training.calibration import read_calibration, scoring_identity, trained_classes
from rlr_fast.training.run_dir import tell_unfinished

_log = logging.getLogger(__name__)


class Scorer:
    """Scores and decides batches: a dict of arrays in, a dict of arrays out.

    It is small and can be pickled: each process that calls it loads the model for itself, once,
    whatever thread is the first. Ray Data's ``map_batches`` takes one as it is.

    A batch has one of two columns, B rows each: ``path``, of image files, or ``image``, RGB of
    uint8, an array (B, h, w, 3) or B arrays (h, w, 3) of any sizes. A column ``class`` names the
    class of each, which decides by its own calibration images; where it has None or NaN all are
    pooled. Without one the only class of the run is taken, or all of them pooled. The columns that
    come back are

    - all of the batch but ``image``,
    - ``score``: (B,) float64, the image scores of ``rlr-fast predict``; NaN for an image that has
      none,
    - ``failure``: (B,), what is wrong with an image that has no score, else None,
    - with ``alpha``: ``p_value`` and ``threshold``, (B,) float64, and ``anomalous``, (B,) of True
      or False; NaN, NaN and None for a class without calibration images, and for a failure;
      threshold and decision alone where its images are too few for alpha,
    - with ``maps``: ``score_map``, (B, H, W) float32 of the model's image size; of a model with
      tiles (B,) maps, each in the size of its picture, and None for a failure.

    Args:
        run: Folder of a run, or name of a repository on the hub.
        execution: Device, precision, threads that decode, and images scored at once, which need
            not be those of a batch.
        alpha: Decide at this false-alarm rate; None gives scores alone.
        pool: Decide by the calibration images of all classes.
        maps: Return score maps.
        backbone_weights: Where to take the backbone's weights from now.

    Raises:
        ValueError: An argument is of another kind, ``alpha`` is out of its range, or the run has
            no calibration.
        CheckpointError: There is no such run, or its calibration is damaged.
        TrainingError: The run's record is damaged.
    """

    def __init__(
        self,
        run: str | Path,
        execution: InferenceExecution = InferenceExecution(),
        *,
        alpha: float | None = None,
        pool: bool = False,
        maps: bool = False,
        backbone_weights: str | None = None,
    ) -> None:
        require(isinstance(run, (str, Path)), "run", "a folder or a name", run)
        is_execution = isinstance(execution, InferenceExecution)
        require(is_execution, "execution", "an InferenceExecution", execution)
        # Absolute: a worker that unpickles it may have another working directory.
        self.run = str(Path(run).absolute() if Path(run).is_dir() else run)
        self.execution, self.maps = execution, maps
        self.backbone_weights = backbone_weights
        folder = fetch_checkpoint(run)
        tell_unfinished(folder)
        known = trained_classes(folder)
        self._only = next(iter(known)) if len(known) == 1 else None
        self._decider: Decider | None = None
        self._classes, self._strange = set(known), set[str]()
        if alpha is not None:
            calibration = read_calibration(folder)
            if calibration is None:
                raise ValueError(f"{run} has no calibration: {CALIBRATE}")
            self._decider = Decider(calibration, check_alpha(alpha), pool, known)
            self._classes.update(calibration.classes)
        elif pool:
            raise ValueError("pool decides images and needs alpha, got pool=True and alpha=None")
        self._model: RLRModel | None = None
        self._loading = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: all but the model, and the lock of this process."""
        state = vars(self) | {"_model": None}
        del state["_loading"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what was pickled."""
        vars(self).update(state, _loading=threading.Lock())

    def __call__(self, batch: Mapping[str, ArrayLike]) -> dict[str, NDArray[Any]]:
        """Score a batch.

        Raises:
            ValueError: The batch has not one of ``path`` and ``image``, columns differ in length,
                an image is not RGB of uint8, or a class is no name. Or scores would not be those
                of the calibration.
            CheckpointError: A file of the run is missing or damaged.
            BackboneWeightsError: The backbone's weights cannot be had.
        """
        source, rows = _check(batch)
        classes = [self._only] * rows
        if self._decider is not None and "class" in batch:
            classes = self._named(batch["class"])
        model = self._loaded()
        scores = np.full(rows, np.nan)
        failures = np.full(rows, None, dtype=object)
        maps: dict[int, NDArray[np.float32]] = {}
        if source == "path":
            column = list(_column(batch["path"]))
            places = [i for i, x in enumerate(column) if isinstance(x, (str, bytes, os.PathLike))]
            for i in set(range(rows)).difference(places):  # None and NaN of a table
                failures[i] = f"row {i}: no path, but {column[i]!r}"
            paths = [Path(os.fsdecode(column[i])) for i in places]
            for outcomes in score_files(model, paths, self.execution, model.config.tiles):
                for outcome in outcomes:
                    if isinstance(outcome, ImageFailure):
                        failures[places[outcome.index]] = str(outcome.error)
                    else:
                        scores[places[outcome.index]] = outcome.score
                        maps[places[outcome.index]] = outcome.score_map.numpy()
        else:
            for index, found in self._arrays(model, batch["image"], rows):
                if isinstance(found, str):
                    failures[index] = f"row {index}: {found}"
                else:
                    scores[index], maps[index] = found
        result = {name: _column(values) for name, values in batch.items() if name != "image"}
        result |= {"score": scores, "failure": failures}
        if self._decider is not None:
            result |= self._decided(self._decider, scores, maps, classes)
        if self.maps:
            whole = model.config.tiles is None
            shape = (rows, *model.config.image_size) if whole else (rows,)
            kind, missing = (np.float32, np.nan) if whole else (object, None)
            result["score_map"] = np.full(shape, missing, dtype=kind)
            for i, score_map in maps.items():
                result["score_map"][i] = score_map
        return result

    def _loaded(self) -> RLRModel:
        with self._loading:
            if self._model is None:
                model = load_model(self.run, self.execution, self.backbone_weights).eval()
                if self._decider is not None:
                    scoring = scoring_identity(model, self.execution.precision, model.config.tiles)
                    self._decider.check_scoring(scoring)
                self._model = model
            return self._model

    def _named(self, column: ArrayLike) -> list[str | None]:
        """Return the class of each row, None where there is none; tell one that nobody knows."""
        names: list[str | None] = []
        for i, name in enumerate(_column(column).tolist()):
            if isinstance(name, (str, bytes)):
                names.append(os.fsdecode(name))
            elif name is None or str(name) in ("nan", "<NA>"):  # as pandas says it
                names.append(None)
            else:
                raise ValueError(f"class must be a name, got {name!r} in row {i}")
        strange = {name for name in names if name is not None} - self._classes - self._strange
        for name in sorted(strange):
            hint = suggest(name, sorted(self._classes))
            _log.warning(
                "%s has no class %r, and does not decide its images; %s", self.run, name, hint
            )
        self._strange |= strange
        return names

    def _arrays(
        self, model: RLRModel, images: ArrayLike, rows: int
    ) -> Iterator[tuple[int, tuple[float, NDArray[np.float32]] | str]]:
        """Yield the place of each image in memory, and score and score map, or what is wrong."""
        pictures = [
            torch.from_numpy(_rgb(image, i)).permute(2, 0, 1)
            for i, image in enumerate(images)  # type: ignore[arg-type]
        ]
        size, precision = self.execution.batch_size, self.execution.precision
        tiles = model.config.tiles
        if tiles is not None:
            for i, picture in enumerate(pictures):
                misfit = tiles.misfit(*picture.shape[1:])
                if misfit is None:
                    out = predict_tiled(
                        model, picture, *tiles, batch_size=size, precision=precision
                    )
                    yield i, _finite(out.score, out.score_map.numpy())
                else:
                    yield i, misfit
            return
        resized = [resize_image(picture, model.config.image_size) for picture in pictures]
        batches = ((i, torch.stack(resized[i : i + size])) for i in range(0, rows, size))
        for first, outcome in score_batches(model, batches, precision):
            for k, score in enumerate(outcome.scores):
                yield first + k, _finite(score, outcome.maps[k])

    def _decided(
        self,
        decider: Decider,
        scores: NDArray[np.float64],
        maps: Mapping[int, NDArray[np.float32]],
        classes: Sequence[str | None],
    ) -> dict[str, NDArray[Any]]:
        p_value, limit = np.full((2, len(scores)), np.nan)
        anomalous = np.full(len(scores), None, dtype=object)
        for i, score_map in maps.items():
            rule = decider.rule(classes[i])
            if rule is not None:
                decision = rule.decide(float(scores[i]), score_map)
                p_value[i], anomalous[i] = decision.p_value, decision.anomalous
                limit[i] = np.nan if decision.threshold is None else decision.threshold
        return {"p_value": p_value, "threshold": limit, "anomalous": anomalous}


def _finite(
    score: float, score_map: NDArray[np.float32]
) -> tuple[float, NDArray[np.float32]] | str:
    return (score, score_map) if np.isfinite(score) and np.isfinite(score_map).all() else NOT_FINITE


def _check(batch: Mapping[str, ArrayLike]) -> tuple[str, int]:
    """Return the column to score, and the number of rows."""
    if not isinstance(batch, Mapping):
        raise ValueError(f"batch must be a dict of columns, got one of {type(batch).__name__}")
    found = [name for name in ("path", "image") if name in batch]
    if len(found) != 1:
        raise ValueError(
            f"batch must have either a column 'path' or one 'image', got {sorted(batch)}"
        )
    for name, values in batch.items():
        if isinstance(values, (str, bytes)) or not isinstance(values, Sized):
            raise ValueError(f"column {name!r} of batch must have a value per row, got {values!r}")
    lengths = {name: len(values) for name, values in batch.items()}  # type: ignore[arg-type]
    if len(set(lengths.values())) > 1:
        raise ValueError(f"columns of batch must have one length, got {lengths}")
    return found[0], lengths[found[0]]


def _column(values: ArrayLike) -> NDArray[Any]:
    """Return a column as an array; one of texts and others keeps both, where NumPy makes texts."""
    column = np.asarray(values)
    if column.dtype.kind not in "US" or isinstance(values, np.ndarray):
        return column
    items = list(values)  # type: ignore[arg-type]
    return column if all(isinstance(x, (str, bytes)) for x in items) else np.array(items, object)


def _rgb(image: ArrayLike, index: int) -> NDArray[np.uint8]:
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
        raise ValueError(
            f"image must be (h, w, 3) of uint8, got {pixels.shape} of {pixels.dtype} in row {index}"
        )
    return np.array(pixels, order="C")  # writable, as PyTorch asks for
