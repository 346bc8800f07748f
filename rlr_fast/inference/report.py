"""What evaluation and prediction tell a report: facts of the model, and the rows of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlr_fast.config import Tiles
from rlr_fast.data import Sample
from rlr_fast.data.images import open_image, to_rgb
from rlr_fast.data.threads import map_ahead
from rlr_fast.inference.decisions import Decider, Decision
from rlr_fast.inference.error_counts import calibrated_on
from rlr_fast.models.rlr import RLRModel
from rlr_fast.pictures.scored_files import ScoredImage
from rlr_fast.visualization.report import ReportImage, ReportWriter
from rlr_fast.visualization.report.thumbnails import PICTURE_SIDE


def model_facts(
    model: RLRModel, checkpoint: str, data: str, precision: str, tiles: Tiles | None
) -> dict[str, str]:
    """Return what a report says of model and data, by name.

    Args:
        model: The model.
        checkpoint: Folder of the run, or name of the repository.
        data: The images, in words.
        precision: Of the network.
        tiles: How pictures are cut, if they are.
    """
    config = model.config
    height, width = config.image_size
    levels = ", ".join(
        f"{rows} × {columns} of {channels} channels"
        for (rows, columns), channels in zip(
            model.backbone.grids, model.backbone.channels, strict=True
        )
    )
    tiled = "" if tiles is None else "{} × {} pixels, {} × {} shared".format(*tiles[0], *tiles[1])
    digest: Any = model.score_identity()["digest of the weights"]
    return {
        "Checkpoint": Path(checkpoint).name or checkpoint,
        "Data": data,
        "Backbone": config.backbone,
        "Image size (height × width)": f"{height} × {width} pixels",
        "Levels": levels,
        "Digest of the weights": str(digest),
        "Precision": precision,
    } | ({} if tiles is None else {"Tiles": tiled})


def add_prediction(
    report: ReportWriter,
    path: Path,
    category: str | None,
    image: ScoredImage,
    decision: Decision | None,
    scale: tuple[float, float] | None,
) -> None:
    """Add the row of a predicted image.

    Args:
        report: Gets the row.
        path: The file.
        category: Its class, if known.
        image: As it was scored.
        decision: What was decided, if anything.
        scale: Of its map; None for the report's own.

    Raises:
        OSError: The report cannot be written.
    """
    report.add(
        image.index,
        ReportImage(
            path=path,
            category=category,
            score=image.score,
            image=image.image.permute(1, 2, 0).numpy(),
            score_map=image.score_map,
            size=image.size,
            mask=None if decision is None else decision.mask,
            p_value=None if decision is None else decision.p_value,
            scale=scale,
        ),
    )


def add_class(
    report: ReportWriter,
    first: int,
    samples: Sequence[Sample],
    scores: NDArray[np.floating],
    maps: NDArray[np.float32],
    masks: NDArray[np.bool_],
    decider: Decider | None,
    workers: int | None,
) -> None:
    """Add the rows of a class's test images; their files are decoded once more, for small pictures.

    Args:
        report: Gets the rows.
        first: Place of the class's first image among all.
        samples: The images, n of one class.
        scores: Image scores, (n,).
        maps: Score maps, (n, h, w).
        masks: Ground truth, (n, h, w).
        decider: Its threshold is the one that the report starts with.
        workers: Threads; `rlr_fast.data.threads.default_workers` by default.

    Raises:
        OSError: A file cannot be read any more, or the report cannot be written.
    """
    category = samples[0].category
    rule = None if decider is None else decider.rule(category)
    known = np.zeros(len(samples), dtype=bool)
    p_values: Sequence[float | None] = [None] * len(samples)
    if rule is not None:
        report.set_threshold(category, rule.threshold, pooled=rule.name is None)
        known = calibrated_on(rule, [sample.path for sample in samples])
        p_values = [float(p) for p in rule.p_values(scores)]

    def add(i: int) -> None:
        sample = samples[i]
        picture = open_image(sample.path)
        size = picture.height, picture.width
        picture = to_rgb(picture, sample.path)
        picture.thumbnail((2 * PICTURE_SIDE, 2 * PICTURE_SIDE))  # cheaper to resize well
        report.add(
            first + i,
            ReportImage(
                path=sample.path,
                category=category,
                score=float(scores[i]),
                image=np.asarray(picture),
                score_map=maps[i],
                size=size,
                defect=sample.defect,
                mask=masks[i] if sample.mask_paths else None,
                p_value=p_values[i],
                calibrated=bool(known[i]),
            ),
        )

    for _ in map_ahead(add, range(len(samples)), workers):
        pass
