"""Export: files that say what the model says, and files that are refused because they do not."""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tree, save_picture
from PIL import Image
from training_cases import run_record

from rlr_fast import RLRConfig, RLRModel
from rlr_fast.cli import main
from rlr_fast.data import iterate_images
from rlr_fast.export import export as module
from rlr_fast.export.compare import compare, model_outputs
from rlr_fast.export.formats import halve
from rlr_fast.export.graph import ExportGraph, describe
from rlr_fast.export.images import comparison_images, run_images
from rlr_fast.export.runtimes import Runtime, openvino_model
from rlr_fast.files import LOCK_FILE
from rlr_fast.inference.calibrate import calibrate
from rlr_fast.inference.decisions import Decider
from rlr_fast.training.calibration import read_calibration

EXAMPLE = Path(__file__).parents[2] / "docs" / "onnx_example.py"
CONFIG = RLRConfig(
    backbone="test_efficientnet",
    backbone_weights="random",
    out_indices=(1, 2),
    image_size=(48, 64),
    components=(6, 0),
    hidden=(16, 32),
    heads=(2, 4),
    windows=(3, (3, 5)),
    blocks=1,
    uncertainty=0.5,
    top_share=0.01,
    surround=16.0,
    image_surround=8.0,
)
ALPHA = ["--alpha", "0.2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set, and a run of it with and one without a calibration."""
    root = tmp_path_factory.mktemp("export")
    data = make_tree(root / "data")
    torch.manual_seed(0)
    model = RLRModel(CONFIG).eval()
    for level in model.uncertainty:  # as if it had been fitted
        torch.nn.init.normal_(level.network[-1].weight, std=0.1)
        level.limit.fill_(1.0)
    for name in ("run", "bare"):
        model.save_pretrained(root / name)
        (root / name / "run.json").write_text(run_record(data, ["bolt", "cloth"]))
    images = {name: sorted((data / name / "train/good").iterdir()) for name in ("bolt", "cloth")}
    maxima = {name: {"max": 1.0 + i} for i, name in enumerate(images)}
    image = {"max": 2.0, "classes": maxima}
    (root / "run" / "calibration.json").write_text(
        json.dumps({"pixel": {"0.5": 1, "0.999": 2}, "image": image})
    )
    calibrate(model, images, root / "run", None, source="here")
    return root


@pytest.fixture(scope="module", autouse=True)
def _traced_once():
    """Trace each graph once: it takes longer than all else."""
    trace = ExportGraph.trace
    with pytest.MonkeyPatch.context() as patch:
        programs = {}

        def traced(graph):
            key = (graph.decides, graph.input_size, graph.model.backend)
            if key not in programs:
                programs[key] = trace(graph)
            return programs[key]

        patch.setattr(ExportGraph, "trace", traced)
        yield


@pytest.fixture(scope="module")
def onnx_file(folder):
    """The run as an ONNX file, written by the command."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    out = folder / "model.onnx"
    assert main(["export", str(folder / "run"), "--to", "onnx", "--out", str(out), *ALPHA]) == 0
    return out


def refused(capsys, *argv):
    """Run a command that must fail; return its message, which is a line."""
    assert main(["export", *map(str, argv)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("rlr-fast: error: ") and message.count("\n") == 1
    return message


def predicted(run, files, out, *argv):
    """Return the rows that the package's own prediction writes, by path."""
    argv = ["predict", *map(str, files), "--checkpoint", str(run), "--out", str(out), *argv]
    assert main([*argv, "--no-pictures", "--device", "cpu", "--quiet"]) == 0
    with open(out / "results.csv", encoding="utf-8") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def test_the_example_reproduces_a_prediction_without_the_package(onnx_file, folder, tmp_path):
    for i in range(6):  # files of other sizes than the model's
        save_picture(tmp_path / f"new/{i}.png", 70 + i, (31 + 40 * i, 90))
    files = [*sorted((tmp_path / "new").iterdir()), *(folder / "data/bolt/test/hole").iterdir()]
    kinds = set()
    for flags, word in ((["--class", "bolt"], ["bolt"]), ([], [])):
        rows = predicted(folder / "run", files, tmp_path / "out", *ALPHA, *flags)
        done = subprocess.run(
            [sys.executable, EXAMPLE, onnx_file, *word, *files],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={},
        )
        assert done.returncode == 0, done.stderr
        lines = list(csv.reader(done.stdout.splitlines()))
        assert len(lines) == len(files)
        for path, score, p_value, decision, area in lines:
            row = rows[path]
            if word or row["class"] == "":
                assert float(score) == pytest.approx(float(row["score"]), abs=1e-4)
                assert float(p_value) == pytest.approx(float(row["p_value"]), abs=1e-6)
                assert decision == row["decision"]
                assert float(area) == pytest.approx(float(row["area"]), abs=1e-3)
                kinds.add(decision)
    assert kinds == {"normal", "anomalous"}


def test_the_example_refuses_what_it_would_score_otherwise(onnx_file, folder, tmp_path):
    Image.new("RGBA", (64, 48)).save(tmp_path / "rgba.png")
    Image.new("RGB", (64, 48)).save(tmp_path / "rgb.png", transparency=(0, 0, 0))
    (tmp_path / "text.png").write_text("text")
    for name, told in (("rgba", "mode RGBA;"), ("rgb", "mode RGB and a clear color;")):
        files = [str(tmp_path / f"{file}.png") for file in ("text", name)]
        command = [sys.executable, str(EXAMPLE), str(onnx_file), *files]
        done = subprocess.run(command, capture_output=True, text=True, env={})
        lines = done.stderr.splitlines()
        assert done.returncode == 1 and len(lines) == 2
        assert "cannot identify image" in lines[0] and f"pixels of {told}" in lines[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "MODEL.onnx [CLASS] IMAGES"), (["bolt"], "no image: []"), (["nut"], "no image: ['nut']")],
    ids=["nothing", "no-image", "no-class"],
)
def test_the_example_tells_what_it_lacks(onnx_file, tmp_path, words, message):
    command = [sys.executable, str(EXAMPLE), str(onnx_file), *words]
    done = subprocess.run(command, capture_output=True, text=True, env={}, cwd=tmp_path)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_the_example_takes_no_picture_for_a_tile(onnx_file, tmp_path):
    import onnx

    config = dataclasses.replace(CONFIG, tile=(96, 128), overlap=(8, 16))
    about = json.loads(describe(RLRModel(config), None, ["bolt"]))
    assert (about["tile"], about["overlap"]) == ([96, 128], [8, 16])
    model = onnx.load(onnx_file)
    onnx.helper.set_model_props(model, {"rlr_fast": json.dumps(about)})
    onnx.save(model, tmp_path / "tiles.onnx")
    for size, returncode in (((64, 48), 1), ((128, 96), 0)):
        Image.new("RGB", size).save(tmp_path / "picture.png")
        command = [sys.executable, str(EXAMPLE), "tiles.onnx", "picture.png"]
        done = subprocess.run(command, capture_output=True, text=True, env={}, cwd=tmp_path)
        assert done.returncode == returncode, done.stderr
        assert ("the file takes tiles of [96, 128]" in done.stderr) == bool(returncode)


