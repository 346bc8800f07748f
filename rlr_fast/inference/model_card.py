"""What is published of a run: its checkpoint, and a card that says what it is and how good."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from rlr_fast.config import PRESETS, RLRConfig, TrainConfig
from rlr_fast.data.images import read_image_size
from rlr_fast.files import replacing, write_atomically
from rlr_fast.inference.decisions import ALPHA, Decider
from rlr_fast.inference.evaluate import score_protocol
from rlr_fast.inference.metrics import HEADINGS
from rlr_fast.models.backbone_weights import BackboneWeightsError
from rlr_fast.models.checkpoint import CONFIG_FILE, WEIGHTS_FILE, CheckpointError, load_config
from rlr_fast.models.rlr import RLRModel
from rlr_fast.training.calibration import (
    CALIBRATION_FILE,
    HELD_OUT,
    VALIDATION,
    read_calibration,
    scoring_identity,
    trained_classes,
)
from rlr_fast.training.run_dir import read_run, read_trained

CARD_FILE = "README.md"
PICTURES_FOLDER = "pictures"

_log = logging.getLogger(__name__)

# Where anybody can get a trained backbone's weights.
_COMMON = ("timm", "package")


@dataclass(frozen=True)
class MeasuredMetrics:
    """What a card needs of ``metrics.json``: the mean over the classes, and each class.

    Attributes:
        mean: Metrics by name; None for one without meaning.
        classes: The same of each class.
        weights: Digest of the weights that were measured, see `rlr_fast.files.file_digest`; results
            of older versions do not say.
        protocol: How they were measured, see `rlr_fast.inference.evaluate.protocol`.
    """

    mean: dict[str, float | None]
    classes: dict[str, dict[str, float | None]]
    weights: str | None = None
    protocol: dict[str, Any] = field(default_factory=dict)


def write_published(
    run: Path,
    out: Path,
    repository: str,
    *,
    license: str,
    metrics: Mapping[str, Any] | None = None,
    pictures: Sequence[Path] = (),
    backbone_weights: str | None = None,
) -> Path:
    """Write the folder that is published of a run: checkpoint, calibration, card and pictures.

    Nothing of it says where files lay on this machine.

    Args:
        run: Folder of the run.
        out: Folder that is written; empty where it exists.
        repository: Its name on the hub, OWNER/NAME, for the lines that load it.
        license: Of the weights, as the hub names it.
        metrics: Content of the ``metrics.json`` of an evaluation.
        pictures: Shown in the card.
        backbone_weights: Where others get the backbone's weights, ``timm`` or ``package``; by
            default as the run. Other weights than the run's are refused; where they cannot be had
            here, that they were not compared is told.

    Raises:
        ValueError: The run's backbone weights are a file, and nothing else is given; metrics or
            calibration are of other scores than the model's; a picture is missing, or ``out`` is
            not empty.
        CheckpointError: A file of the run is missing or damaged, or it was trained on other
            backbone weights than those that others would get.
        OSError: A file cannot be read or written.
    """
    config = load_config(run / CONFIG_FILE)
    source = backbone_weights or config.backbone_weights
    if source not in _COMMON and not source == config.backbone_weights == "random":
        raise ValueError(
            f"backbone_weights must be timm or package, which others can have, got {source!r}"
        )
    if not (run / WEIGHTS_FILE).exists():
        raise CheckpointError(f"{run} is not a checkpoint: it has no {WEIGHTS_FILE}")
    for picture in pictures:
        if not picture.is_file():
            raise ValueError(f"pictures: there is no file {str(picture)!r}")
        read_image_size(picture)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out must be a new or an empty folder, and {str(out)!r} is neither")
    _check_protocol((metrics or {}).get("protocol", {}), config)
    if source == "random":
        _log.warning("the backbone is of random numbers, which are for tests; the card says so")
    calibration = read_calibration(run)
    try:
        model = RLRModel.from_pretrained(run, backbone_weights=source)
    except BackboneWeightsError as error:
        _log.warning("not compared with the weights that the run was trained on: %s", error)
    else:
        if calibration is not None:
            scoring = scoring_identity(model, _precision(calibration.scoring), config.tiles)
            Decider(calibration, ALPHA).check_scoring(scoring)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / CONFIG_FILE, replace(config, backbone_weights=source).to_json())
    with replacing(out / WEIGHTS_FILE) as partial:
        shutil.copyfile(run / WEIGHTS_FILE, partial)
    if (run / CALIBRATION_FILE).exists():
        values = json.loads((run / CALIBRATION_FILE).read_text(encoding="utf-8"))
        for scores in ((values.get("calibration") or {}).get("classes") or {}).values():
            if scores["source"] not in (VALIDATION, HELD_OUT):  # a folder of this machine
                scores["source"] = "later images"
        write_atomically(out / CALIBRATION_FILE, json.dumps(values, indent=2))
    shown = []
    for i, picture in enumerate(pictures):
        (out / PICTURES_FOLDER).mkdir(exist_ok=True)
        shown.append(f"{PICTURES_FOLDER}/{i}{picture.suffix}")
        with replacing(out / shown[-1]) as partial:
            shutil.copyfile(picture, partial)
    card = model_card(run, repository, license=license, metrics=metrics, pictures=shown)
    write_atomically(out / CARD_FILE, card)
    return out


def _check_protocol(protocol: Mapping[str, Any], config: RLRConfig) -> None:
    """Refuse metrics of scores that are made otherwise than the model's."""
    if not protocol:  # of an older version
        return
    ours = score_protocol(config, config.tiles)
    # Tiles are named where there are some; what older versions did not name is not compared.
    for name in sorted({"tile", "overlap", *(ours.keys() & protocol.keys())}):
        if protocol.get(name) != ours.get(name):
            raise ValueError(
                f"metrics must be of the model's own scores, and were measured with {name} "
                f"{protocol.get(name)}; the model has {ours.get(name)}"
            )


