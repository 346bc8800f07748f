"""The peers: levels in groups, and a user's mistakes."""

from __future__ import annotations

import pytest
import torch
from conftest import make_tree

from benchmarks.peers.__main__ import main
from benchmarks.peers.groups import GroupedBackbone, group
from rlr_fast.models.backbone import Backbone

SIZE = (48, 48)
VIT = "vit_tiny_patch16_224"
GROUPS = (range(2, 6), range(6, 10))
BATCH = 4


def grouped(name=VIT, size=SIZE):
    return GroupedBackbone(name, "random", GROUPS, size)


def images(count=BATCH, size=SIZE):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(1))


def test_a_group_is_the_mean_of_its_levels():
    backbone = grouped()
    maps = Backbone(VIT, "random", range(2, 10), SIZE)(images())
    expected = [torch.stack(maps[:4]).mean(0), torch.stack(maps[4:]).mean(0)]
    torch.testing.assert_close(backbone(images()), expected)
    assert backbone.channels == (192, 192)
    assert backbone.grids == ((3, 3), (3, 3))


def test_groups_of_one_level_are_the_backbone():
    name, levels = "tf_efficientnet_lite0", (group("2"), group("3"))
    backbone = GroupedBackbone(name, "random", levels, SIZE)
    plain = Backbone(name, "random", (2, 3), SIZE)
    assert (backbone.channels, backbone.grids) == (plain.channels, plain.grids)
    for level, expected in zip(backbone(images()), plain(images()), strict=True):
        assert torch.equal(level, expected)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--levels", "6-9", "2-5"], "levels: must rise, got (6, 7, 8, 9, 2, 3, 4, 5)"),
        (["--levels", "2-3"], "levels: those of a group must have one size; 2-3 of"),
        (["--levels", "3-2"], "argument --levels: invalid group value: '3-2'"),
    ],
    ids=["falling", "unlike-sizes", "empty-group"],
)
def test_a_mistake_is_one_line(tmp_path, capsys, flags, message):
    make_tree(tmp_path)
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--weights", "random", "--image-size", "48", *flags])
    last = capsys.readouterr().err.splitlines()[-1]
    assert message in last