def test_an_onnx_file_is_small_and_of_standard_operators(onnx_file):
    import onnx

    model = onnx.load(onnx_file)
    onnx.checker.check_model(model, full_check=True)
    assert [(part.domain, part.version) for part in model.opset_import] == [("", 18)]
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Softmax") == 4  # two attentions a level, each in one call
    assert not {"Range", "Abs", "LessOrEqual"} & set(kinds)  # of masks, which are constants
    assert len(kinds) < 260
    assert str(Path(__file__).parents[2]).encode() not in onnx_file.read_bytes()


def test_an_onnx_file_says_what_it_is(onnx_file, folder):
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_file)
    about = json.loads(session.get_modelmeta().custom_metadata_map["rlr_fast"])
    model = RLRModel.from_pretrained(folder / "run")
    assert about["model"].items() >= model.score_identity().items()
    assert about["backbone_fingerprint"] == model.backbone.fingerprint
    assert about["image_size"] == [48, 64] and about["alpha"] == 0.2
    assert about["classes"] == ["bolt", "cloth"]
    decider = Decider(read_calibration(folder / "run"), 0.2)
    rules = [decider.rule(name) for name in ("bolt", "cloth", None)]
    assert about["thresholds"] == [
        {"class": rule.name, "score": rule.threshold, "pixel": rule.pixel_threshold}
        for rule in rules
    ]
    [entry] = session.get_inputs()
    assert (entry.name, entry.shape, entry.type) == (
        "images",
        ["batch", 48, 64, 3],
        "tensor(uint8)",
    )
    with pytest.raises(Exception, match="invalid dimensions"):
        session.run(None, {"images": np.zeros((1, 64, 64, 3), dtype=np.uint8)})


