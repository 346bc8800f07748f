"""Import of an authors' checkpoint, against a forward written from its documented layout."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rlr_fast import RLRConfig, RLRModel
from rlr_fast.models.authors import load_reconstructors
from rlr_fast.models.reconstructor import sincos_positions

CHANNELS, HIDDEN, SIDE, BLOCKS = (24, 40), (32, 64), (32, 16), 2


def authors_level(channels: int, hidden: int, side: int) -> dict[str, torch.Tensor]:
    """One level's tensors under the names of the authors' checkpoints."""
    n, state = side * side, {}

    def put(name, *shape):
        state[name] = torch.randn(*shape) * 0.2

    put("ref_mca", 1, n, channels)
    for part in ("embedding", "ref_mca_embedding"):
        put(f"{part}.project_embedding.project.weight", hidden, channels, 1)
        put(f"{part}.project_embedding.project.bias", hidden)
    for i in range(BLOCKS):
        layer = f"encoder.encode_layers.{i}"
        for attention in ("mca", "nsa"):
            put(f"{layer}.{attention}.in_proj_weight", 3 * hidden, hidden)
            put(f"{layer}.{attention}.in_proj_bias", 3 * hidden)
            put(f"{layer}.{attention}.out_proj.weight", hidden, hidden)
            put(f"{layer}.{attention}.out_proj.bias", hidden)
        for norm in ("norm1", "norm2"):
            put(f"{layer}.{norm}.weight", hidden)
            put(f"{layer}.{norm}.bias", hidden)
        put(f"{layer}.ffn.fc1.weight", 4 * hidden, hidden)
        put(f"{layer}.ffn.fc1.bias", 4 * hidden)
        put(f"{layer}.ffn.fc2.weight", hidden, 4 * hidden)
        put(f"{layer}.ffn.fc2.bias", hidden)
    put("encoder.norm.weight", hidden)
    put("encoder.norm.bias", hidden)
    put("projection.weight", channels, hidden)
    put("projection.bias", channels)
    return state


def forward(state, tokens, side, window):
    """The authors' network by torch's own layers; LCA sees |dy|, |dx| <= window // 2."""
    hidden = state["encoder.norm.weight"].shape[0]
    positions = sincos_positions((side, side), hidden)

    def embed(x, part):
        weight = state[f"{part}.project_embedding.project.weight"]
        bias = state[f"{part}.project_embedding.project.bias"]
        return F.conv1d(x.mT, weight, bias).mT + positions

    def attend(name, q, k, v, hidden_mask):
        module = torch.nn.MultiheadAttention(hidden, 8, batch_first=True)
        module.load_state_dict(
            {k[len(name) + 1 :]: v for k, v in state.items() if k.startswith(name + ".")}
        )
        return module(q, k, v, attn_mask=hidden_mask, need_weights=False)[0]

    def norm(x, name):
        return F.layer_norm(x, (hidden,), state[f"{name}.weight"], state[f"{name}.bias"])

    ys = torch.arange(side * side) // side
    xs = torch.arange(side * side) % side
    far = ((ys[:, None] - ys).abs() > window // 2) | ((xs[:, None] - xs).abs() > window // 2)
    y = embed(tokens, "embedding")
    r = embed(state["ref_mca"], "ref_mca_embedding").expand(len(tokens), -1, -1)
    for i in range(BLOCKS):
        layer = f"encoder.encode_layers.{i}"
        mca, nsa = attend(f"{layer}.mca", y, r, r, far), attend(f"{layer}.nsa", y, r, y, ~far)
        z = norm(2 * mca + nsa, f"{layer}.norm1")
        ffn = F.linear(z, state[f"{layer}.ffn.fc1.weight"], state[f"{layer}.ffn.fc1.bias"])
        ffn = F.linear(
            F.gelu(ffn), state[f"{layer}.ffn.fc2.weight"], state[f"{layer}.ffn.fc2.bias"]
        )
        y = norm(z + ffn, f"{layer}.norm2")
    return F.linear(norm(y, "encoder.norm"), state["projection.weight"], state["projection.bias"])


@pytest.fixture
def states():
    return [authors_level(c, h, s) for c, h, s in zip(CHANNELS, HIDDEN, SIDE, strict=True)]


@pytest.fixture
def checkpoint(states, tmp_path):
    path = tmp_path / "authors.pth"
    torch.save(
        {
            "state_dict": states,
            "best_img": np.float64(0.98),
            "best_pix": np.float32(0.97),
            "epoch": 3,
        },
        path,
    )
    return path


def test_levels_reproduce_the_authors_forward_with_their_windows(checkpoint, states):
    levels = load_reconstructors(checkpoint)
    assert [level.window for level in levels] == [(7, 7), (5, 5)]
    assert [(level.channels, level.hidden, level.grid, len(level.blocks)) for level in levels] == [
        (24, 32, (32, 32), 2),
        (40, 64, (16, 16), 2),
    ]
    for level, state, side, window in zip(levels, states, SIDE, (7, 5), strict=True):
        tokens = torch.randn(2, side * side, level.channels)
        torch.testing.assert_close(
            level(tokens), forward(state, tokens, side, window), atol=2e-4, rtol=1e-3
        )


def test_model_around_an_authors_checkpoint_saves_and_loads(checkpoint, states, tmp_path):
    config = RLRConfig(
        backbone="tf_efficientnet_lite0",
        backbone_weights="random",
        out_indices=(1, 2),
        image_size=(128, 128),
        hidden=(16, 16),
        heads=(8, 8),
        windows=(3, 3),
    )
    config = dataclasses.replace(config, components=(8,), patches=(2,))  # which it does not have
    model = RLRModel.from_authors(checkpoint, config)
    assert model.config.components == (0,) and model.config.patches == (1,)
    assert model.config.hidden == HIDDEN and model.config.windows == ((7, 7), (5, 5))
    model.save_pretrained(tmp_path / "saved")
    images = torch.rand(1, 3, 128, 128)
    again = RLRModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(model(images).score_map, again(images).score_map)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param({"ref_mca": 3}, "must be tensors of floating point", id="number"),
        pytest.param({"ref_mca": None}, "reference is missing", id="no-reference"),
        pytest.param({"ref_mca": torch.ones(3)}, "reference is missing", id="flat"),
        pytest.param({"ref_mca": torch.ones(2, 9, 24)}, r"must be \(1, N, C\)", id="two"),
        pytest.param(
            {"ref_mca": torch.ones(1).expand(1, 2**20, 2**30)}, "must be whole", id="huge-view"
        ),
        pytest.param({"ref_mca": torch.full((1, 9, 24), torch.nan)}, "finite", id="nan"),
        pytest.param({"encoder.encode_layers": torch.ones(3)}, "does not fit", id="no-layer"),
        pytest.param(
            {"encoder.encode_layers.999999999.norm1.weight": torch.ones(32)},
            "does not fit",
            id="a-billion-layers",
        ),
        pytest.param(
            {"embedding.project_embedding.project.weight": torch.ones(2**20, 24, 1)},
            "does not fit",
            id="a-million-wide",
        ),
    ],
)
def test_a_damaged_level_is_told_before_it_fills_the_memory(states, tmp_path, change, reason):
    level = {k: v for k, v in (states[0] | change).items() if v is not None}
    torch.save({"state_dict": [level]}, tmp_path / "authors.pth")
    with pytest.raises(ValueError, match=rf"authors\.pth.* {reason}|authors\.pth.*{reason}"):
        load_reconstructors(tmp_path / "authors.pth")


