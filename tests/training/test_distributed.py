"""Two processes: shares that equal the whole, the same bits twice, and errors that end both."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import io
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  first of all: it asks for Triton's interpreter where there is no GPU
import pytest
import safetensors.torch
import torch
from conftest import SMALL, make_tree, save_picture

from rlr_fast import RLRConfig, RLRModel, TrainConfig, cli
from rlr_fast.config import InferenceExecution, TrainExecution
from rlr_fast.data import read_dataset
from rlr_fast.functional import unsupported_reason
from rlr_fast.inference.evaluate import evaluate
from rlr_fast.models.environment import choose_device
from rlr_fast.prediction.image_files import find_images
from rlr_fast.prediction.predict import predict
from rlr_fast.training import run_dir
from rlr_fast.training.calibration import color_scale
from rlr_fast.training.distributed import PeerError, Processes, processes
from rlr_fast.training.steps import Steps, number_seed, step_shares
from rlr_fast.training.train import train

CPU = torch.device("cpu")
MODEL = RLRConfig(
    backbone="tf_efficientnet_lite0",
    backbone_weights="random",
    out_indices=(2, 3),
    image_size=(32, 32),
    hidden=(16, 16),
    heads=(2, 2),
    windows=(3, 3),
    blocks=1,
    perturbation=0.0,
    standardize=True,
    components=(8, 0),
)
# All images in one step: their order does not matter, and there is no noise.
WHOLE = TrainConfig(epochs=3, batch_size=100, lr=1e-3)
STEPS = dataclasses.replace(WHOLE, epochs=4, batch_size=4)
NOISY = dataclasses.replace(MODEL, perturbation=2.0, uncertainty=0.5)
BROKEN = "cloth/train/good/002.png"  # the 8th of 11 training images, so in the second share


def flags(config: RLRConfig | TrainConfig) -> list[str]:
    words: list[str] = []
    values = config.to_dict() if isinstance(config, RLRConfig) else dataclasses.asdict(config)
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if value is None:  # which is what no flag means
            continue
        if isinstance(value, bool):
            words += [flag if value else flag.replace("--", "--no-", 1)]
        else:
            words += [flag, *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return words


# What each of the two processes does; torchrun starts this file.


def work(folder: Path) -> None:
    with processes() as group:
        rank = group.rank
        found: dict[str, object] = {}
        data = folder / "data"

        def run(name: str, *argv: object) -> None:
            """Run a command; the processes meet again behind it, so no error may hang one."""
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = cli.main([str(word) for word in argv])
            found[name] = (code, out.getvalue(), err.getvalue())
            group.all_gather(name)

        def train_argv(out: str, model: RLRConfig, recipe: TrainConfig, data: Path = data) -> list:
            argv = ["train", data, "--out", folder / out, *flags(model), *flags(recipe)]
            # No file system in common: each process has a cache of its own.
            return [*argv, "--cache-dir", folder / f"cache{rank}", "--device", "cpu", "--quiet"]

        run("whole", *train_argv("whole", MODEL, WHOLE))
        run("steps", *train_argv("steps", NOISY, STEPS))
        run("again", *train_argv("again", NOISY, STEPS))
        run("single", *train_argv("single", MODEL, dataclasses.replace(WHOLE, batch_size=1)))

        write, written = run_dir.write_tensors, []

        def full(path: Path, *arguments: Any) -> None:
            written.append(path)
            if len(written) == 3:  # two a checkpoint, so in the second
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(path, *arguments)

        run_dir.write_tensors = full
        run("full disk", *train_argv("resumed", NOISY, STEPS))
        run_dir.write_tensors = write
        run("resumed", *train_argv("resumed", NOISY, STEPS), "--resume")

        evaluated = ["--out", folder / "eval", "--device", "cpu", "--quiet", "--figures"]
        run("eval", "eval", data, "--checkpoint", folder / "whole", *evaluated)

        other = folder / ("single" if rank == 1 else "whole")
        run("other weights", "eval", data, "--checkpoint", other, *evaluated)

        (folder / "cache is a file").touch()
        argv = train_argv("no cache", MODEL, WHOLE)
        if rank == 1:
            argv[argv.index("--cache-dir") + 1] = folder / "cache is a file/x"
        run("no cache", *argv)
        run(
            "differ", *train_argv("differ", MODEL, dataclasses.replace(WHOLE, lr=(rank + 1) * 1e-3))
        )
        run("one image", *train_argv("one image", MODEL, WHOLE, folder / "data of one"))
        run("unreadable", *train_argv("unreadable", MODEL, WHOLE, folder / "unreadable data"))
        images = folder / "unreadable data"
        predicted = ["predict", images, "--device", "cpu", "--quiet", "--batch-size", 3]
        run("predict", *predicted, "--checkpoint", folder / "whole", "--out", folder / "predicted")
        if group.is_main:  # as two killed processes leave it, the second behind the first
            shutil.copytree(folder / "predicted", folder / "kept")
            lines = (folder / "kept/results.jsonl").read_text().splitlines(keepends=True)
            (folder / "kept/results.jsonl").write_text("".join(lines[:6]))
            (folder / "kept/parts").mkdir()
            (folder / "kept/parts/rows-2-0-2.jsonl").write_text("".join(lines[6:9] + lines[12:14]))
            (folder / "kept/parts/rows-2-1-2.jsonl").write_text(lines[9][:20])
        resumed = [
            *predicted,
            "--checkpoint",
            folder / "whole",
            "--out",
            folder / "kept",
            "--resume",
        ]
        run("resumed prediction", *resumed)
        run("other model", *predicted, "--checkpoint", other, "--out", folder / "other model")
        own = folder / f"own{rank}"
        run("no common folder", *predicted, "--checkpoint", folder / "whole", "--out", own)
        run("calibrate", "calibrate", data, "--checkpoint", folder / "whole")
        found["ddp"] = {b: ddp_difference(group, b) for b in ("tiled", "triton", "dense")}
        (folder / f"found{rank}.json").write_text(json.dumps(found))
        if rank == 1:
            os._exit(0)  # without a word
        try:
            group.all_gather("anybody there?")
        except PeerError as error:
            (folder / "lost.json").write_text(json.dumps([str(error), error.told]))


def ddp_difference(group: Processes, backend: str) -> float | None:
    """Largest difference of a gradient from one process with both images; None if it cannot run."""
    if unsupported_reason(backend, CPU) is not None:
        return None
    torch.manual_seed(0)
    # Triton takes heads of width 16 or more.
    model = RLRModel(dataclasses.replace(MODEL, heads=(1, 1)), backend=backend)
    images = torch.rand(2, 3, 32, 32)
    alone = copy.deepcopy(model)
    torch.stack([m.mean() for m in alone(images).level_maps]).sum().backward()
    shared = torch.nn.parallel.DistributedDataParallel(model)
    mine = images[group.rank :: group.world_size]
    torch.stack([m.mean() for m in shared(mine).level_maps]).sum().backward()
    pairs = zip(alone.levels.parameters(), model.levels.parameters(), strict=True)
    return max(float((a.grad - b.grad).abs().max() / a.grad.abs().max()) for a, b in pairs)


# What the test process makes of it.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder in which two processes did all of `work`."""
    folder = tmp_path_factory.mktemp("distributed")
    data = make_tree(folder / "data")
    save_picture(data / "cloth/train/good/005.png", 105)
    for i in range(2, 12):  # more than a batch of test images in a class
        save_picture(data / "bolt/test/good" / f"{i:03d}.png", 200 + i)
    (data / BROKEN).write_bytes(b"no image")
    make_tree(folder / "data of one", classes=("bolt",), train=1)
    for path in (make_tree(folder / "unreadable data") / "cloth/train/good").iterdir():
        path.write_bytes(b"no image")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    # torchrun's processes look for modules beside the script alone.
    tests = str(Path(__file__).parents[1])
    paths = os.pathsep.join(filter(None, (tests, os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    with subprocess.Popen(
        [*launcher, __file__, str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=300)  # a process that waits for ever
        finally:
            process.terminate()
    assert process.returncode == 0, output
    return folder


@pytest.fixture(scope="module")
def found(folder):
    return [json.loads((folder / f"found{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(folder):
    """A run of one process with all images in a step, on as many threads as torchrun gives."""
    execution = TrainExecution(device="cpu", cache_dir=folder / "cache")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the number of threads decides how features are rounded
    try:
        data = read_dataset(folder / "data")
        return train(MODEL, WHOLE, data, folder / "alone", execution, quiet=True)
    finally:
        torch.set_num_threads(threads)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def same_bits(one: Path, other: Path) -> bool:
    names = ("model.safetensors", "training_state.safetensors", "calibration.json")
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def stopped(found, name: str) -> str:
    """Both processes ended with code 2; return the one message."""
    assert [process[name][0] for process in found] == [2, 2]
    messages = [process[name][2] for process in found]
    assert sum(map(bool, messages)) == 1, messages
    return "".join(messages)


def test_all_images_in_one_step_give_the_weights_of_one_process(folder, alone):
    for name, value in weights(folder / "alone").items():
        torch.testing.assert_close(
            weights(folder / "whole")[name], value, atol=2e-5, rtol=2e-5, msg=name
        )
    rows = (folder / "whole/history.jsonl").read_text().splitlines()
    for row, expected in zip(map(json.loads, rows), alone.history, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_standardization_and_calibration_are_those_of_all_images(folder, alone):
    values = [json.loads((folder / n / "calibration.json").read_text()) for n in ("whole", "alone")]
    (whole, expected) = values
    assert whole["pixel"] == pytest.approx(expected["pixel"], rel=1e-4)
    assert whole["image"]["max"] == pytest.approx(expected["image"]["max"], rel=1e-4)
    assert whole["image"]["classes"].keys() == {"bolt", "cloth"}
    for name in ("standardize.0.mean", "standardize.1.std", "components.0.scale"):
        torch.testing.assert_close(
            weights(folder / "whole")[name], weights(folder / "alone")[name], rtol=1e-6, atol=1e-7
        )


def test_each_process_keeps_its_own_share(folder, found):
    def cached(root: str) -> set[tuple[int, int]]:
        metas = map(json.loads, (p.read_text() for p in (folder / root).glob("*/meta.json")))
        return {(meta["identity"]["files"], len(meta["failures"])) for meta in metas}

    # 11 images, one of them unreadable; and the set of which one class cannot be read.
    assert cached("cache0") == {(6, 0), (5, 2)} and cached("cache1") == {(5, 1), (5, 3)}


def test_an_unreadable_image_of_one_share_is_told_once(folder, found, alone):
    assert [process["whole"][0] for process in found] == [1, 0]
    assert found[0]["whole"][2].count("left out") == 1 and BROKEN in found[0]["whole"][2]
    assert found[1]["whole"][1:] == ["", ""]
    assert [failure.index for failure in alone.failures] == [7]


def test_the_same_run_twice_gives_the_same_bits(folder):
    assert same_bits(folder / "steps", folder / "again")
    assert weights(folder / "steps")["uncertainty.1.network.4.weight"].any()  # it was fitted


def test_a_full_disk_in_one_process_ends_both_and_resume_gives_the_same_bits(folder, found):
    message = stopped(found, "full disk")
    assert "No space left on device; the checkpoint of epoch 1 is intact" in message
    assert [process["resumed"][0] for process in found] == [1, 0]
    assert same_bits(folder / "resumed", folder / "steps")


def test_batches_smaller_than_the_number_of_processes_train(folder, found):
    rows = [json.loads(r) for r in (folder / "single/history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_metrics_of_two_processes_are_those_of_one(folder, found):
    model = RLRModel.from_pretrained(folder / "whole")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes: the number of threads decides the rounding
    expected = json.loads(evaluate(model, read_dataset(folder / "data")).to_json())
    torch.set_num_threads(threads)
    values = json.loads((folder / "eval/metrics.json").read_text())
    for part in ("mean", "classes", "protocol", "failures"):
        assert values[part] == expected[part]
    assert [process["eval"][0] for process in found] == [0, 0]
    assert "bolt" in found[0]["eval"][1] and found[1]["eval"][1] == ""
    assert {p.name for p in (folder / "eval/figures").iterdir()} == {"bolt.png", "cloth.png"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no cache", "cannot write the feature cache"),
        ("differ", "recipe lr is 0.001 in process 0 and 0.002 in process 1"),
        ("other weights", "digest of the weights is "),
        ("one image", "1 training image cannot be shared among 2 processes"),
        ("unreadable", "no training image of cloth can be read"),
        ("other model", "digest of the weights is "),
        ("calibrate", "rlr-fast calibrate works in one process; start it without torchrun"),
    ],
)
def test_an_error_ends_both_processes_with_one_message(folder, found, name, message):
    assert message in stopped(found, name)
    assert not (folder / name).exists()


def test_a_prediction_of_two_processes_has_the_rows_of_one(folder, found, tmp_path):
    model = RLRModel.from_pretrained(folder / "whole")
    images = find_images([folder / "unreadable data"]).classified(["bolt", "cloth"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    execution = InferenceExecution(batch_size=3)
    result = predict(model, images, tmp_path, color_scale(folder / "whole"), execution)
    torch.set_num_threads(threads)
    assert len(result.failures) == 5
    assert [process["predict"][0] for process in found] == [1, 0]  # files were left out
    assert "13 of 18 images scored" in found[0]["predict"][1]
    assert found[1]["predict"][1:] == ["", ""]
    for name in ("results.csv", "results.jsonl"):
        assert (folder / "predicted" / name).read_bytes() == (tmp_path / name).read_bytes()
    drawn = {p.relative_to(tmp_path) for p in tmp_path.rglob("*.png")}
    assert {p.relative_to(folder / "predicted") for p in folder.glob("predicted/**/*.png")} == drawn
    assert not (folder / "predicted/parts").exists()


def test_two_processes_go_on_with_a_prediction_that_was_stopped(folder, found):
    assert [process["resumed prediction"][0] for process in found] == [1, 0]
    for name in ("results.csv", "results.jsonl", "prediction.json"):
        assert (folder / "kept" / name).read_bytes() == (folder / "predicted" / name).read_bytes()


def test_processes_that_do_not_see_one_folder_are_refused(found):
    assert "all processes must see the same --out" in stopped(found, "no common folder")


def test_a_process_that_dies_without_a_word_ends_the_other(folder, found):
    message, told = json.loads((folder / "lost.json").read_text())
    assert message.startswith("lost contact with the other processes") and not told


def test_ddp_gives_the_gradients_of_one_process(found):
    for process in found:
        differences = {k: v for k, v in process["ddp"].items() if v is not None}
        assert {"tiled", "dense"} <= differences.keys()
        assert max(differences.values()) < 1e-4, differences


def test_another_number_of_processes_may_resume_and_is_told(folder, tmp_path, caplog):
    shutil.copytree(folder / "steps", tmp_path / "run")
    recipe = NOISY, STEPS, read_dataset(folder / "data"), tmp_path / "run"
    execution = TrainExecution(device="cpu", cache_dir=folder / "cache")
    with caplog.at_level(logging.WARNING):
        train(*recipe, execution, quiet=True, resume=True)
        assert "goes on with" not in caplog.text  # it was finished
        (tmp_path / "run/calibration.json").unlink()  # as training leaves it that is killed
        train(*recipe, execution, quiet=True, resume=True)
    assert caplog.text.count("begun by 2 process(es) and goes on with 1") == 1


# One process


@pytest.mark.parametrize(
    ("counts", "batch"),
    [([10], 4), ([6, 5], 4), ([5, 5, 4], 64), ([3, 3, 3], 2), ([100, 50], 6), ([1, 1], 1)],
    ids=["alone", "uneven", "one-step", "fewer-than-processes", "half-unreadable", "one-each"],
)
def test_steps_have_a_whole_batch_and_every_image_once(counts, batch):
    shares = [step_shares(counts, rank, batch) for rank in range(len(counts))]
    assert [sum(share) for share in shares] == counts
    total = sum(counts)
    steps = [min(batch, total - start) for start in range(0, total, batch)]
    assert [sum(step) for step in zip(*shares, strict=True)] == steps
    for count, share in zip(counts, shares, strict=True):
        assert all(abs(n - step * count / total) < 2 for n, step in zip(share, steps, strict=True))


def test_a_process_without_an_image_in_its_first_step_takes_it_in_fp16():
    class Last(Processes):
        """The last of eight, with the others' sums left out."""

        def all_reduce(self, tensor):
            pass

        def all_reduce_gradients(self, parameters):
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)

    model = RLRModel(SMALL).train()
    recipe = TrainConfig(precision="fp16", batch_size=4)
    steps = Steps(model, recipe, [50] * 8, Last(rank=7, world_size=8, local_world_size=8))
    assert steps.shares[0] == 0
    levels = zip(model.backbone.grids, model.backbone.channels, strict=True)
    losses, norms = steps.take(0, [torch.empty(0, h * w, c) for (h, w), c in levels])
    assert losses.isfinite().all() and norms.isfinite().all()


def test_processes_do_not_repeat_each_others_numbers():
    drawn = [
        tuple(torch.randint(2**31, (4,), generator=torch.Generator().manual_seed(seed)).tolist())
        for seed in (number_seed(0, rank, i) for rank in range(8) for i in range(-20, 20))
    ]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize(
    "command",
    ["demo", "data make d", "data check d", "calibrate p --checkpoint r", "info"],
)
def test_verbs_for_one_process_refuse_torchrun(command, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(command.split()) == 2
    assert "works in one process; start it without torchrun" in capsys.readouterr().err


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    return monkeypatch


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_takes_its_own_gpu(two_gpus, name):
    assert choose_device(name) == torch.device("cuda", 1)
    assert choose_device("cpu") == CPU


def test_one_gpu_for_several_processes_is_refused(two_gpus):
    with pytest.raises(ValueError, match="got 'cuda:0' for 2"):
        choose_device("cuda:0")
    two_gpus.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="got 3 processes for 2 GPUs"):
        choose_device("auto")


if __name__ == "__main__":
    work(Path(sys.argv[1]))
