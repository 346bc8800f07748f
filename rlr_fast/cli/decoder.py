"""``rlr-fast decoder train``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rlr_fast.cli.common import (
    add_backbone_weights,
    add_dataset,
    add_machine,
    add_verb,
    read_data,
    read_model,
    report_failures,
)
from rlr_fast.cli.options import Parser, UsageError, positive
from rlr_fast.data.words import counted
from rlr_fast.models.checkpoint import CheckpointError
from rlr_fast.training.decoder import train_decoder
from rlr_fast.training.progress import progress_bar
from rlr_fast.visualization.decoder import check_decoder_file, save_decoder


def add_decoder(verbs: Any) -> None:
    """Add the verb ``decoder`` and its job."""
    parser: Parser = verbs.add_parser(
        "decoder", help="train a decoder that paints features as pictures, for `figures`"
    )
    jobs = parser.add_subparsers(title="jobs", metavar="JOB", required=True)
    train = add_verb(
        jobs,
        "train",
        _decoder_train,
        "learn to paint an image from its features, on the normal images of all classes; a decoder "
        "serves every run of the same backbone, levels and image size",
    )
    add_dataset(train)
    train.add_argument(
        "--checkpoint", metavar="RUN", help="a run with the features to decode (needed)"
    )
    train.add_argument(
        "--out", type=Path, metavar="FILE", help="the decoder, .safetensors (needed)"
    )
    train.set_defaults(needs=("checkpoint", "out"))
    add_backbone_weights(train)
    train.add_argument("--epochs", type=positive, default=40, metavar="N", help="passes over them")
    train.add_argument("--batch-size", type=positive, default=4, metavar="N", help="images a step")
    train.add_argument("--lr", type=float, default=2e-3, help="Adam's learning rate at the start")
    train.add_argument("--seed", type=int, default=0, help="seed of weights and order of images")
    add_machine(train)


def _decoder_train(args: argparse.Namespace) -> int:
    data = read_data(args)
    data.require_train()
    try:
        check_decoder_file(args.out)
    except (ValueError, CheckpointError) as error:
        raise UsageError(f"--out: {error}") from error
    model = read_model(args, args.checkpoint)
    total = args.epochs * sum(len(samples) for samples in data.train.values())
    with progress_bar("decoder", total, args.quiet) as bar:

        def show(images: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update(images)

        result = train_decoder(
            model,
            data,
            epochs=args.epochs,
            batch_size=args.batch_size,
            lr=args.lr,
            seed=args.seed,
            workers=args.workers,
            progress=show,
        )
    save_decoder(result, model, args.out)
    loss = result.history[-1]["loss"]
    print(f"trained {counted(args.epochs, 'epoch')}, loss {loss:.4f}: {args.out}")
    return report_failures([str(failure.error) for failure in result.failures])
