"""A run's folder: a resumed run equals an uninterrupted one, and nothing written is lost."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil

import pytest
import torch
from conftest import BRIEF, SMALL, make_tree
from training_cases import run, same, weights

from rlr_fast import RLRModel
from rlr_fast.data import read_dataset
from rlr_fast.files import file_digest
from rlr_fast.inference.calibrate import calibrate
from rlr_fast.models.backbone_weights import BackboneWeightsError
from rlr_fast.training import run_dir
from rlr_fast.training.run_dir import TrainingError, check_folder
from rlr_fast.training.steps import Steps
from rlr_fast.training.trainer import Trainer


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """The folder of a finished run of the data set that `dataset` makes anew."""
    root = tmp_path_factory.mktemp("run")
    run(read_dataset(make_tree(root / "data")), root / "run", root)
    return root / "run"


@pytest.fixture
def finished(once, tmp_path):
    """A copy of it, ``tmp_path / "run"``."""
    return shutil.copytree(once, tmp_path / "run")


@pytest.mark.parametrize(
    ("setting", "attention"),
    [
        ({}, ("mlka", "lca")),
        ({"schedule": "cosine", "clip_grad": 1.0}, ("mlka", "lca")),
        ({"optimizer": "muon"}, ("mlka", "lca")),
        ({"optimizer": "muon"}, ("self",)),  # the reference has no gradient, so no state
    ],
    ids=str,
)
def test_resumed_run_ends_with_the_same_bits(dataset, tmp_path, monkeypatch, setting, attention):
    recipe = dataclasses.replace(BRIEF, epochs=4, **setting)
    config = dataclasses.replace(SMALL, standardize=True, attention=attention)
    run(dataset, tmp_path / "whole", tmp_path, config, recipe)
    save = Trainer._save

    def stop_after_two(self, checkpoints):
        save(self, checkpoints)
        if self.epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_save", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        run(dataset, tmp_path / "halves", tmp_path, config, recipe)
    monkeypatch.setattr(Trainer, "_save", save)
    torch.rand(7)  # the global generator's state does not matter
    result = run(dataset, tmp_path / "halves", tmp_path, config, recipe, resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "halves"))
    assert [row["step"] for row in result.history] == [3, 6, 9, 12]


def test_kill_between_the_last_two_writes_is_made_good_by_resume(dataset, tmp_path, monkeypatch):
    run(dataset, tmp_path / "whole", tmp_path)
    write = run_dir.write_tensors

    def die(path, *arguments):
        last = run_dir.read_checkpoint(tmp_path / "run")
        if path.name == "model.safetensors" and last.epoch == BRIEF.epochs:
            raise KeyboardInterrupt
        write(path, *arguments)

    monkeypatch.setattr(run_dir, "write_tensors", die)
    with pytest.raises(KeyboardInterrupt):
        run(dataset, tmp_path / "run", tmp_path)
    monkeypatch.setattr(run_dir, "write_tensors", write)
    assert not same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    run(dataset, tmp_path / "run", tmp_path, resume=True)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_full_disk_keeps_the_last_checkpoint(dataset, tmp_path, monkeypatch):
    write = run_dir.write_tensors
    calls = []

    def full(path, *arguments):
        calls.append(path)
        if len(calls) > 2:
            path.with_name("." + path.name + ".partial").write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, *arguments)

    monkeypatch.setattr(run_dir, "write_tensors", full)
    with pytest.raises(
        TrainingError, match=r"No space left on device; the checkpoint of epoch \d is intact"
    ):
        run(dataset, tmp_path / "run", tmp_path)
    monkeypatch.setattr(run_dir, "write_tensors", write)
    run(dataset, tmp_path / "run", tmp_path, resume=True)
    run(dataset, tmp_path / "whole", tmp_path)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_a_full_disk_under_the_tensorboard_log_is_told(dataset, tmp_path, monkeypatch, capfd):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
    with pytest.raises(
        TrainingError, match=r"cannot write the TensorBoard log in .*; no epoch was"
    ):
        run(dataset, tmp_path / "run", tmp_path)
    assert "Traceback" not in capfd.readouterr().err


def test_a_second_run_does_not_overwrite_the_first(finished, dataset, tmp_path):
    before = weights(tmp_path / "run")
    with pytest.raises(TrainingError, match="already holds a run"):
        run(dataset, tmp_path / "run", tmp_path)
    assert same(before, weights(tmp_path / "run"))


def test_a_run_is_not_written_where_its_files_would_be_read_as_images(dataset, tmp_path):
    root = dataset.root
    plain = read_dataset(root / "bolt/train/good")
    refused = ((dataset, root / "bolt"), (dataset, root / "bolt/train/good/run"))
    for data, out in (*refused, (plain, plain.root), (plain, plain.root / "run")):
        with pytest.raises(TrainingError, match="among the images"):
            check_folder(out, {}, False, data)
    check_folder(root / "run", {}, False, dataset)  # no class: it has no train and no test
    check_folder(tmp_path / "run", {}, False, plain)


def test_resume_with_other_images_is_refused_and_keeps_the_record(
    finished, dataset, tmp_path, monkeypatch
):
    record = (tmp_path / "run/run.json").read_text()
    moved = make_tree(tmp_path / "moved/data")
    run(read_dataset(moved), tmp_path / "run", tmp_path, resume=True)  # the same images elsewhere
    other = make_tree(tmp_path / "other/data", train=6)
    with pytest.raises(TrainingError, match="images was 10, now 12"):
        run(read_dataset(other), tmp_path / "run", tmp_path, resume=True)
    assert (tmp_path / "run/run.json").read_text() == record


def test_a_run_that_finished_no_epoch_leaves_its_folder_free(dataset, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Steps, "take", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(dataset, tmp_path / "run", tmp_path)
    stale = tmp_path / "run/trained_images.txt"
    stale.write_text("0" * 32 + "\n")  # of other images
    run(dataset, tmp_path / "run", tmp_path, recipe=dataclasses.replace(BRIEF, lr=2e-3))
    assert len(stale.read_text().split()) == 10 and "0" * 32 not in stale.read_text()
    assert json.loads((tmp_path / "run/run.json").read_text())["recipe"]["lr"] == 2e-3


def test_nothing_is_written_before_the_backbone_is_there(dataset, tmp_path):
    config = dataclasses.replace(SMALL, backbone_weights="missing.pth")
    with pytest.raises(BackboneWeightsError):
        run(dataset, tmp_path / "run", tmp_path, config)
    assert not (tmp_path / "run").exists()


def test_training_state_without_its_settings_is_told(finished, dataset, tmp_path):
    (tmp_path / "run/run.json").unlink()
    with pytest.raises(TrainingError, match=r"run\.json"):
        run(dataset, tmp_path / "run", tmp_path, resume=True)


def test_resume_with_other_settings_names_them(finished, dataset, tmp_path):
    other = dataclasses.replace(BRIEF, lr=0.5)
    with pytest.raises(TrainingError, match=r"lr was 0\.001, now 0\.5"):
        run(dataset, tmp_path / "run", tmp_path, recipe=other, resume=True)


def test_cut_training_state_is_named_and_the_weights_still_load(finished, dataset, tmp_path):
    state = tmp_path / "run/training_state.safetensors"
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(TrainingError, match=r"cannot resume: .*damaged or incomplete"):
        run(dataset, tmp_path / "run", tmp_path, resume=True)
    RLRModel.from_pretrained(tmp_path / "run")


def test_a_damaged_list_of_the_images_is_told_and_an_old_run_has_none(finished):
    assert len(run_dir.read_trained(finished)) == 10
    (finished / "trained_images.txt").write_text("half")
    with pytest.raises(TrainingError, match=r"trained_images\.txt cannot be read"):
        run_dir.read_trained(finished)
    (finished / "trained_images.txt").unlink()
    assert run_dir.read_trained(finished) == frozenset()


def test_a_folder_that_cannot_be_written_is_told_before_the_features(dataset, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot write the run"):
        run(dataset, tmp_path / "file/run", tmp_path)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("{}", "it has no 'model'"),
        ('{"model": {}, "recipe": 3, "data": {}}', "recipe must be an object"),
        ('{"model": {}, "recipe": {}, "data": {}}', "data has no 'root'"),
        ("[]", r"it must be an object, got \[\]"),
        ("{", "Expecting property name"),
    ],
)
def test_damaged_settings_are_named(finished, dataset, tmp_path, record, reason):
    (tmp_path / "run/run.json").write_text(record)
    with pytest.raises(TrainingError, match=rf"run\.json cannot be read: {reason}"):
        run(dataset, tmp_path / "run", tmp_path, resume=True)


def test_a_lost_or_damaged_history_is_told_and_costs_the_curve_alone(
    finished, dataset, tmp_path, caplog
):
    before, history = weights(tmp_path / "run"), tmp_path / "run/history.jsonl"
    history.write_text("no json")
    with pytest.raises(TrainingError, match=r"history\.jsonl cannot be read.*Delete it"):
        run(dataset, tmp_path / "run", tmp_path, resume=True)
    history.unlink()
    result = run(dataset, tmp_path / "run", tmp_path, resume=True)
    assert result.history == [] and "history.jsonl is missing" in caplog.text
    assert same(weights(tmp_path / "run"), before)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("3", "it must be an object"),
        ('{"step": 1}', "a row has no epoch, images_per_s, loss"),
        ('{"step": 1, "epoch": 1, "loss": [], "images_per_s": 1}', "loss must be a number"),
        ('{"step": 1, "epoch": true, "loss": 1, "images_per_s": 1}', "epoch must be a number"),
        ('{"step": 1, "epoch": 1, "loss": 1e300, "images_per_s": 1}', "loss must be a number of"),
        ('{"step": 1%s, "epoch": 1, "loss": 1, "images_per_s": 1}' % ("0" * 400), "step must be a"),
    ],
)
def test_a_damaged_row_of_the_history_is_told(tmp_path, row, reason):
    (tmp_path / "history.jsonl").write_text(row)
    with pytest.raises(TrainingError, match=rf"history\.jsonl cannot be read: {reason}"):
        run_dir._read_history(tmp_path / "history.jsonl", 9)


def test_a_training_state_with_a_flipped_byte_is_refused_and_not_resumed(
    finished, dataset, tmp_path
):
    file = tmp_path / "run/training_state.safetensors"
    data = bytearray(file.read_bytes())
    data[-7] ^= 1
    file.write_bytes(data)
    with pytest.raises(TrainingError, match=r"training_state\.safetensors is damaged"):
        run(dataset, tmp_path / "run", tmp_path, resume=True)


@pytest.mark.parametrize("progress", ["{}", "[]", '{"epoch": "1"}', "[" * 100_000])
def test_a_training_state_that_says_nothing_of_its_progress_is_told(tmp_path, progress):
    tensors = {"optimizer.x": torch.zeros(1)}
    run_dir.write_tensors(tmp_path / run_dir.STATE_FILE, tensors, {"progress": progress})
    with pytest.raises(TrainingError, match="holds no training state"):
        run_dir.read_checkpoint(tmp_path)


def test_two_trainings_do_not_work_in_one_folder(dataset, tmp_path):
    with (
        run_dir.lock_run(tmp_path / "run"),
        pytest.raises(TrainingError, match="another process works in"),
    ):
        run(dataset, tmp_path / "run", tmp_path)
    run(dataset, tmp_path / "run", tmp_path)


def test_weights_in_place_of_the_training_state_are_told(finished, dataset, tmp_path):
    (tmp_path / "run/training_state.safetensors").write_bytes(
        (tmp_path / "run/model.safetensors").read_bytes()
    )
    with pytest.raises(TrainingError, match="holds no training state"):
        run(dataset, tmp_path / "run", tmp_path, resume=True)


def test_an_unwritten_checkpoint_is_told_after_an_interruption(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_dir, "write_checkpoint", full)
    checkpoint = run_dir.Checkpoint(3, {}, {}, {}, {}, [])
    with (
        pytest.raises(KeyboardInterrupt),
        run_dir.CheckpointWriter(tmp_path, 2) as checkpoints,
    ):
        checkpoints.write(checkpoint)
        raise KeyboardInterrupt
    assert "No space left on device; the checkpoint of epoch 2 is intact" in caplog.text


def test_settings_written_with_other_windows_of_the_same_meaning_are_the_same():
    record = {"model": SMALL.to_dict(), "recipe": {}, "data": {}}
    assert record["model"]["windows"] == [3, (3, 5)]
    before = {"model": json.loads(SMALL.to_json()), "recipe": {}, "data": {}}
    for windows in ([3, [3, 5]], [[3, 3], [3, 5]]):
        before["model"]["windows"] = windows
        assert not run_dir.changed_settings(before, record)
    before["model"]["windows"] = [3, 5]
    (changed,) = run_dir.changed_settings(before, record)
    assert changed == "windows was [3, 5], now [3, [3, 5]]"


@pytest.mark.parametrize(
    "name", ["components", "patches", "surround", "image_surround", "uncertainty"]
)
def test_a_run_from_before_a_setting_existed_had_its_default(name):
    record = {"model": SMALL.to_dict(), "recipe": {}, "data": {}}
    before = json.loads(json.dumps(record))
    del before["model"][name]
    assert not run_dir.changed_settings(before, record)
    record["model"][name] = [2]
    (changed,) = run_dir.changed_settings(before, record)
    assert changed.startswith(f"{name} was ") and changed.endswith("now [2]")


def test_images_that_were_kept_out_are_not_trained_on_by_a_resumed_run(tmp_path, monkeypatch):
    root = make_tree(tmp_path / "data", ("bolt",), train=50)
    recipe = dataclasses.replace(BRIEF, epochs=1, calibration_share=0.2)
    run(read_dataset(root), tmp_path / "run", tmp_path, recipe=recipe)
    # Those of validation would calibrate now, and all 50 be trained on.
    good = root / "bolt/validation/good"
    good.mkdir(parents=True)
    shutil.copy(root / "bolt/test/good/000.png", good)
    with pytest.raises(TrainingError, match="images that are kept out of training have other"):
        run(read_dataset(root), tmp_path / "run", tmp_path, recipe=recipe, resume=True)


def test_a_run_does_not_go_on_with_a_file_that_was_put_right(dataset, tmp_path):
    file = dataset.train["bolt"][0].path
    whole = file.read_bytes()
    file.write_bytes(bytes(len(whole)))
    run(dataset, tmp_path / "run", tmp_path)
    before = run_dir.read_trained(tmp_path / "run")
    file.write_bytes(whole)
    with pytest.raises(TrainingError, match="on 9, and 10 can be read now, 1 of them for the fir"):
        run(dataset, tmp_path / "run", tmp_path, resume=True)
    assert run_dir.read_trained(tmp_path / "run") == before and file_digest(file) not in before


def test_other_images_under_the_old_names_are_not_gone_on_with(finished, dataset, tmp_path):
    before, trained = weights(finished), run_dir.read_trained(finished)
    for sample in dataset.train["bolt"][:3]:
        content = bytearray(sample.path.read_bytes())
        content[-1] ^= 1
        sample.path.write_bytes(content)
    with pytest.raises(TrainingError, match="of 10 that it was trained on, 3 have another content"):
        run(dataset, finished, tmp_path, resume=True)
    assert same(before, weights(finished)) and run_dir.read_trained(finished) == trained


@pytest.mark.parametrize("resume", [False, True])
def test_a_model_without_its_training_state_is_not_overwritten(finished, dataset, tmp_path, resume):
    (finished / "training_state.safetensors").unlink()
    before = weights(finished)
    with pytest.raises(TrainingError, match="holds a model without its training_state"):
        run(dataset, finished, tmp_path, resume=resume)
    assert same(before, weights(finished))


def test_a_run_that_was_deleted_in_part_is_not_taken_for_a_finished_one(
    finished, dataset, tmp_path, monkeypatch
):
    for name in ("model.safetensors", "training_state.safetensors"):
        (finished / name).unlink()
    recipe = dataclasses.replace(BRIEF, epochs=1, score_fit="scaled")

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("rlr_fast.training.train.fit_score", stop)
        run(dataset, finished, tmp_path, recipe=recipe)
    assert run_dir.unfinished(finished) is not None
    run(dataset, finished, tmp_path, recipe=recipe, resume=True)
    assert RLRModel.from_pretrained(finished).config.level_weights != (1.0,)


def test_damaged_scores_are_written_anew_by_a_resumed_run(finished, dataset, tmp_path, caplog):
    whole = (finished / "calibration.json").read_bytes()
    (finished / "calibration.json").write_text("{}")
    run(dataset, finished, tmp_path, resume=True)
    assert "calibration.json cannot be read" in caplog.text and "written anew" in caplog.text
    assert (finished / "calibration.json").read_bytes() == whole


def test_a_finished_run_that_is_resumed_otherwise_stays_as_it_is(dataset, tmp_path):
    """Its score is not fitted anew, which would differ by rounding and cost its calibration."""
    recipe = dataclasses.replace(BRIEF, epochs=1, score_fit="scaled")
    config = dataclasses.replace(SMALL, uncertainty=0.5)
    run(dataset, tmp_path / "run", tmp_path, config, recipe)
    model = RLRModel.from_pretrained(tmp_path / "run")
    taken = {"bolt": [s.path for s in dataset.test["bolt"] if not s.is_anomaly]}
    calibrate(model, taken, tmp_path / "run", None, source="test")
    before = [(tmp_path / "run" / name).read_text() for name in ("config.json", "calibration.json")]
    weights_before = weights(tmp_path / "run")
    run(dataset, tmp_path / "run", tmp_path, config, recipe, resume=True, backend="dense")
    assert same(weights_before, weights(tmp_path / "run"))
    after = [(tmp_path / "run" / name).read_text() for name in ("config.json", "calibration.json")]
    assert after[0] == before[0]
    kept = [json.loads(text)["calibration"] for text in (before[1], after[1])]
    assert kept[0] == kept[1]
