"""RLRConfig, TrainConfig and presets."""

from __future__ import annotations

import dataclasses
import inspect
import json

import pytest

from rlr_fast.config import (
    PRESETS,
    ExecutionConfig,
    InferenceExecution,
    RLRConfig,
    TrainConfig,
    TrainExecution,
    from_dict,
    level_name,
    read_level,
)


def test_defaults_are_the_papers_recipe():
    config, recipe = RLRConfig(), TrainConfig()
    assert config.backbone == "tf_efficientnet_b6.aa_in1k"
    assert config.image_size == (256, 256)
    assert config.out_indices == (1, 2, 3)
    assert config.hidden == (128, 256, 512)
    assert config.windows == ((5, 5), (7, 7), (11, 11))
    assert (config.alpha, config.blocks, config.neighborhood) == (2.0, 4, 3)
    assert config.attention == ("mlka", "lca") and not config.residual
    assert (config.fusion, config.references, config.diversity) == ("fixed", 1, 0.0)
    assert (recipe.lr, recipe.epochs, recipe.schedule) == (1e-4, 200, "constant")


def test_authors_preset_pairs_the_largest_window_with_the_finest_grid():
    assert RLRConfig.preset("authors").windows == ((11, 11), (7, 7), (5, 5))


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip_gives_the_same_configuration(name):
    config = RLRConfig.preset(name)
    assert RLRConfig.from_dict(json.loads(config.to_json())) == config


def test_window_pairs_survive_json():
    config = RLRConfig(windows=((3, 5), 7, 11))
    assert RLRConfig.from_dict(json.loads(config.to_json())).windows == ((3, 5), (7, 7), (11, 11))
    assert json.loads(config.to_json())["windows"] == [[3, 5], 7, 11]


def test_groups_of_levels_survive_json_and_have_names():
    config = RLRConfig(out_indices=([2, 3, 4, 5], 6, (7,)))
    assert config.out_indices == ((2, 3, 4, 5), 6, 7)
    assert RLRConfig.from_dict(json.loads(config.to_json())) == config
    names = [level_name(level) for level in config.out_indices]
    assert names == ["2-5", "6", "7"]
    assert tuple(map(read_level, names)) == config.out_indices
    assert read_level("4-4") == 4


@pytest.mark.parametrize("text", ["", "a", "-1", "2-", "5-2", "2-3-4", "1.5", "2 - 3", "0-9999"])
def test_what_is_no_level_is_refused_as_written(text):
    with pytest.raises(ValueError, match="first and the last such as 2-5, got " + repr(text)):
        read_level(text)


def test_levels_that_count_the_same_are_kept_as_one_value():
    config = RLRConfig(level_weights=(2, 2, 2), level_offsets=(0, 0.5, 1))
    assert config.level_weights == (2.0,) and config.level_offsets == (0.0, 0.5, 1.0)


def test_single_values_are_repeated_for_every_level():
    config = RLRConfig(hidden=64, heads=4, windows=5, image_size=128)
    assert config.hidden == (64,) * 3 and config.heads == (4,) * 3
    assert config.windows == ((5, 5),) * 3 and config.image_size == (128, 128)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("windows", (4, 7, 11)),
        ("windows", (5, 7)),
        ("hidden", (130, 256, 512)),
        ("heads", 0),
        ("neighborhood", 2),
        ("components", -1),
        ("components", (8, 8)),
        ("image_size", (0, 4)),
        ("image_size", (1, 2, 3)),
        ("attention", ("mkla",)),
        ("attention", ()),
        ("attention", ("lca", "lca")),
        ("out_indices", ()),
        ("out_indices", (1, 1, 2)),
        ("out_indices", ((1, 2), 2, 3)),
        ("out_indices", ((2, 5), (6, 9), 10)),
        ("out_indices", ((3, 2), 4, 5)),
        ("out_indices", ((4, 5), (2, 3), 6)),
        ("out_indices", (3, 2, 4)),
        ("out_indices", (-1, 2, 3)),
        ("out_indices", ((-2, -1), 2, 3)),
        ("out_indices", ((), 2, 3)),
        ("out_indices", ("2-5", 6, 7)),
        ("blocks", 0),
        ("perturbation", -1.0),
        ("uncertainty", 1.1),
        ("alpha", float("nan")),
        ("smoothing", float("inf")),
        ("surround", -1.0),
        ("surround", 4.0),
        ("image_surround", 4.0),
        ("level_offsets", (0.0, 1.0)),
        ("level_offsets", float("nan")),
        ("level_weights", (1.0, -1.0, 1.0)),
        ("level_weights", 0.0),
        ("top_share", -0.1),
        ("top_share", 1.5),
        ("fusion", "learnt"),
        ("references", 0),
        ("references", 1.5),
        ("diversity", -0.1),
        ("diversity", float("nan")),
    ],
)
def test_broken_rule_names_the_field_and_the_value(field, value):
    with pytest.raises(ValueError, match=field.rstrip("s")):
        RLRConfig(**{field: value})


