"""PatchCore's coreset, against a pass over all rows for each center."""

from __future__ import annotations

import pytest
import torch

from benchmarks.peers import coreset
from benchmarks.peers.coreset import farthest_first


def points(count=600, dim=7):
    """Clusters of unlike size and spread, as patches of several classes are."""
    generator = torch.Generator().manual_seed(2)
    spread = torch.rand(count, 1, generator=generator, dtype=torch.float64) ** 3
    places = torch.randint(5, (count, 1), generator=generator).double()
    return 3 * places + spread * torch.randn(count, dim, generator=generator, dtype=torch.float64)


def one_by_one(features, count, first):
    chosen = [first]
    nearest = torch.cdist(features, features[[first]])[:, 0]
    while len(chosen) < count:
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, torch.cdist(features, features[[chosen[-1]]])[:, 0])
    return chosen


@pytest.mark.parametrize("pool", [1, 2, 20, 10_000])
@pytest.mark.parametrize("chunk", [500, 10**9])
def test_the_choice_is_that_of_a_pass_for_each_center(monkeypatch, pool, chunk):
    monkeypatch.setattr(coreset, "_POOL", pool)
    monkeypatch.setattr(coreset, "_CHUNK", chunk)
    features = points()
    assert farthest_first(features, 300, first=17) == one_by_one(features, 300, 17)


@pytest.mark.parametrize("count", [1, 2, 600])
def test_any_share_can_be_chosen(count):
    chosen = farthest_first(points(), count, first=0)
    assert len(chosen) == len(set(chosen)) == count


def test_rows_that_are_equal_come_last():
    features = points(40).repeat(3, 1)
    chosen = farthest_first(features, 60, first=0)
    assert len(chosen) == 60
    assert len({row % 40 for row in chosen[:40]}) == 40
