"""The feature cache: what it holds, when it is reused, and that half of one is never read."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import stat
import threading
from pathlib import Path

import pytest
import torch
from conftest import save_picture

from rlr_fast import RLRModel
from rlr_fast.data import load_image
from rlr_fast.training import feature_cache
from rlr_fast.training.feature_cache import CacheError, cached_features


@pytest.fixture
def samples(dataset):
    return [sample for group in dataset.train.values() for sample in group]


@pytest.fixture
def model(small):
    return RLRModel(small)


def counting(model: RLRModel) -> list[int]:
    """Count the images that reach the backbone."""
    seen: list[int] = []
    model.backbone.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    return seen


@pytest.mark.parametrize("placement", ["auto", "ram", "disk"])
def test_rows_are_the_models_tokens_in_bf16(model, samples, small, tmp_path, placement):
    cache = cached_features(model, samples, tmp_path, placement)
    assert len(cache) == len(samples) == 10
    rows = torch.tensor([7, 0, 3])
    images = torch.stack([load_image(samples[i].path, small.image_size) for i in rows])
    expected = model.tokens(images)
    for tokens, level in zip(cache.batch(rows, torch.device("cpu")), expected, strict=True):
        assert tokens.dtype == torch.float32
        torch.testing.assert_close(tokens, level.bfloat16().float(), atol=1e-4, rtol=1e-2)


def test_second_run_reads_no_image(model, samples, tmp_path):
    first = cached_features(model, samples, tmp_path)
    seen = counting(model)
    second = cached_features(model, samples, tmp_path)
    assert seen == []
    assert torch.equal(first.levels[0], second.levels[0])


def change_size(config):
    return dataclasses.replace(config, image_size=(64, 64))


def change_pooling(config):
    return dataclasses.replace(config, neighborhood=1)


def change_levels(config):
    return dataclasses.replace(config, out_indices=(1, 3))


def change_network(config):
    return dataclasses.replace(config, backbone="tf_efficientnet_lite1")


@pytest.mark.parametrize("change", [change_size, change_pooling, change_levels, change_network])
def test_any_change_of_the_features_makes_a_new_cache(model, samples, small, tmp_path, change):
    cached_features(model, samples, tmp_path)
    other = RLRModel(change(small))
    seen = counting(other)
    cached_features(other, samples, tmp_path)
    assert sum(seen) == len(samples)


def test_other_backbone_weights_make_a_new_cache(model, samples, tmp_path):
    cached_features(model, samples, tmp_path)
    state = model.backbone.state_dict()
    model.backbone.load_state_dict({name: value * 2 for name, value in state.items()})
    seen = counting(model)
    cached_features(model, samples, tmp_path)
    assert sum(seen) == len(samples)


def test_a_changed_file_makes_a_new_cache_whatever_its_time(model, samples, tmp_path):
    cached_features(model, samples, tmp_path)
    before = samples[0].path.stat()
    save_picture(samples[0].path, 999)
    os.utime(samples[0].path, ns=(before.st_atime_ns, before.st_mtime_ns))
    seen = counting(model)
    cached_features(model, samples, tmp_path)
    assert sum(seen) == len(samples)


def test_a_copy_of_the_images_has_the_same_cache(model, samples, tmp_path):
    samples[3].path.write_bytes(b"no image")
    cached_features(model, samples, tmp_path / "cache")
    moved = []
    for i, sample in enumerate(samples):
        path = shutil.copy(sample.path, tmp_path / f"{i:03d}.png")
        moved.append(dataclasses.replace(sample, path=Path(path)))
    seen = counting(model)
    cache = cached_features(model, moved, tmp_path / "cache")
    assert seen == []
    assert str(moved[3].path) in str(cache.failures[0].error)


def test_a_cache_is_for_all_who_may_read_the_users_files(model, samples, tmp_path):
    before = os.umask(0o022)
    try:
        folder = cached_features(model, samples, tmp_path).folder
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


def test_the_training_part_of_a_model_does_not_matter(model, samples, small, tmp_path):
    cached_features(model, samples, tmp_path)
    other = RLRModel(dataclasses.replace(small, blocks=2, alpha=3.0, windows=(5, 5)))
    seen = counting(other)
    cached_features(other, samples, tmp_path)
    assert seen == []


def test_interrupted_build_leaves_nothing_that_is_read(model, samples, tmp_path):
    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_features(model, samples, tmp_path, progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["data"]
    seen = counting(model)
    assert len(cached_features(model, samples, tmp_path)) == len(samples)
    assert sum(seen) == len(samples)


def test_a_full_disk_is_told_and_leaves_nothing(model, samples, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(feature_cache, "_append", full)
    with pytest.raises(CacheError, match=r"cannot write the feature cache.*No space left"):
        cached_features(model, samples, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_a_batch_is_written_while_the_next_is_computed(model, samples, tmp_path, monkeypatch):
    computed, waited, batches = threading.Event(), [], []
    append = feature_cache._append

    def count(*_):
        batches.append(1)
        if len(batches) == 2:
            computed.set()

    def wait_and_append(*arguments):
        waited.append(computed.wait(30))
        append(*arguments)

    model.backbone.register_forward_pre_hook(count)
    monkeypatch.setattr(feature_cache, "_append", wait_and_append)
    monkeypatch.setattr(feature_cache, "_BATCH", 5)
    assert len(cached_features(model, samples, tmp_path)) == 10
    assert waited == [True, True]


def test_what_a_killed_process_left_is_not_read(model, samples, tmp_path):
    whole = cached_features(model, samples, tmp_path).folder
    half = tmp_path / f".{whole.name}-killed"
    whole.rename(half)
    os.truncate(half / "level_0.bf16", 10)
    seen = counting(model)
    cached_features(model, samples, tmp_path)
    assert sum(seen) == len(samples)


def test_a_cut_file_is_an_error_that_names_it(model, samples, tmp_path):
    folder = cached_features(model, samples, tmp_path, "ram").folder
    os.truncate(folder / "level_1.bf16", 10)
    with pytest.raises(CacheError, match=r"level_1\.bf16' has 10 bytes"):
        cached_features(model, samples, tmp_path)


def test_unreadable_images_are_left_out_and_told_again_from_the_cache(model, samples, tmp_path):
    samples[3].path.write_bytes(b"no image")
    for _ in range(2):
        cache = cached_features(model, samples, tmp_path)
        assert len(cache) == 9
        assert [failure.index for failure in cache.failures] == [3]
        assert str(samples[3].path) in str(cache.failures[0].error)


def test_without_one_readable_image_it_is_empty_and_says_why(model, samples, tmp_path):
    for sample in samples:
        sample.path.write_bytes(b"no image")
    cache = cached_features(model, samples, tmp_path)
    assert len(cache) == 0 and [f.index for f in cache.failures] == list(range(10))
    (tokens, _) = cache.batch(torch.arange(0), torch.device("cpu"))
    assert tokens.shape == (0, *cache.levels[0].shape[1:])


def test_a_file_that_can_be_read_again_is_taken_in(model, samples, tmp_path):
    path = samples[3].path
    whole = path.read_bytes()
    path.write_bytes(b"\0" * len(whole))
    assert len(cached_features(model, samples, tmp_path)) == 9
    assert len(cached_features(model, samples, tmp_path)) == 9
    path.write_bytes(whole)
    assert len(cached_features(model, samples, tmp_path)) == 10


def test_what_another_process_is_writing_is_not_stale(tmp_path):
    partial = tmp_path / f".{'0a' * 10}-x1"  # of any cache: its images may be others by now
    partial.mkdir()
    (partial / "level_0.bf16").write_bytes(b"1")
    os.utime(partial, (0, 0))
    feature_cache._remove_stale(tmp_path)
    assert partial.exists()
    os.utime(partial / "level_0.bf16", (0, 0))
    feature_cache._remove_stale(tmp_path)
    assert not partial.exists()


def test_flipped_bytes_are_seen(model, samples, tmp_path):
    folder = cached_features(model, samples, tmp_path).folder
    file = folder / "level_1.bf16"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CacheError, match="is damaged; delete"):
        cached_features(model, samples, tmp_path)
    file.write_bytes(whole)
    meta = json.loads((folder / "meta.json").read_text())
    for damage in (
        {"levels": [[1, 1]] * 2},
        {"failures": [{"index": 99, "reason": ""}]},
    ):
        (folder / "meta.json").write_text(json.dumps(meta | damage))
        with pytest.raises(CacheError, match="is damaged; delete"):
            cached_features(model, samples, tmp_path)


def test_a_cache_deleted_meanwhile_is_told(tmp_path):
    with pytest.raises(CacheError, match=r"level_0\.bf16' cannot be read"):
        feature_cache._map(tmp_path / "level_0.bf16", (1, 2, 3))


def test_a_folder_that_cannot_be_written_is_named(model, samples, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="file"):
        cached_features(model, samples, tmp_path / "file")


def test_gpu_placement_without_a_gpu_is_refused(model, samples, tmp_path):
    with pytest.raises(ValueError, match="needs the model on a GPU"):
        cached_features(model, samples, tmp_path, "gpu")
