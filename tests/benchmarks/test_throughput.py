"""Throughput of training: it trains, counts the images of its epochs, and records them."""

from __future__ import annotations

import json

import pytest
from conftest import make_tree

from benchmarks import throughput


@pytest.mark.parametrize("on_data", [False, True], ids=["features", "data"])
def test_images_a_second_are_recorded(on_data, small, brief, tmp_path, monkeypatch, capsys):
    preset = throughput.PRESETS["tiny"]
    preset = type(preset)(small, brief, preset.about)
    monkeypatch.setitem(throughput.PRESETS, "tiny", preset)
    monkeypatch.setattr(throughput, "RLRConfig", lambda **options: small)
    words = ["--backend", "tiled", "--batch", "2", "--steps", "2"]
    words += ["--data", str(make_tree(tmp_path / "data"))] if on_data else []
    assert throughput.main([*words, "--record", str(tmp_path / "record.json")]) == 0
    results = json.loads((tmp_path / "record.json").read_text())["results"]
    assert len(results) == (4 if on_data else 1)
    for result in results:
        assert result["images_per_s"] > 0 and result["batch"] == 2
        assert sum(result["shares"].values()) == pytest.approx(1)
    assert capsys.readouterr().out.count("images/s") == len(results)