def change_weight(model):
    """Change a single number of the graph."""
    import onnx

    tensor = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.flat[7] += 3
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def plant_nan(model):
    import onnx

    for tensor in model.graph.initializer:
        if "calibration" not in tensor.name and tensor.dims[:1] == [32]:
            values = onnx.numpy_helper.to_array(tensor).copy()
            values.flat[0] = np.nan
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
            return


def lower_calibration(model):
    import onnx

    [tensor] = [t for t in model.graph.initializer if t.name == "calibration"]
    values = onnx.numpy_helper.to_array(tensor) - 100
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def use_unknown_operator(model):
    model.graph.node[0].op_type = "Unheard"


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (change_weight, "map within"),
        (plant_nan, "gives NaN, no scores at all"),
        (lower_calibration, "p-values or decisions are not those of their scores"),
        (use_unknown_operator, "cannot run the file, so it is not kept"),
    ],
)
def test_a_file_that_disagrees_is_not_kept(
    plant, message, onnx_file, folder, tmp_path, monkeypatch, capsys
):
    import onnx

    def write(program, kind, path, **options):
        model = onnx.load(onnx_file)
        plant(model)
        onnx.save(model, path)
        return 1

    monkeypatch.setattr(module, "write", write)
    monkeypatch.setattr(ExportGraph, "trace", lambda graph: None)
    argv = [folder / "run", "--to", "onnx", "--out", tmp_path / "a/model.onnx", *ALPHA]
    told = refused(capsys, *argv)
    assert "onnxruntime" in told and message in told
    assert list((tmp_path / "a").iterdir()) == []


def copy_of(file):
    def write(program, kind, path, **options):
        shutil.copy(file, path)
        return 1

    return write


@pytest.mark.parametrize("required", [True, False])
def test_openvino_refuses_a_file_and_its_default_precision_is_told(
    required, onnx_file, folder, tmp_path, monkeypatch, caplog, capsys
):
    def zeros(path):
        return lambda images: {
            "score_map": np.zeros((len(images), 48, 64)),
            "score": np.zeros(len(images)),
            "p_value": np.ones((len(images), 3)),
            "anomalous": np.zeros((len(images), 3), dtype=bool),
        }

    monkeypatch.setattr(module, "write", copy_of(onnx_file))
    monkeypatch.setattr(ExportGraph, "trace", lambda graph: None)
    monkeypatch.setattr(module, "runtimes", lambda kind: [Runtime("openvino", zeros, required)])
    out = tmp_path / "model.onnx"
    argv = [folder / "run", "--to", "onnx", "--out", out, *ALPHA]
    if required:
        told = refused(capsys, *argv)
        assert "openvino: map within 1.0e+00" in told and "or --opset 23" in told
    else:
        assert main(["export", *map(str, argv)]) == 0
        assert "openvino: map within 1.0e+00" in caplog.text
        assert "INFERENCE_PRECISION_HINT f32" in caplog.text
    assert out.exists() != required


def test_a_file_that_appears_meanwhile_is_kept(folder, tmp_path, monkeypatch, capsys, onnx_file):
    out = tmp_path / "model.onnx"

    def write(program, kind, path, **options):
        out.write_text("another's")
        return copy_of(onnx_file)(program, kind, path)

    monkeypatch.setattr(module, "write", write)
    monkeypatch.setattr(ExportGraph, "trace", lambda graph: None)
    told = refused(capsys, folder / "run", "--to", "onnx", "--out", out, *ALPHA)
    assert "exists already" in told and out.read_text() == "another's"
    assert list(tmp_path.iterdir()) == [out]


def test_a_model_stays_as_it_is_and_must_be_of_float32(small):
    model = RLRModel(small)
    images = torch.zeros(2, 3, *small.image_size, dtype=torch.uint8)
    for training in (True, False):
        model_outputs(model.train(training), images)
        assert model.training == training
    with pytest.raises(ValueError, match=r"must be of float32 to be exported, got torch\.float16"):
        ExportGraph(model.half(), None, [])


