"""``rlr-fast predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from rlr_fast.cli import flags
from rlr_fast.config import InferenceExecution


def predict(
    paths: Annotated[tuple[Path, ...], Parameter(name="IMAGES", required=True)],
    /,
    *,
    checkpoint: flags.Checkpoint,
    out: flags.Out,
    no_pictures: Annotated[flags.Switch, Parameter(negative=())] = False,
    tile: flags.Sides | None = None,
    overlap: flags.Sides | None = None,
    scale: flags.Scale | None = None,
    config: flags.Config | None = None,
    backbone_weights: flags.BackboneWeights | None = None,
    quiet: flags.Quiet = False,
    execution: flags.InferenceExecution = flags.NONE_GIVEN,
) -> int:
    """Score images: a table of scores, and a heat map of each image.

    Args:
        paths: Images, or folders of images.
        no_pictures: Write the table alone.
        tile: Score pictures at their own resolution, in tiles: a side in pixels, or 512x1024.
        overlap: Pixels that neighboring tiles share at least; by default an eighth of the tile.
    """
    from rlr_fast.cli.common import check_out, given_scale, report_failures
    from rlr_fast.inference.batches import load_model
    from rlr_fast.inference.predict import find_images, predict
    from rlr_fast.inference.tiling import checked_tiles
    from rlr_fast.training.progress import progress_bar

    how = InferenceExecution(**execution)
    if tile is not None:
        checked_tiles(tile, overlap)
    elif overlap is not None:
        raise ValueError("--overlap needs --tile")
    files = find_images(paths, out)
    colors = None if no_pictures else given_scale(scale, checkpoint)
    check_out(out)
    model = load_model(checkpoint, how, backbone_weights)
    with progress_bar("predict", len(files), quiet) as bar:
        result = predict(
            model, files, out, colors, how, tile=tile, overlap=overlap, progress=bar.update
        )
    print(f"{len(result.scores)} of {len(files)} images scored: {result.results}")
    return report_failures(result.failures)
