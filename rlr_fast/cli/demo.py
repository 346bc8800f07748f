"""The demo: synthetic data, training, evaluation and prediction in one go."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlr_fast.cli import flags
from rlr_fast.config import PRESETS, ExecutionConfig, InferenceExecution, TrainExecution

if TYPE_CHECKING:
    from rlr_fast.inference.evaluate import Evaluation

_PRESET = "tiny"


@dataclass(frozen=True)
class DemoResult:
    """What the demo found and where it lies; ``str()`` is the text that it ends with."""

    evaluation: Evaluation
    paths: dict[str, Path]
    seconds: float

    def __str__(self) -> str:
        width = max(map(len, self.paths))
        lines = [f"  {name:{width}s}  {path}" for name, path in self.paths.items()]
        return "\n".join([self.evaluation.table(), "", f"written in {self.seconds:.0f} s:", *lines])


def run_demo(
    out: Path,
    execution: ExecutionConfig = ExecutionConfig(),
    *,
    seed: int = 0,
    quiet: bool = False,
) -> DemoResult:
    """Make the synthetic set, train the ``tiny`` preset on it, evaluate it and predict with it.

    A second call goes on where an earlier one was stopped.

    Args:
        out: Folder of data, run and results.
        execution: Where to train and to score.
        seed: Seed of data and training.
        quiet: No progress bars.

    Raises:
        ValueError: ``out`` holds something else.
        BackboneWeightsError: The package with the backbone's weights is not installed.
    """
    from rlr_fast.data import read_dataset
    from rlr_fast.data.files import write_atomically
    from rlr_fast.data.synthetic import make_dataset
    from rlr_fast.inference.batches import load_model
    from rlr_fast.inference.evaluate import FigureOptions, evaluate
    from rlr_fast.inference.predict import find_images, predict
    from rlr_fast.models.rlr import RLRModel
    from rlr_fast.training.calibration import color_scale
    from rlr_fast.training.progress import follow, progress_bar
    from rlr_fast.training.train import CURVE_FILE, train

    start = time.perf_counter()
    preset = PRESETS[_PRESET]
    recipe = dataclasses.replace(preset.train, seed=seed)
    data_root, run = out / "data", out / "run"
    RLRModel(preset.model)  # fails without the backbone's weights, before the data are made

    with progress_bar("data", None, quiet) as bar:
        make_dataset(data_root, size=preset.model.image_size, seed=seed, progress=follow(bar))
    data = read_dataset(data_root)
    train(
        preset.model,
        recipe,
        data,
        run,
        TrainExecution(**vars(execution), cache_dir=out / "features"),
        resume=True,
        quiet=quiet,
    )
    scoring = InferenceExecution(**vars(execution))
    model = load_model(run, scoring)
    scale = color_scale(run)

    total = sum(map(len, data.test.values()))
    with progress_bar("eval", total, quiet) as bar:
        evaluation = evaluate(
            model,
            data,
            scoring,
            figures=FigureOptions(out / "figures", scale),
            progress=bar.update,
        )
    write_atomically(out / "metrics.json", evaluation.to_json())
    pictures = find_images([data_root / data.classes[0] / "test"])
    prediction = predict(model, pictures, out / "predictions", scale, scoring)
    return DemoResult(
        evaluation,
        {
            "data": data_root,
            "checkpoint": run,
            "loss curve": run / CURVE_FILE,
            "metrics": out / "metrics.json",
            "figures": out / "figures",
            "predictions": prediction.results,
        },
        time.perf_counter() - start,
    )


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
        out: Folder of data, run and results.
        seed: Seed of data and training.
    """
    print(run_demo(out, ExecutionConfig(**execution), seed=seed, quiet=quiet))
    return 0
