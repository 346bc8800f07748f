"""The ``rlr-fast`` command: one verb a job."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlr_fast import __version__
from rlr_fast.backbone import BackboneWeightsError
from rlr_fast.calibration import color_scale
from rlr_fast.config import PRECISIONS, PRESETS, RLRConfig, TrainConfig
from rlr_fast.data import LAYOUTS, DataSet, check_dataset, format_report, read_dataset
from rlr_fast.data.synthetic import make_dataset
from rlr_fast.decoder import load_decoder, save_decoder, train_decoder
from rlr_fast.demo import run_demo
from rlr_fast.distributed import PeerError, processes, processes_wanted
from rlr_fast.environment import choose_device
from rlr_fast.evaluate import FigureOptions, evaluate
from rlr_fast.feature_cache import CacheError
from rlr_fast.files import write_atomically
from rlr_fast.functional import BackendError, unsupported_reason
from rlr_fast.inference import DEFAULT_BATCH, check_precision
from rlr_fast.info import describe
from rlr_fast.model import CONFIG_FILE, CheckpointError, RLRModel, read_config
from rlr_fast.options import Parser, UsageError, add_fields, config_from, parse, positive, sides
from rlr_fast.predict import find_images, predict
from rlr_fast.progress import follow, progress_bar
from rlr_fast.reconstructions import Run, check_runs, reconstruction_sheets
from rlr_fast.run_folder import TrainingError, read_run
from rlr_fast.tiling import checked_tiles
from rlr_fast.train import CACHES, train
from rlr_fast.tune import tune

_USER_ERRORS = (
    UsageError,
    ValueError,
    BackboneWeightsError,
    BackendError,
    CheckpointError,
    CacheError,
    TrainingError,
    OSError,
)
# torchrun ends all processes with the first that ends: let that be the one that says why.
_AFTER_PEER = 1.0
_BACKENDS = ("auto", "triton", "tiled", "dense")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0: done. 1: done, but some files were left out, or a check failed. 2: a mistake of the
        user, or something that stopped the job; it is told in a line on standard error, by one of
        several processes. 130: interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    args = argparse.Namespace(interrupted="")
    try:
        args = _parse(argv)
        return int(args.run(args))
    except BrokenPipeError:  # an OSError, but nobody is left to read a message
        return 1
    except PeerError as error:
        time.sleep(_AFTER_PEER)
        if not error.told:
            print(f"rlr-fast: error: {error}", file=sys.stderr)
        return 2
    except _USER_ERRORS as error:
        if os.environ.get("RLR_FAST_TRACEBACK"):
            raise
        print(f"rlr-fast: error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(
            f"rlr-fast: error: out of GPU memory ({str(error).splitlines()[0]}); "
            f"{args.less_memory}",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        if _tells():
            print(f"\nrlr-fast: interrupted{args.interrupted}", file=sys.stderr)
        return 130


def _tells() -> bool:
    """Whether this process tells what all on its machine meet: the first that torchrun started."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    try:
        args = parse(build_parser(), argv)
        if processes_wanted() > 1 and not args.shared:
            raise UsageError(f"{args.parser.prog} works in one process; start it without torchrun")
        return args
    except UsageError as error:
        if not _tells():
            raise PeerError(str(error), told=True) from error
        raise