@pytest.mark.parametrize("attention", [("mlka",), ("lca",), ("self", "mlka"), ("cross", "lca")])
def test_learned_fusion_needs_a_branch_for_each_theta(attention):
    RLRConfig(attention=attention)
    with pytest.raises(ValueError, match=r"where fusion is learned, got attention=\("):
        RLRConfig(attention=attention, fusion="learned")


def test_several_references_need_lca_and_diversity_needs_several():
    RLRConfig(attention=("cross", "lca"), references=2, diversity=0.1)
    with pytest.raises(ValueError, match=r"1 without the branch lca.*got references=2"):
        RLRConfig(attention=("cross", "mlka"), references=2)
    with pytest.raises(ValueError, match=r"0 with a single reference.*got diversity=0.1"):
        RLRConfig(diversity=0.1)


@pytest.mark.parametrize("value", ["slow", "constnat"])
def test_unknown_choice_says_what_exists(value):
    with pytest.raises(ValueError, match="constant"):
        TrainConfig(schedule=value)


def test_unknown_preset_suggests_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'paper'"):
        RLRConfig.preset("papr")


def test_unknown_field_suggests_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'alpha'"):
        from_dict(RLRConfig, {"alfa": 3})


def test_other_levels_take_what_is_the_same_for_all():
    base = RLRConfig.preset("accurate")
    assert base.hidden == (256, 256) and len(set(base.patches)) == 2
    config = from_dict(RLRConfig, {"out_indices": [1, 2, 3], "patches": 1}, base)
    assert config.hidden == (256, 256, 256) and config.windows == ((7, 7),) * 3
    config = from_dict(
        RLRConfig, {"out_indices": [1, 2, 3], "patches": 1, "hidden": [8, 16, 24]}, base
    )
    assert config.hidden == (8, 16, 24) and config.heads == (8, 8, 8)
    with pytest.raises(ValueError, match="patches must be one value, or one for each of 3 levels"):
        from_dict(RLRConfig, {"out_indices": [1, 2, 3]}, base)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("blocks", "four"),
        ("blocks", True),
        ("standardize", 1),
        ("hidden", [1.5, 2, 3]),
        ("backbone", 3),
    ],
)
def test_wrong_type_names_the_field(field, value):
    for make in (lambda: from_dict(RLRConfig, {field: value}), lambda: RLRConfig(**{field: value})):
        with pytest.raises(ValueError, match=f"{field} must be of type"):
            make()


@pytest.mark.parametrize(
    ("cls", "field", "value"),
    [
        (ExecutionConfig, "backend", "fast"),
        (ExecutionConfig, "workers", 0),
        (TrainExecution, "workers", -1),
        (TrainExecution, "cache", "tape"),
        (TrainExecution, "micro_batch_size", 0),
        (InferenceExecution, "batch_size", 0),
        (InferenceExecution, "batch_size", 2.5),
        (ExecutionConfig, "compile", "yes"),
        (InferenceExecution, "precision", "fp8"),
    ],
)
def test_execution_names_the_field_and_the_value(cls, field, value):
    with pytest.raises(ValueError, match=rf"{field}.*{value}"):
        cls(**{field: value})


@pytest.mark.parametrize("cls", [RLRConfig, TrainConfig, TrainExecution, InferenceExecution])
def test_every_field_is_described(cls):
    # Python 3.13 removes the indentation of docstrings itself.
    described = "".join(inspect.cleandoc(base.__doc__) for base in cls.__mro__[:-1])
    for field in dataclasses.fields(cls):
        assert f"\n    {field.name}: " in described, field.name