def _untrained(config: RLRConfig) -> str:
    random = config.backbone_weights == "random"
    return ", **untrained, of random numbers: a model for tests, of no use elsewhere**" * random


def _precision(facts: Mapping[str, Any]) -> str:
    return str(facts.get("precision", "fp32"))


def model_card(
    run: Path,
    repository: str,
    *,
    license: str,
    metrics: Mapping[str, Any] | None = None,
    pictures: Sequence[str] = (),
) -> str:
    """Return the card of a run: what it detects, data, metrics, thresholds, and how to load it.

    Args:
        run: Folder of the run.
        repository: Its name on the hub.
        license: Of the weights.
        metrics: Content of the ``metrics.json`` of an evaluation.
        pictures: Their names beside the card.

    Raises:
        CheckpointError: A file of the run is missing or damaged.
    """
    config = load_config(run / CONFIG_FILE)
    record = read_run(run) or {}
    data = record.get("data", {})
    classes = sorted(trained_classes(run)) or list(data.get("classes", []))
    height, width = config.image_size
    what, tiles = "Images are", config.tiles
    if tiles is not None:
        (h, w), (down, right) = tiles
        what = (
            f"Images are cut into tiles of {h} × {w} of their pixels, of which neighbors share at "
            f"least {down} × {right}; smaller ones are refused. Tiles are"
        )
    parts = [
        _front(license, repository, metrics),
        f"# {repository.rpartition('/')[2]}",
        "Finds defects in images: a model of RLR (ECCV 2024, "
        "*Learning Unified Reference Representation for Unsupervised Multi-class Anomaly "
        "Detection*), trained with the package rlr_fast on normal images alone.",
        "## What it detects",
        f"One model for {_counted(classes)}. It marks what differs from the normal images of these "
        f"classes; of other products it knows nothing. {what} resized to {height} × {width} "
        f"pixels. Backbone: {config.backbone}{_untrained(config)}.",
        "## Load it",
        _LOAD.format(repository=repository),
    ]
    if data:
        # Without those that were kept out or could not be read; older runs do not say which.
        images = len(read_trained(run)) or data.get("images")
        parts += [
            "## Training",
            f"{images} normal images, layout {data.get('layout')}; digest of the files "
            f"`{str(data.get('files_digest'))[:12]}`. Recipe: {_recipe(record)}.",
        ]
    parts += ["## Metrics", _metrics(metrics)]
    parts += ["## Thresholds", _thresholds(run)]
    if pictures:
        parts += ["## Pictures", "\n".join(f"![Score maps of test images]({p})" for p in pictures)]
    return "\n\n".join(parts) + "\n"


