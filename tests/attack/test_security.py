"""What a hostile file or name may not do: run a program, leave its folder, call home."""

from __future__ import annotations

import ast
import json
import shutil
import socket
from pathlib import Path

import pytest
import torch

from rlr_fast.models.authors import load_reconstructors
from rlr_fast.models.backbone import Backbone
from rlr_fast.models.backbone_weights import BackboneWeightsError
from tests.attack.hostile import Program, hostile_pickles
from tests.attack.lab import SCORING, Lab, call, picture, quick

ROOT = Path(__file__).parents[2]
PACKAGE = [*(ROOT / "rlr_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]


def dangers(source: str) -> list[str]:
    """Return the calls in a source that may run what a file holds, or a shell."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            bad = {"pickle", "marshal", "shelve", "dill", "joblib", "subprocess"}
            found += [name for name in names if name.partition(".")[0] in bad]
        if not isinstance(node, ast.Call):
            continue
        name, keywords = (
            ast.unparse(node.func),
            {k.arg: ast.unparse(k.value) for k in node.keywords},
        )
        is_load = name in ("torch.load", "load") and keywords.get("weights_only") != "True"
        is_numpy = name.endswith("np.load") and keywords.get("allow_pickle", "False") != "False"
        # `yaml.compose` reads names and values, and makes no objects of them.
        harmless = ("yaml.safe_load", "yaml.safe_dump", "yaml.compose")
        is_yaml = name.startswith("yaml.") and name not in harmless
        if is_load or is_numpy or is_yaml or name in ("eval", "exec", "os.system", "os.popen"):
            found.append(ast.unparse(node))
    return found


def test_nothing_in_the_package_runs_what_a_file_holds():
    assert len(PACKAGE) > 100
    assert {str(p): d for p in PACKAGE if (d := dangers(p.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "import pickle",
        "from subprocess import run",
        "yaml.load(text)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "os.system(text)",
    ],
)
def test_a_danger_is_seen(source):
    assert dangers(source)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with quick():
        yield Lab(tmp_path_factory.mktemp("security") / "lab")


def test_no_checkpoint_of_the_authors_runs_a_program(tmp_path):
    path, ran = tmp_path / "authors.pth", tmp_path / "ran"
    refused = 0
    for make in hostile_pickles(ran):
        path.write_bytes(make())
        try:
            load_reconstructors(path, windows=[3], heads=2)
        except ValueError as error:
            assert "authors.pth" in str(error)
            refused += 1
    assert not ran.exists() and refused == len(hostile_pickles(ran)) - 1  # the first is sound


def test_no_file_of_backbone_weights_runs_a_program(tmp_path):
    ran = tmp_path / "ran"
    torch.save({"state_dict": Program(ran)}, tmp_path / "weights.pth")
    with pytest.raises(BackboneWeightsError, match=r"weights\.pth"):
        Backbone("tf_efficientnet_lite0", str(tmp_path / "weights.pth"), image_size=(32, 32))
    assert not ran.exists()


HOSTILE = (
    "=cmd|' C calc'!A0",
    "<img src=x onerror=alert(1)>",
    "$(touch ran)",
    "`touch ran`; touch ran",
    "-rf",
    "..hidden",
    "a\nb",
    "%s{0}",
    "@SUM(1)",
    "con",
)


def below(folder: Path) -> set[Path]:
    return {p.relative_to(folder) for p in folder.rglob("*")}


def test_names_of_files_and_classes_stay_in_the_folder_of_results(lab, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, out = tmp_path / "data", tmp_path / "out"
    for name in HOSTILE:
        for part in ("test/good", f"test/{name}"):
            (data / name / part).mkdir(parents=True, exist_ok=True)
            picture(1).save(data / name / part / f"{name}.png")
    before = below(tmp_path)
    words = ["--checkpoint", lab.run, "--out", out, *SCORING, "--report"]
    for argv in (["eval", data, *words, "--figures"], ["predict", data, *words]):
        verdict = call(*argv)
        assert verdict.fault is None and verdict.code == 0, verdict
    assert {p for p in below(tmp_path) - before if p.parts[0] != "out"} == set()
    cells = (out / "results.csv").read_text().splitlines()
    assert not [cell for cell in cells if cell.startswith(("=", "@", "+", "-"))]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in page


def test_a_table_of_images_does_not_write_elsewhere(lab, tmp_path):
    data = tmp_path / "data"
    (data / "split_csv").mkdir(parents=True)
    picture(1).save(data / "a.png")
    for name in ("../../outside", str(tmp_path / "outside"), "a/../../../outside"):
        rows = f"object,split,label,image,mask\n{name},test,normal,a.png,\n"
        (data / "split_csv/1cls.csv").write_text(rows)
        words = ["--checkpoint", lab.run, "--out", tmp_path / "out/here", *SCORING, "--figures"]
        verdict = call("eval", data, *words)
        assert verdict.code == 2 and "object must be a name without a path" in verdict.err
    assert not list(tmp_path.rglob("outside*")) and not list(lab.root.parent.rglob("outside*"))


def test_nothing_leaves_the_machine(lab, tmp_path, monkeypatch):
    """With local weights; names of other machines are not even looked up."""
    tried = []

    def refuse(*arguments, **_):
        tried.append(arguments)
        raise OSError("no connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    words = ["--checkpoint", lab.run, "--out", tmp_path / "out", *SCORING, "--report"]
    lab.must(*lab.train(tmp_path / "run"))
    lab.must("eval", lab.data, *words, "--figures")
    lab.must("predict", lab.data, *words)
    lab.must("calibrate", lab.data, "--split", "test", "--checkpoint", tmp_path / "run", *SCORING)
    assert tried == []
    # A run that asks for the hub's weights does ask: the test can fail.
    shutil.copytree(lab.run, tmp_path / "hub")
    config = json.loads((tmp_path / "hub/config.json").read_text()) | {"backbone_weights": "timm"}
    (tmp_path / "hub/config.json").write_text(json.dumps(config))
    words[1] = tmp_path / "hub"
    assert call("predict", lab.data, *words).code == 2 and tried
