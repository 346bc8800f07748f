"""What is stopped on the command line, by a signal, by memory or by another, and goes on."""

from __future__ import annotations

import os
import shutil
import signal
import time

import pytest
import torch
from cli_cases import FLAGS, refused

from rlr_fast.cli import main
from rlr_fast.files import lock_folder


def test_a_run_that_was_stopped_before_its_end_is_told(trained, tmp_path, capsys, caplog):
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    (run / "calibration.json").unlink()  # as training leaves it that is killed
    data, out = str(trained / "data"), str(tmp_path / "out")
    argv = ["--checkpoint", str(run), "--out", out, "--quiet"]
    for verb in (["eval"], ["predict", "--no-pictures"]):
        caplog.clear()
        assert main([*verb, data, *argv]) == 0
        assert f"{run} was not trained to its end" in caplog.text
    for words in (
        ("calibrate", data, "--split", "test", "--checkpoint", run),
        ("publish", run, "me/it", "--license", "mit", "--out", out),
    ):
        assert "finishes it with --resume" in refused(capsys, *words)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[x] DefaultCPUAllocator: can't allocate memory: 9 bytes")],
    ids=["numpy", "torch"],
)
def test_out_of_memory_says_what_needs_less(trained, tmp_path, capsys, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr("rlr_fast.models.rlr.RLRModel.tokens", full)
    argv = ("eval", trained / "data", "--checkpoint", trained / "run", "--out", tmp_path / "out")
    message = refused(capsys, *argv, "--quiet")
    assert "out of memory" in message and "a smaller --batch-size needs less" in message


def test_two_evaluations_do_not_work_in_one_folder(trained, tmp_path, capsys):
    argv = ("eval", trained / "data", "--checkpoint", trained / "run", "--out", tmp_path / "out")
    with lock_folder(tmp_path / "out"):
        assert "another process works in" in refused(capsys, *argv, "--quiet")


@pytest.mark.parametrize(
    ("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")]
)
def test_a_signal_that_meets_a_destructor_is_not_lost(
    trained, tmp_path, capsys, monkeypatch, number, word
):
    class Destroyed:
        def __del__(self):
            os.kill(os.getpid(), number)
            time.sleep(0.01)  # Python raises here what the signal means, and ignores it

    went_on = []

    def score(*_, **__):
        Destroyed()
        time.sleep(30)
        went_on.append(True)

    monkeypatch.setattr("rlr_fast.inference.evaluate.evaluate", score)
    argv = ["eval", str(trained / "data"), "--checkpoint", str(trained / "run"), "--quiet"]
    # A shell lets what it starts in the background ignore interruptions.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main([*argv, "--out", str(tmp_path)]) == 128 + number and not went_on
    finally:
        signal.signal(signal.SIGINT, before)
    told = capsys.readouterr().err
    assert word in told and "Traceback" not in told


def test_a_termination_is_told_as_an_interruption_is(trained, tmp_path, capsys, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)

    def end(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it went on")

    monkeypatch.setattr("rlr_fast.models.rlr.RLRModel.tokens", end)
    argv = ["train", str(trained / "data"), "--out", str(tmp_path / "run")]
    assert main([*argv, "--cache-dir", str(tmp_path), *FLAGS]) == 143
    assert "rlr-fast: terminated; --resume goes on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("verb", ["eval", "predict"])
def test_a_gpu_out_of_memory_says_what_needs_less(verb, trained, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr("rlr_fast.models.rlr.RLRModel.tokens", full)
    argv = (verb, trained / "data", "--checkpoint", trained / "run", "--out", tmp_path / "out")
    message = refused(capsys, *argv, "--quiet")
    assert "out of GPU memory" in message and "a smaller --batch-size needs less" in message
    assert len(message.splitlines()) == 1


def test_a_cache_out_of_gpu_memory_says_what_needs_less(trained, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("rlr_fast.models.rlr.RLRModel.tokens", full)
    places = ("--out", tmp_path / "run", "--cache-dir", tmp_path / "cache")
    message = refused(capsys, "train", trained / "data", *places, *FLAGS)
    assert "8 images of 32 x 32 pixels" in message and "smaller --image-size" in message
    assert list((tmp_path / "cache").iterdir()) == []


def test_resume_needs_no_settings(trained, capsys):
    arguments = ["train", str(trained / "data"), "--out", str(trained / "run"), "--resume"]
    assert main([*arguments, "--quiet", "--cache-dir", str(trained / "cache")]) == 0
    assert "already trained 2 epochs" in capsys.readouterr().out


def test_resume_takes_the_classes_of_the_run(trained, tmp_path, capsys, caplog):
    argv = ["train", str(trained / "data"), "--out", str(tmp_path / "run")]
    argv += ["--cache-dir", str(tmp_path / "cache")]
    assert main([*argv, "--classes", "cloth", *FLAGS]) == 0
    assert "steps of 4 images are few" in caplog.text
    caplog.clear()
    assert main([*argv, "--resume", "--quiet"]) == 0
    assert "are few" not in caplog.text  # no other number of epochs can be given any more
    message = refused(capsys, *argv, "--resume", "--classes", "bolt")
    assert "cannot be resumed with other settings" in message


def test_resume_with_another_preset_is_refused(trained, capsys):
    arguments = ["train", trained / "data", "--out", trained / "run", "--resume", "--quiet"]
    message = refused(capsys, *arguments, "--preset", "paper")
    assert "cannot be resumed with other settings: backbone was" in message


def test_resume_of_a_run_that_finished_no_epoch_takes_its_settings(trained, tmp_path, capsys):
    shutil.copytree(trained / "run", tmp_path / "run")
    for name in ("training_state.safetensors", "model.safetensors"):
        (tmp_path / "run" / name).unlink()
    places = ["--out", str(tmp_path / "run"), "--cache-dir", str(trained / "cache")]
    assert main(["train", str(trained / "data"), *places, "--resume", "--quiet"]) == 0
    assert "trained 2 epochs" in capsys.readouterr().out


def test_resume_of_nothing_says_that_a_new_run_begins(trained, tmp_path, caplog):
    places = ["--out", str(tmp_path / "run"), "--cache-dir", str(trained / "cache")]
    assert main(["train", str(trained / "data"), *places, "--resume", *FLAGS]) == 0
    assert f"there is no run in {tmp_path / 'run'} to resume; a new one begins" in caplog.text
    assert "begins, of the preset tiny" in caplog.text