def test_a_full_disk_leaves_nothing(folder, tmp_path, monkeypatch, capsys):
    def write(program, kind, path, **options):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(module, "write", write)
    monkeypatch.setattr(ExportGraph, "trace", lambda graph: None)
    out = tmp_path / "model.pt2"
    told = refused(capsys, folder / "run", "--to", "torch", "--out", out, *ALPHA)
    assert "No space left" in told and str(out) in told
    assert list(tmp_path.iterdir()) == []


def test_a_program_of_pytorch(folder, tmp_path, capsys):
    out, extra = tmp_path / "model.pt2", {"rlr_fast.json": ""}
    images = sorted((folder / "data/bolt/train/good").iterdir())
    argv = ["export", str(folder / "run"), "--to", "torch", "--out", str(out), *ALPHA]
    assert main([*argv, "--images", *map(str, images[:1])]) == 0
    assert "decisions at alpha 0.2" in capsys.readouterr().out
    program = torch.export.load(out, extra_files=extra).module()
    assert json.loads(extra["rlr_fast.json"])["alpha"] == 0.2
    assert list(tmp_path.iterdir()) == [out]
    model = RLRModel.from_pretrained(folder / "run")
    [batch] = iterate_images(images, (48, 64), 5)
    expected, found = model(batch.images), program(batch.images.permute(0, 2, 3, 1))
    torch.testing.assert_close(found["score_map"], expected.score_map[:, 0])
    torch.testing.assert_close(found["score"], expected.score)
    with pytest.raises(AssertionError, match="Guard failed"):
        program(torch.zeros(1, 64, 64, 3, dtype=torch.uint8))


def test_a_run_without_calibration_has_no_decisions(folder, tmp_path, monkeypatch, capsys, caplog):
    def write(graph, kind, path, *, outputs, about, **options):
        assert json.loads(about)["alpha"] is None and json.loads(about)["thresholds"] == []
        found = graph(torch.zeros(3, 48, 64, 3, dtype=torch.uint8))
        assert outputs == list(found) == ["score_map", "score"]
        path.write_text("")
        return 1

    monkeypatch.setattr(module, "write", write)
    monkeypatch.setattr(ExportGraph, "trace", lambda graph: graph)
    monkeypatch.setattr(module, "runtimes", lambda kind: [])
    out = tmp_path / "model.pt2"
    assert main(["export", str(folder / "bare"), "--to", "torch", "--out", str(out)]) == 0
    assert "no decisions" in capsys.readouterr().out
    assert "not decided: " in caplog.text and "has no calibration" in caplog.text


def test_too_few_images_for_alpha_leave_decisions_out_unless_asked_for(
    folder, tmp_path, monkeypatch, capsys, caplog
):
    monkeypatch.setattr(module, "write", lambda *args, **options: args[2].write_text("") and 1)
    monkeypatch.setattr(ExportGraph, "trace", lambda graph: None)
    monkeypatch.setattr(module, "runtimes", lambda kind: [])
    words = [folder / "run", "--to", "torch", "--out", tmp_path / "model.pt2"]
    assert "possible is --alpha" in refused(capsys, *words, "--alpha", "0.05")
    assert main(["export", *map(str, words)]) == 0
    assert "no decisions" in capsys.readouterr().out and "possible is --alpha" in caplog.text


def test_what_a_kill_has_left_is_gone_and_two_do_not_write_one_file(
    folder, tmp_path, monkeypatch, capsys
):
    def write(*args, **options):
        assert [path.name for path in args[2].parent.iterdir()] == [LOCK_FILE]
        with pytest.raises(BlockingIOError), module._workshop(tmp_path / "model.pt2"):
            pass
        args[2].write_text("")
        return 1

    monkeypatch.setattr(module, "write", write)
    monkeypatch.setattr(ExportGraph, "trace", lambda graph: None)
    monkeypatch.setattr(module, "runtimes", lambda kind: [])
    left = tmp_path / ".model.pt2.partial"
    left.mkdir()
    (left / "model.pt2").write_text("half")
    words = [str(folder / "run"), "--to", "torch", "--out", str(tmp_path / "model.pt2")]
    assert main(["export", *words]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]


def test_openvino(folder, tmp_path, capsys):
    for package in ("onnx", "onnxscript", "openvino"):
        pytest.importorskip(package)
    out = tmp_path / "model.xml"
    argv = ["export", str(folder / "run"), "--to", "openvino", "--out", str(out), *ALPHA]
    assert main(argv) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"model.xml", "model.bin"}
    found = openvino_model(out)(np.zeros((3, 48, 64, 3), dtype=np.uint8))
    assert {name: value.shape for name, value in found.items()} == {
        "score_map": (3, 48, 64),
        "score": (3,),
        "p_value": (3, 3),
        "anomalous": (3, 3),
    }
    assert "openvino" in capsys.readouterr().out


