"""``rlr-fast predict``."""

from __future__ import annotations

import argparse
from typing import Any

from rlr_fast.cli.common import (
    add_checkpoint,
    add_inference,
    add_machine,
    add_verb,
    execution_from,
    given_scale,
    load_model,
    report_failures,
)
from rlr_fast.cli.options import UsageError, sides
from rlr_fast.config import InferenceExecution
from rlr_fast.inference.predict import find_images, predict
from rlr_fast.inference.tiling import checked_tiles
from rlr_fast.training.progress import progress_bar


def add_predict(verbs: Any) -> None:
    """Add the verb ``predict``."""
    parser = add_verb(
        verbs, "predict", _predict, "score images: a table of scores, and a heat map of each image"
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="images, or folders of images")
    add_checkpoint(parser)
    parser.add_argument("--no-pictures", action="store_true", help="only the table")
    parser.add_argument(
        "--tile",
        type=sides,
        metavar="PIXELS",
        help="score pictures at their own resolution in tiles of this side, or height x width "
        "(512x1024); without it they are resized to the model's image size",
    )
    parser.add_argument(
        "--overlap",
        type=sides,
        metavar="PIXELS",
        help="pixels that neighbouring tiles share at least (default: an eighth of the tile)",
    )
    add_inference(parser)
    add_machine(parser)


def _predict(args: argparse.Namespace) -> int:
    if args.tile is not None:
        checked_tiles(args.tile, args.overlap)
    elif args.overlap is not None:
        raise UsageError("--overlap needs --tile")
    files = find_images(args.paths, args.out)
    scale = None if args.no_pictures else given_scale(args)
    model = load_model(args)
    with progress_bar("predict", len(files), args.quiet) as bar:
        result = predict(
            model,
            files,
            args.out,
            scale,
            execution_from(args, InferenceExecution),
            tile=args.tile,
            overlap=args.overlap,
            progress=bar.update,
        )
    print(f"{len(result.scores)} of {len(files)} images scored: {result.results}")
    return report_failures(result.failures)