@pytest.mark.parametrize("levels", [[3], [{3: torch.ones(2)}], [{}], [[]]], ids=str)
def test_levels_that_are_none_are_told(tmp_path, levels):
    torch.save({"state_dict": levels}, tmp_path / "authors.pth")
    with pytest.raises(ValueError, match="level 0 of"):
        load_reconstructors(tmp_path / "authors.pth")


def test_a_backbone_with_other_levels_is_refused(checkpoint):
    config = RLRConfig(
        backbone="tf_efficientnet_lite0", backbone_weights="random", image_size=(64, 64)
    )
    with pytest.raises(ValueError, match="the backbone gives levels"):
        RLRModel.from_authors(checkpoint, config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 0}, "heads must be a positive integer"),
        ({"heads": 3}, "heads must divide the width"),
        ({"windows": 5}, "windows must have one value per level"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_a_wrong_argument_is_not_the_files_fault(checkpoint, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        load_reconstructors(checkpoint, **options)


def test_a_grid_without_a_rule_asks_for_windows(tmp_path):
    torch.save({"state_dict": [authors_level(8, 16, 12)]}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="no rule for a grid of 12"):
        load_reconstructors(tmp_path / "a.pth")
    assert load_reconstructors(tmp_path / "a.pth", windows=[5])[0].window == (5, 5)


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


@pytest.mark.parametrize(
    "content",
    [
        {"weights": 1},
        {"state_dict": []},
        {"state_dict": [{"a": torch.ones(1)}]},
        {"state_dict": Evil()},
    ],
    ids=["no-state-dict", "no-level", "other-tensors", "pickled-code"],
)
def test_other_files_are_refused_by_name(content, tmp_path, capsys):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth"):
        load_reconstructors(tmp_path / "a.pth")
    assert "code ran" not in capsys.readouterr().out


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="no file"):
        load_reconstructors(tmp_path / "a.pth")