def test_half_the_size_with_the_same_decisions(onnx_file, folder, tmp_path, capsys):
    out = tmp_path / "model.onnx"
    for i in range(40):
        save_picture(tmp_path / f"new/{i}.png", 200 + i, (48, 64))
    argv = ["export", str(folder / "run"), "--to", "onnx", "--half", "--out", str(out), *ALPHA]
    assert main([*argv, "--images", str(tmp_path / "new")]) == 0
    assert "rank correlation 0.999" in capsys.readouterr().out
    assert out.stat().st_size < 0.7 * onnx_file.stat().st_size
    import onnx

    constants = onnx.load(out).graph.initializer
    halves = {t.name for t in constants if t.data_type == onnx.TensorProto.FLOAT16}
    assert len(halves) > 10 and not any("calibration" in name for name in halves)


def test_what_scores_are_compared_with_and_what_float16_cannot_hold_stay_as_they_are():
    ir = pytest.importorskip("onnx_ir")
    numbers = {
        "calibration": np.linspace(0, 1, 2000, dtype=np.float32),
        "weight": np.linspace(0, 1, 2000, dtype=np.float32),
        "large": np.full(2000, 1e6, dtype=np.float32),
        "small": np.ones(3, dtype=np.float32),
    }
    constants = [ir.val(k, const_value=ir.tensor(v, name=k)) for k, v in numbers.items()]
    nodes = [ir.node("Neg", [constant]) for constant in constants]
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph([], outputs, nodes=nodes, initializers=constants, opset_imports={"": 23})
    halve(graph)
    assert set(graph.initializers) == {"calibration", "weight_half", "large", "small"}
    assert [node.op_type for node in graph] == ["Cast", "Neg", "Neg", "Neg", "Neg"]
    assert nodes[1].inputs[0].name == "weight_single"


@pytest.mark.parametrize(
    ("scores", "agrees"),
    [((1, 2, 3, 4), True), ((1, 2, 4, 3), False), ((1, 1, 1, 1), False), ((1, 2, 3, 5), False)],
    ids=["equal", "another order", "one score", "too far"],
)
def test_weights_in_half_precision_must_keep_the_order_of_images(scores, agrees):
    maps = np.ones((4, 2, 2), dtype=np.float32)
    expected = {"score_map": maps, "score": np.float32([1, 2, 3, 4])}

    def run(images):
        rows = images[:, 0, 0, 0]
        return {"score_map": maps[rows], "score": np.float32(scores)[rows]}

    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    result = compare("runtime", run, images, expected, half=True)
    assert result.agrees == agrees
    assert ("rank correlation" in str(result)) and (result.tolerance == 1e-2)


