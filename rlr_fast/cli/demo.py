"""``rlr-fast demo``: synthetic data, training, evaluation and prediction in one go."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from rlr_fast.cli import flags
from rlr_fast.config import PRESETS, InferenceExecution, TrainExecution


def demo(
    *,
    out: Path = Path("rlr-fast-demo"),
    seed: flags.Whole = 0,
    config: flags.Config | None = None,
    quiet: flags.Quiet = False,
    execution: flags.Execution = flags.NONE_GIVEN,
) -> int:
    """Make a synthetic data set, train a small model on it, evaluate it and write pictures.

    Args:
        out: Folder of data, run and results; a second call goes on where the first was stopped.
        seed: Seed of data and training.
    """
    from rlr_fast.cli.common import report_failures
    from rlr_fast.data import read_dataset
    from rlr_fast.data.synthetic import make_dataset
    from rlr_fast.files import write_atomically
    from rlr_fast.inference.decisions import Decider
    from rlr_fast.inference.evaluate import METRICS_FILE, FigureOptions, evaluate
    from rlr_fast.models.rlr import RLRModel
    from rlr_fast.pictures.batches import load_model
    from rlr_fast.prediction.image_files import find_images
    from rlr_fast.prediction.predict import predict
    from rlr_fast.training.calibration import color_scale, read_calibration, trained_classes
    from rlr_fast.training.progress import follow, progress_bar
    from rlr_fast.training.train import CURVE_FILE, train

    start = time.perf_counter()
    preset, scoring = PRESETS["accurate"], InferenceExecution(**execution)
    # A quarter of the time, and of the tokens: 8 x 8, of which a larger window would leave few out.
    small = dataclasses.replace(preset.model, image_size=(128, 128), windows=((5, 5), (5, 5)))
    recipe = dataclasses.replace(preset.train, epochs=12, seed=seed)  # half of the preset's
    data_root, run = out / "data", out / "run"
    RLRModel(small)  # fails without the backbone's weights, before the data are made

    with progress_bar("data", None, quiet) as bar:
        make_dataset(
            data_root,
            size=small.image_size,
            seed=seed,
            train_per_class=60,  # of which 12 are kept out of training, to calibrate on
            progress=follow(bar),
        )
    data = read_dataset(data_root)
    train(
        small,
        recipe,
        data,
        run,
        TrainExecution(**execution, cache_dir=out / "features"),
        resume=True,
        quiet=quiet,
    )
    model, scale = load_model(run, scoring), color_scale(run)
    calibration, decider = read_calibration(run), None
    if calibration is not None:  # enough images for all classes together
        decider = Decider(calibration, pool=True, units=trained_classes(run))
    with progress_bar("eval", sum(map(len, data.test.values())), quiet) as bar:
        evaluation = evaluate(
            model,
            data,
            scoring,
            figures=FigureOptions(out / "figures", scale),
            decider=decider,
            progress=bar.update,
        )
    write_atomically(out / METRICS_FILE, evaluation.to_json())
    pictures = find_images([data_root / data.classes[0] / "test"]).classified(data.classes)
    prediction = predict(
        model, pictures, out / "predictions", scale, scoring, decider=decider, relative=True
    )
    written = {
        "data": data_root,
        "checkpoint": run,
        "loss curve": run / CURVE_FILE,
        "metrics": out / METRICS_FILE,
        "figures": out / "figures",
        "predictions": prediction.results,
    }
    print(f"{evaluation.table()}\n\nwritten in {time.perf_counter() - start:.0f} s:")
    for name, path in written.items():
        print(f"  {name:12s} {path}")
    return report_failures([*evaluation.failures, *prediction.failures])