_LOAD = """```python
from rlr_fast import RLRModel

model = RLRModel.from_pretrained("{repository}", revision="main")  # better the commit you tested
```

or `rlr-fast predict IMAGES --checkpoint {repository} --out MAPS`."""


def _front(license: str, repository: str, metrics: Mapping[str, Any] | None) -> str:
    values: dict[str, Any] = {
        "library_name": "rlr_fast",
        "license": license,
        "pipeline_tag": "image-segmentation",
        "tags": ["anomaly-detection", "image-segmentation", "rlr"],
    }
    if metrics is not None:
        found = [
            {"type": key, "name": HEADINGS[key], "value": value}
            for key, value in metrics["mean"].items()
            if key in HEADINGS and value is not None
        ]
        task = {"type": "image-segmentation", "name": "Anomaly detection"}
        data = {"type": "own", "name": "mean over the classes of the test set"}
        result = {"task": task, "dataset": data, "metrics": found}
        values["model-index"] = [{"name": repository.rpartition("/")[2], "results": [result]}]
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _counted(classes: Sequence[str]) -> str:
    if not classes:
        return "classes that the run does not name"
    return f"{len(classes)} class{'es' * (len(classes) > 1)}: {', '.join(map(_plain, classes))}"


def _plain(text: str) -> str:
    """Return a name of the data as text that Markdown and HTML leave as it is."""
    kept = "".join(c if c.isprintable() else "?" for c in text)
    return kept.translate({ord(sign): f"&#{ord(sign)};" for sign in "\\`*_[]<>|#&"})


def _recipe(record: Mapping[str, Any]) -> str:
    # A run from before a setting existed had its default.
    recipe = asdict(TrainConfig()) | record["recipe"]
    described = json.loads(RLRConfig().to_json()) | record["model"]
    for name, preset in PRESETS.items():
        same = described == json.loads(preset.model.to_json())
        free = ("epochs", "seed", "calibration_share")  # told, or not a part of the recipe
        wanted = {k: v for k, v in asdict(preset.train).items() if k not in free}
        if same and all(recipe.get(k) == v for k, v in wanted.items()):
            return f"preset {name}, {recipe['epochs']} epochs"
    told = (f"{k} {recipe[k]}" for k in ("epochs", "batch_size", "optimizer", "lr") if k in recipe)
    return ", ".join(told)


def _metrics(metrics: Mapping[str, Any] | None) -> str:
    if metrics is None:
        return "Not measured."
    keys = [key for key in HEADINGS if key in metrics["mean"]]

    def row(name: str, values: Mapping[str, float | None]) -> str:
        shown = ("" if values.get(k) is None else f"{100 * values[k]:.1f}" for k in keys)  # type: ignore[operator]
        return f"| {name} | {' | '.join(shown)} |"

    lines = [
        f"| class | {' | '.join(HEADINGS[key] for key in keys)} |",
        f"|---|{'---|' * len(keys)}",
        *(row(_plain(name), values) for name, values in metrics["classes"].items()),
        row("**mean**", metrics["mean"]),
    ]
    precision = _precision(metrics.get("protocol", {}))
    return f"In percent, on labeled test images, in {precision}.\n\n" + "\n".join(lines)


def _thresholds(run: Path) -> str:
    calibration = read_calibration(run)
    if calibration is None:
        return (
            "The model was not calibrated: it gives scores. `rlr-fast calibrate` makes decisions "
            "of them."
        )
    decider = Decider(calibration, ALPHA, units=trained_classes(run))
    lines = ["| class | calibration images | threshold |", "|---|---|---|"]
    for name in sorted(calibration.classes):
        rule = decider.rule(name)
        assert rule is not None
        limit = "too few images" if rule.threshold is None else f"{rule.threshold:.4g}"
        lines.append(f"| {_plain(name)} | {len(rule.scores.image)} | {limit} |")
    return (
        f"At most {ALPHA:.0%} of normal images like the calibration's have a score above these, in "
        f"{_precision(calibration.scoring)}:\n\n" + "\n".join(lines)
    )