@pytest.mark.parametrize("pool", [False, True])
def test_decisions_are_those_of_the_rules_at_ties_too(pool, folder):
    calibration = read_calibration(folder / "run")
    decider = Decider(calibration, 0.34, pool, {"bolt": 1.25, "cloth": 0.7})
    graph = ExportGraph(RLRModel(CONFIG), decider, ["bolt", "cloth"])
    rules = [decider.rule(name) for name in ("bolt", "cloth", None)]
    ties = [score for scores in calibration.classes.values() for score in scores.image]
    score = torch.tensor([*ties, *(s + 0.01 for s in ties), -1.0, 1e6])
    graph.model.forward = lambda images: type(
        "Output", (), {"score_map": torch.zeros(len(score), 1, 48, 64), "score": score}
    )
    found = graph(torch.zeros(len(score), 48, 64, 3, dtype=torch.uint8))
    expected = np.stack([rule.p_values(score.numpy()) for rule in rules], 1)
    np.testing.assert_allclose(found["p_value"].numpy(), expected, rtol=1e-6)
    decided = [[rule.decide(float(s), np.zeros((1, 1))).anomalous for rule in rules] for s in score]
    assert found["anomalous"].tolist() == decided


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("nowhere --to torch --out OUT/a.pt2", "there is no checkpoint folder"),
        ("RUN --to onnx --out OUT/a.pt2", "--out must end in .onnx for --to onnx"),
        ("RUN --to torch --out OUT", "--out must end in .pt2 for --to torch"),
        ("RUN --to torch --out TAKEN", "exists already"),
        ("RUN --to torch --out TAKEN/b.pt2", "TAKEN"),
        ("RUN --to onnx --out OUT/a.onnx --opset 17", "--opset must be from 18 to 23, got 17"),
        ("RUN --to torch --out OUT/a.pt2 --opset 18", "--opset is of ONNX files"),
        ("RUN --to torch --out OUT/a.pt2 --half", "--half is of ONNX files and OpenVINO's IR"),
        (
            "RUN --to onnx --out OUT/a.onnx --half",
            "--half compares the order of at least 32 images",
        ),
        ("RUN --to torch --out OUT/a.pt2 --input-size 0", "--input-size must be from 1 to 65536"),
        ("RUN --to torch --out OUT/a.pt2 --input-size 9 9 9", "--input-size takes one side, or"),
        ("RUN --to torch --out OUT/a.pt2 --input-size 65536", "--input-size must be at most 671"),
        ("RUN --to torch --out OUT/a.pt2 --images nowhere", "there is no file or folder 'nowhere'"),
        ("RUN --to torch --out OUT/a.pt2 --alpha 0.01", "needs 99 calibration images"),
        ("BARE --to torch --out OUT/a.pt2 --alpha 0.2", "has no calibration"),
    ],
)
def test_a_mistake_is_a_line_before_any_work(argv, message, folder, tmp_path, capsys, monkeypatch):
    def none(*arguments):
        raise AssertionError("work was begun")

    monkeypatch.setattr(module, "model_outputs", none)
    (tmp_path / "taken.pt2").write_text("")
    places = {
        "RUN": folder / "run",
        "BARE": folder / "bare",
        "TAKEN": tmp_path / "taken.pt2",
        "OUT": tmp_path / "out",
    }
    for word, place in places.items():
        argv, message = argv.replace(word, str(place)), message.replace(word, str(place))
    assert message in refused(capsys, *argv.split())
    assert [path.name for path in tmp_path.iterdir()] == ["taken.pt2"]


def test_a_file_that_cannot_be_read_is_left_out_of_the_comparison(tmp_path, caplog):
    save_picture(tmp_path / "a.png", 0, (48, 64))
    (tmp_path / "b.png").write_bytes(b"no picture")
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    assert comparison_images(files, (48, 64)).shape == (1, 3, 48, 64)
    assert "left out of the comparison" in caplog.text and "b.png" in caplog.text
    with pytest.raises(OSError, match=r"b\.png"):
        comparison_images(files[1:], (48, 64))


def test_images_that_are_gone_are_asked_for(folder, tmp_path, capsys):
    shutil.copytree(folder / "bare", tmp_path / "run")
    (tmp_path / "run/run.json").unlink()
    argv = [tmp_path / "run", "--to", "torch", "--out", tmp_path / "a.pt2"]
    assert "does not say where its images are" in refused(capsys, *argv)
    (tmp_path / "run/run.json").write_text(run_record("/nowhere", ["bolt"]))
    assert "its images are no longer in /nowhere (" in refused(capsys, *argv)
    (tmp_path / "data/bolt/train/good").mkdir(parents=True)  # folders without their images
    (tmp_path / "run/run.json").write_text(run_record(tmp_path / "data", ["bolt"]))
    told = refused(capsys, *argv)
    assert f"no longer in {tmp_path}/data" in told and "name a few images" in told


def test_images_of_other_classes_than_the_runs_are_not_compared(folder, tmp_path):
    shutil.copytree(folder / "bare", tmp_path / "run")
    data = make_tree(tmp_path / "data")
    (tmp_path / "run/run.json").write_text(run_record(data, ["bolt"]))
    found = run_images(tmp_path / "run")
    assert found and all(path.is_relative_to(data / "bolt") for path in found)


@pytest.mark.parametrize(
    ("kind", "file", "extra"), [("onnx", "a.onnx", "export"), ("openvino", "a.xml", "openvino")]
)
def test_a_missing_package_is_named_with_its_extra(
    kind, file, extra, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "onnx", None)
    told = refused(capsys, folder / "run", "--to", kind, "--out", tmp_path / file)
    assert "needs the package onnx" in told and f"'rlr_fast[{extra}]'" in told