def build_parser() -> Parser:
    """Return the parser of all verbs."""
    parser = Parser(
        prog="rlr-fast",
        description="Multi-class anomaly detection with a learnable reference (RLR): train one "
        "model on normal images of many product classes, evaluate it, predict with it.",
        epilog="Every verb has its own --help. A data set is read as it is: MVTec-AD, MPDD, VisA, "
        "MVTec LOCO, BTAD, or folders of images.",
    )
    parser.add_argument("--version", action="version", version=f"rlr-fast {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    _add_demo(verbs)
    _add_data(verbs)
    _add_train(verbs)
    _add_eval(verbs)
    _add_predict(verbs)
    _add_decoder(verbs)
    _add_figures(verbs)
    _add_tune(verbs)
    _add_info(verbs)
    return parser


def _verb(
    verbs: Any, name: str, run: Any, help: str, *, shared: bool = False, **options: Any
) -> Parser:
    """Add a verb; ``shared`` says that several processes under torchrun can share its work."""
    parser: Parser = verbs.add_parser(name, help=help, description=help, **options)
    parser.set_defaults(
        run=run,
        parser=parser,
        shared=shared,
        less_memory="a smaller --batch-size or --image-size needs less",
        interrupted="",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of flags; flags given here win")
    return parser


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, help="root folder of the data set")
    parser.add_argument(
        "--layout", default="auto", metavar="NAME", help=f"auto, {', '.join(LAYOUTS)}"
    )
    parser.add_argument("--classes", nargs="+", metavar="CLASS", help="only these classes")


def _add_machine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    group.add_argument(
        "--backend", default="auto", choices=_BACKENDS, help="attention: " + ", ".join(_BACKENDS)
    )
    group.add_argument("--workers", type=positive, metavar="N", help="threads that decode images")
    group.add_argument("--quiet", action="store_true", help="no progress bars")


def _device(args: argparse.Namespace) -> torch.device:
    device = choose_device(args.device)
    reason = unsupported_reason(args.backend, device)
    if reason is not None:
        raise UsageError(f"--backend {args.backend} cannot run on {device}: {reason}")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # nothing of this process shall lie on another's GPU
    return device


def _read_data(args: argparse.Namespace) -> DataSet:
    return read_dataset(args.data, args.layout, args.classes)


# demo


def _add_demo(verbs: Any) -> None:
    parser = _verb(
        verbs,
        "demo",
        _demo,
        "make a synthetic data set, train a small model on it, evaluate it and write pictures: "
        "minutes on a CPU",
    )
    parser.add_argument("--out", type=Path, default=Path("rlr-fast-demo"), help="folder of results")
    parser.add_argument("--seed", type=int, default=0, help="seed of data and training")
    _add_machine(parser)


def _demo(args: argparse.Namespace) -> int:
    result = run_demo(
        args.out,
        seed=args.seed,
        device=_device(args),
        backend=args.backend,
        workers=args.workers,
        quiet=args.quiet,
    )
    print(result)
    return 0


# data


def _add_data(verbs: Any) -> None:
    parser: Parser = verbs.add_parser("data", help="check a data set, or make a synthetic one")
    jobs = parser.add_subparsers(title="jobs", metavar="JOB", required=True)
    check = _verb(
        jobs,
        "check",
        _data_check,
        "decode every file of a data set; say what would stop a run or spoil its numbers",
    )
    _add_dataset(check)
    check.add_argument(
        "--image-size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="also tell defects that vanish here",
    )
    check.add_argument("--workers", type=positive, metavar="N", help="threads that decode images")
    make = _verb(
        jobs, "make", _data_make, "make the synthetic inspection set, in MVTec-AD's layout"
    )
    make.add_argument("out", type=Path, metavar="DIR", help="folder to write")
    make.add_argument(
        "--size", type=int, nargs="+", default=[256], help="pixels: side, or height width"
    )
    make.add_argument("--seed", type=int, default=0, help="same seed, same files to the bit")
    make.add_argument("--classes", nargs="+", metavar="CLASS", help="only these classes")
    make.add_argument("--train", type=positive, metavar="N", help="training images a class")
    make.add_argument("--quiet", action="store_true", help="no progress bar")


def _pair(values: Sequence[int], name: str) -> tuple[int, int]:
    if len(values) > 2:
        raise UsageError(f"{name} takes one side, or height and width, got {len(values)} values")
    return values[0], values[-1]


def _data_check(args: argparse.Namespace) -> int:
    size = None if args.image_size is None else _pair(args.image_size, "--image-size")
    report = check_dataset(args.data, args.layout, args.classes, size, args.workers)
    print(format_report(report))
    return 0 if report.ok else 1


def _data_make(args: argparse.Namespace) -> int:
    counts = {} if args.train is None else {"train_per_class": args.train}
    with progress_bar("images", None, args.quiet) as bar:
        make_dataset(
            args.out,
            size=_pair(args.size, "--size"),
            seed=args.seed,
            classes=args.classes,
            progress=follow(bar),
            **counts,
        )
    print(args.out)
    return 0


# train


def _add_train(verbs: Any) -> None:
    parser = _verb(
        verbs,
        "train",
        _train,
        "train one model on the normal images of all classes",
        shared=True,
        epilog="presets: " + "; ".join(f"{name}: {p.about}" for name, p in PRESETS.items()),
    )
    _add_dataset(parser)
    parser.add_argument("--out", type=Path, metavar="RUN", help="folder of the run (needed)")
    parser.set_defaults(
        needs=("out",),
        less_memory="--grad-checkpointing or a smaller --image-size needs less",
        interrupted="; --resume goes on from the last written epoch",
    )
    parser.add_argument(
        "--preset", default="paper", choices=tuple(PRESETS), help="where the settings start"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the run's last epoch")
    parser.add_argument(
        "--cache-dir", type=Path, metavar="DIR", help="folder of feature caches (~/.cache/rlr_fast)"
    )
    parser.add_argument(
        "--cache",
        default="auto",
        choices=CACHES,
        help="where cached features lie while training; none makes them again in every epoch",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the reconstructors (CUDA graphs on a GPU): a minute at first, faster then",
    )
    parser.add_argument(
        "--grad-checkpointing",
        action="store_true",
        help="compute blocks again in backward: less memory, a third more time, the same result",
    )
    parser.add_argument(
        "--piece",
        type=positive,
        metavar="N",
        help="images of a step in memory at once: less memory, the same result to rounding",
    )
    add_fields(parser, RLRConfig)
    add_fields(parser, TrainConfig)
    _add_machine(parser)


def _train(args: argparse.Namespace) -> int:
    with processes() as group:
        previous = group.from_leader(lambda: read_run(args.out) if args.resume else None)
        with group.together():
            preset = PRESETS[args.preset]
            model = config_from(args, RLRConfig, previous["model"] if previous else preset.model)
            recipe = config_from(
                args, TrainConfig, previous["recipe"] if previous else preset.train
            )
            data = _read_data(args)
            device = _device(args)
        result = train(
            model,
            recipe,
            data,
            args.out,
            device=device,
            resume=args.resume,
            backend=args.backend,
            cache_root=args.cache_dir,
            cache=args.cache,
            compiled=args.compile,
            grad_checkpointing=args.grad_checkpointing,
            piece=args.piece,
            workers=args.workers,
            quiet=args.quiet,
        )
        if not group.leads:
            return 0
    last = result.history[-1]
    print(
        f"trained {recipe.epochs} epochs, loss {last['loss']:.4f}, "
        f"{result.images_per_s:.0f} images/s: {result.out}"
    )
    return _report([str(f.error) for f in result.failures])


def _report(failures: Sequence[str]) -> int:
    """Tell on standard error which files were left out; return the exit code."""
    for failure in failures:
        print(f"rlr-fast: left out: {failure}", file=sys.stderr)
    return 1 if failures else 0


# eval


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", metavar="RUN", help="folder of a run, or a name on the hub (needed)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of results (needed)")
    parser.set_defaults(needs=("checkpoint", "out"))
    _add_backbone_weights(parser)
    parser.add_argument(
        "--scale",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="scores of the first and last colour (default: from the run's normal images)",
    )


def _add_backbone_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backbone-weights", metavar="FROM", help="where to take the backbone's weights from now"
    )


def _add_inference(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("inference")
    group.add_argument(
        "--batch-size",
        type=positive,
        default=DEFAULT_BATCH,
        metavar="N",
        help="images, or tiles, scored at once",
    )
    group.add_argument(
        "--precision",
        default="fp32",
        choices=PRECISIONS,
        help="of backbone and reconstructors: fp32, bf16, or fp16 (GPU only); score maps are fp32",
    )
    parser.set_defaults(
        less_memory="a smaller --batch-size needs less, and so does --precision bf16"
    )


def _load(args: argparse.Namespace) -> RLRModel:
    device = _device(args)
    check_precision(args.precision, device)
    _check_folder(args.out)
    return _read_model(args, args.checkpoint, device)


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out must be a folder, {str(out)!r} is a file")


def _read_model(args: argparse.Namespace, checkpoint: str, device: torch.device) -> RLRModel:
    model: RLRModel = RLRModel.from_pretrained(
        checkpoint, backend=args.backend, backbone_weights=args.backbone_weights
    )
    return model.to(device)


def _scale(args: argparse.Namespace) -> tuple[float, float]:
    if args.scale is None:
        try:
            return color_scale(Path(args.checkpoint))
        except CheckpointError as error:
            raise UsageError(f"{error}; give one by --scale LOW HIGH") from error
    low, high = args.scale
    if not low < high:
        raise UsageError(f"--scale: LOW must be below HIGH, got {low} {high}")
    return low, high


def _add_eval(verbs: Any) -> None:
    parser = _verb(
        verbs,
        "eval",
        _eval,
        "measure a checkpoint on the test images: seven metrics a class and mean",
        shared=True,
    )
    _add_dataset(parser)
    _add_checkpoint(parser)
    parser.add_argument("--figures", action="store_true", help="write a sheet of samples a class")
    parser.add_argument(
        "--per-defect",
        type=positive,
        default=1,
        metavar="N",
        help="samples of each defect in a sheet",
    )
    _add_inference(parser)
    _add_machine(parser)


def _eval(args: argparse.Namespace) -> int:
    with processes() as group:
        with group.together():
            data = _read_data(args)
            data.require_test()
            figures = None
            if args.figures:
                figures = FigureOptions(args.out / "figures", _scale(args), args.per_defect)
            model = _load(args)
            if group.leads:
                args.out.mkdir(parents=True, exist_ok=True)
        total = sum(len(samples) for samples in data.test.values())
        with progress_bar("eval", total, args.quiet or not group.leads) as bar:
            result = evaluate(
                model,
                data,
                batch_size=args.batch_size,
                precision=args.precision,
                workers=args.workers,
                figures=figures,
                progress=bar.update,
            )
        if not group.leads:
            return 0
    print(result.table(), flush=True)
    write_atomically(args.out / "metrics.json", result.to_json())
    print(f"\n{args.out / 'metrics.json'}")
    return _report(result.failures)


# predict


def _add_predict(verbs: Any) -> None:
    parser = _verb(
        verbs, "predict", _predict, "score images: a table of scores, and a heat map of each image"
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="images, or folders of images")
    _add_checkpoint(parser)
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
    _add_inference(parser)
    _add_machine(parser)


def _predict(args: argparse.Namespace) -> int:
    if args.tile is not None:
        checked_tiles(args.tile, args.overlap)
    elif args.overlap is not None:
        raise UsageError("--overlap needs --tile")
    files = find_images(args.paths, args.out)
    scale = None if args.no_pictures else _scale(args)
    model = _load(args)
    with progress_bar("predict", len(files), args.quiet) as bar:
        result = predict(
            model,
            files,
            args.out,
            scale,
            tile=args.tile,
            overlap=args.overlap,
            batch_size=args.batch_size,
            precision=args.precision,
            workers=args.workers,
            progress=bar.update,
        )
    print(f"{len(result.scores)} of {len(files)} images scored: {result.results}")
    return _report(result.failures)


# decoder


def _add_decoder(verbs: Any) -> None:
    parser: Parser = verbs.add_parser(
        "decoder", help="train a decoder that paints features as pictures, for `figures`"
    )
    jobs = parser.add_subparsers(title="jobs", metavar="JOB", required=True)
    train = _verb(
        jobs,
        "train",
        _decoder_train,
        "learn to paint an image from its features, on the normal images of all classes; a decoder "
        "serves every run of the same backbone, levels and image size",
    )
    _add_dataset(train)
    train.add_argument(
        "--checkpoint", metavar="RUN", help="a run with the features to decode (needed)"
    )
    train.add_argument(
        "--out", type=Path, metavar="FILE", help="the decoder, .safetensors (needed)"
    )
    train.set_defaults(needs=("checkpoint", "out"))
    _add_backbone_weights(train)
    train.add_argument("--epochs", type=positive, default=40, metavar="N", help="passes over them")
    train.add_argument("--batch-size", type=positive, default=4, metavar="N", help="images a step")
    train.add_argument("--lr", type=float, default=2e-3, help="Adam's learning rate at the start")
    train.add_argument("--seed", type=int, default=0, help="seed of weights and order of images")
    _add_machine(train)


def _decoder_train(args: argparse.Namespace) -> int:
    data = _read_data(args)
    data.require_train()
    if args.out.suffix != ".safetensors" or args.out.is_dir():
        raise UsageError(f"--out must be a file named *.safetensors, got {str(args.out)!r}")
    model = _read_model(args, args.checkpoint, _device(args))
    args.out.parent.mkdir(parents=True, exist_ok=True)
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
    history = args.out.with_suffix(".jsonl")
    write_atomically(history, "".join(json.dumps(row) + "\n" for row in result.history))
    save_decoder(result.decoder, model, args.out)
    print(f"trained {args.epochs} epochs, loss {result.history[-1]['loss']:.4f}: {args.out}")
    return _report([str(failure.error) for failure in result.failures])


# figures


def _add_figures(verbs: Any) -> None:
    parser = _verb(
        verbs,
        "figures",
        _figures,
        "make reconstructed features visible: a sheet a class, of one run or of two side by side",
    )
    _add_dataset(parser)
    parser.add_argument(
        "--checkpoint",
        nargs="+",
        metavar="RUN",
        help="folder of a run; two stand side by side (needed)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the sheets (needed)")
    parser.set_defaults(
        needs=("checkpoint", "out"), less_memory="a smaller --per-defect needs less"
    )
    _add_backbone_weights(parser)
    parser.add_argument(
        "--decoder", type=Path, metavar="FILE", help="also paint the features, by `decoder train`"
    )
    parser.add_argument(
        "--level",
        type=int,
        metavar="INDEX",
        help="level of out_indices whose features are shown (default: the first)",
    )
    parser.add_argument(
        "--per-defect", type=positive, default=1, metavar="N", help="samples of each defect"
    )
    _add_machine(parser)


def _figures(args: argparse.Namespace) -> int:
    if len(args.checkpoint) > 2:
        raise UsageError(f"--checkpoint takes one or two runs, got {len(args.checkpoint)}")
    data = _read_data(args)
    data.require_test()
    _check_folder(args.out)
    device = _device(args)
    names = [Path(checkpoint).name for checkpoint in args.checkpoint]
    if len(set(names)) < len(names):
        names = args.checkpoint
    runs = [
        Run(name, _read_model(args, checkpoint, device), color_scale(Path(checkpoint)))
        for name, checkpoint in zip(names, args.checkpoint, strict=True)
    ]
    check_runs(runs, args.level)
    decoder = None if args.decoder is None else load_decoder(args.decoder, runs[0].model)
    with progress_bar("figures", None, args.quiet) as bar:
        sheets, failures = reconstruction_sheets(
            runs,
            data,
            args.out,
            decoder=decoder,
            level=args.level,
            per_defect=args.per_defect,
            workers=args.workers,
            progress=bar.update,
        )
    print(f"{len(sheets)} sheets: {args.out}")
    return _report(failures)


# tune


def _add_tune(verbs: Any) -> None:
    parser = _verb(
        verbs,
        "tune",
        _tune,
        "search for the fastest tiles of the Triton kernels on this GPU, and keep them",
    )
    parser.add_argument(
        "--preset", default="paper", choices=tuple(PRESETS), help="the configuration"
    )
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="images")
    parser.add_argument("--precision", default="bf16", choices=tuple(PRECISIONS), help="of a run")
    add_fields(parser, RLRConfig)
    _add_machine(parser)


def _tune(args: argparse.Namespace) -> int:
    config = config_from(args, RLRConfig, PRESETS[args.preset].model)
    device = choose_device(args.device)
    reason = unsupported_reason("triton", device)
    if reason is not None:
        raise UsageError(f"tuning cannot run on {device}: {reason}")
    with progress_bar("tiles", None, args.quiet) as bar:
        for line in tune(config, args.batch_size, args.precision, device, bar.update):
            print(line, flush=True)
    return 0


# info


def _add_info(verbs: Any) -> None:
    parser = _verb(
        verbs, "info", _info, "show versions, devices, backends, and what a configuration makes"
    )
    parser.add_argument(
        "--preset", default="paper", choices=tuple(PRESETS), help="the configuration"
    )
    parser.add_argument("--checkpoint", type=Path, metavar="RUN", help="that of a run instead")
    parser.add_argument("--json", action="store_true", help="as JSON")
    add_fields(parser, RLRConfig)
    _add_machine(parser)


def _info(args: argparse.Namespace) -> int:
    base: Any = PRESETS[args.preset].model
    if args.checkpoint is not None:
        base = read_config(args.checkpoint / CONFIG_FILE)
    config = config_from(args, RLRConfig, base)
    values, text = describe(config, _device(args))
    print(json.dumps(values, indent=2) if args.json else text)
    return 0
