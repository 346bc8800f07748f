"""The flags of the command line: which there are, what is read from them, and what help says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from rlr_fast.cli import main
from rlr_fast.cli.export import To
from rlr_fast.cli.flags import Layout
from rlr_fast.cli.paper import TableName
from rlr_fast.cli.verbs import VERBS, build_app
from rlr_fast.data import LAYOUTS
from rlr_fast.export.formats import FORMATS
from rlr_fast.paper import TABLES

ROOT = Path(__file__).parents[2]

MODEL = """--backbone --backbone-weights --out-indices --image-size --tile --overlap
    --neighborhood --standardize
    --no-standardize --components --hidden --heads --windows --patches --blocks --ffn-ratio
    --attention --residual --no-residual --alpha --fusion --references --diversity --perturbation
    --uncertainty --smoothing --surround --image-surround --top-share --align-corners
    --no-align-corners --level-offsets --level-weights"""
RECIPE = """--epochs --batch-size --optimizer --lr --schedule --clip-grad --loss-power --precision
    --seed --score-fit --calibration-share"""
MACHINE = "--device --backend --workers --quiet"
DATA = "--layout --classes --config"
TRAINING = f"""{MODEL} {RECIPE} {MACHINE} {DATA} --preset --out --cache --cache-dir --compile
    --grad-checkpointing --micro-batch-size --piece"""
INFERENCE = "--checkpoint --backbone-weights --batch-size --precision --compile"
SCORING = f"{MACHINE} {INFERENCE} --config --out --scale --alpha --pool --report"
# Every flag that a command or a file in use may hold: none of them may go, or change its name.
FLAGS = {
    "demo": f"{MACHINE} --config --out --seed",
    "data check": f"{DATA} --image-size --workers",
    "data make": "--config --size --seed --classes --train --quiet",
    "train": f"{TRAINING} --resume",
    "eval": f"{SCORING} {DATA} --figures --per-defect --tile --overlap",
    "calibrate": f"{MACHINE} {INFERENCE} {DATA} --split --class --tile --overlap",
    "predict": f"""{SCORING} --no-pictures --tile --overlap --class --masks --fail-on-anomaly
        --resume --watch --settle""",
    "publish": "--license --results --picture --backbone-weights --private --out --config",
    "export": """--to --out --images --alpha --pool --opset --input-size --half
        --backbone-weights --config""",
    "decoder train": f"""{MACHINE} {DATA} --checkpoint --out --backbone-weights --epochs
        --batch-size --lr --seed""",
    "figures": f"""{MACHINE} {DATA} --checkpoint --out --backbone-weights --decoder --level
        --per-defect""",
    "paper": f"{TRAINING} --seeds --only",
    "info": f"{MODEL} --device --backend --config --preset --checkpoint --json",
}
NEEDED = {
    "demo": "",
    "data check": "DATA",
    "data make": "OUT",
    "train": "DATA --out RUN",
    "eval": "DATA --checkpoint RUN --out OUT",
    "calibrate": "DATA --checkpoint RUN",
    "predict": "IMAGES --checkpoint RUN --out OUT",
    "publish": "RUN OWNER/NAME --license MIT",
    "export": "RUN --to onnx --out OUT",
    "decoder train": "DATA --checkpoint RUN --out OUT",
    "figures": "DATA --checkpoint RUN --out OUT",
    "paper": "3 DATA --out OUT",
    "info": "",
}


def call(*argv):
    """Return the values that a command gives to the function of its verb."""
    _, bound, _ = build_app().parse_args([*argv], exit_on_error=False, print_error=False)
    bound.apply_defaults()
    return bound.arguments


@pytest.mark.parametrize("verb", FLAGS)
def test_a_verb_has_its_flags(verb):
    names = set()

    def look(_app, _words, arguments):
        names.update(name for argument in arguments for name in argument.names)

    app = build_app()
    app.config = look
    app.parse_args([*verb.split(), *NEEDED[verb].split()], exit_on_error=False, print_error=False)
    names = {name for name in names if name.startswith("--")}
    wanted = set(FLAGS[verb].split())
    assert wanted <= names
    # Beyond them, a flag that is on or off has only its opposite.
    assert all(name.replace("--no-", "--", 1) in wanted for name in names - wanted)


def test_every_verb_is_listed():
    assert {verb.name for verb in VERBS.values()} == FLAGS.keys() == NEEDED.keys()


@pytest.mark.parametrize("width", [80, 120])
def test_help_names_every_flag_within_the_width_and_loads_no_torch(width):
    code = """
import sys
from rlr_fast.cli import main
for verb in sys.argv[1:]:
    print("#", verb, flush=True)
    assert main([*verb.split(), "--help"]) == 0
assert "torch" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "", *FLAGS],
        capture_output=True,
        text=True,
        env={"COLUMNS": str(width), "PYTHONPATH": ":".join(sys.path), "PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0, done.stderr
    overview, *pages = re.split(r"^# .*\n", done.stdout, flags=re.MULTILINE)[1:]
    assert all(verb.split()[0] in overview for verb in FLAGS)
    assert max(map(len, done.stdout.splitlines())) <= width
    for verb, page in zip(FLAGS, pages, strict=True):
        missing = set(FLAGS[verb].split()) - set(re.findall(r"--[\w-]+", page))
        assert not missing, f"{verb}: {missing}"


def test_choices_are_those_of_the_library():
    assert get_args(get_args(Layout)[0]) == ("auto", *LAYOUTS)
    assert get_args(TableName) == tuple(TABLES)
    assert get_args(To) == tuple(FORMATS)


@pytest.mark.parametrize("file", ["README.md", *(ROOT / "docs").glob("*.md")], ids=str)
def test_the_commands_of_the_documentation_are_read(file):
    text = (ROOT / file).read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^(?:torchrun .*-m rlr_fast|(?:.*&& )?rlr-fast) (.*)$", text, re.M)
    for command in commands:
        words = command.partition("#")[0].split()
        if words and "VERB" not in words:
            call(*words)


def test_the_readme_shows_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {"train", "predict"} <= set(re.findall(r"^rlr-fast (\w+)", text, re.M))


def test_values_of_several_words():
    words = "--hidden 64 256 --windows 7 5x3 --image-size 256 128 --attention mlka --classes a b"
    given = call("train", "DATA", "--out", "RUN", *words.split(), "--alpha", "-1", "--residual")
    assert given["model"] == {
        "hidden": (64, 256),
        "windows": ((7, 7), (5, 3)),
        "image_size": (256, 128),
        "attention": ("mlka",),
        "alpha": -1.0,
        "residual": True,
    }
    assert given["classes"] == ("a", "b")
    assert given["recipe"] == given["execution"] == {}
    assert call("train", "DATA", "--out", "RUN", "--image-size=64")["model"] == {
        "image_size": (64,)
    }
    paths = call(
        "predict", "a", "b", "--tile", "512x1024", "--scale", "-1", "2", *NEEDED["eval"].split()[1:]
    )
    assert [str(path) for path in paths["paths"]] == ["a", "b"]
    assert (paths["tile"], paths["scale"]) == ((512, 1024), (-1.0, 2.0))


def test_the_older_name_of_a_flag(tmp_path):
    (tmp_path / "flags.yaml").write_text("piece: 3\n")
    argv = ["train", "DATA", "--out", "RUN"]
    assert call(*argv, "--piece", "2")["execution"] == {"micro_batch_size": 2}
    argv += ["--config", str(tmp_path / "flags.yaml")]
    assert call(*argv)["execution"] == {"micro_batch_size": 3}
    assert call(*argv, "--micro-batch-size", "4")["execution"] == {"micro_batch_size": 4}


def test_a_file_of_flags(tmp_path):
    (tmp_path / "flags.yaml").write_text(
        "out: RUN\nimage_size: 64\nwindows: [3, [3, 5], 3x5]\ngrad-checkpointing: true\n"
        "residual: false\nlr: 1e-3\nclasses: bolt\nepochs: 7\nout-indices: [[2, 3, 4], 5, 6-7]\n"
    )
    argv = ["train", "DATA", "--config", str(tmp_path / "flags.yaml"), "--epochs", "9"]
    given = call(*argv, "--no-grad-checkpointing")
    assert str(given["out"]) == "RUN" and given["classes"] == ("bolt",)
    assert given["model"] == {
        "image_size": (64,),
        "out_indices": ((2, 3, 4), 5, (6, 7)),
        "windows": ((3, 3), (3, 5), (3, 5)),
        "residual": False,
    }
    assert given["recipe"] == {"lr": 1e-3, "epochs": 9}
    assert given["execution"] == {"grad_checkpointing": False}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("alfa: 5", "--config: unknown flag 'alfa'; did you mean 'alpha'?"),
        ("help: true", "--config: unknown flag 'help'"),
        ("config: more.yaml", "--config: unknown flag 'config'"),
        ("epochs: 3.5", "must be a whole number, got '3.5'"),
        ("epochs: [1, 2]", "--config: --epochs takes one value, got [1, 2]"),
        ("epochs:", "--config: --epochs takes one value, got None"),
        ("hidden: []", "--config: --hidden takes one value or more, got []"),
        ("hidden: [64, many]", "for --hidden: must be a whole number, got 'many' (from --config "),
        ("out-indices: [[2, 4], 5]", "out_indices must be levels, or consecutive ones"),
        ("out-indices: [[2, b], 5]", "--config: --out-indices: a mean is of levels, got [2, 'b']"),
        ("residual: 2", "--config: --residual is true or false, got 2"),
        ("fusion: lerned", 'Did you mean "learned"?'),
        ("alpha: {a: 1}", "'alpha' must be a value, or a list of values"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(content, message, tmp_path, capsys):
    (tmp_path / "flags.yaml").write_text(content)
    argv = ["train", "DATA", "--out", "RUN", "--config", str(tmp_path / "flags.yaml")]
    assert main(argv) == 2
    told = capsys.readouterr().err
    assert told.startswith("rlr-fast: error: ") and message in told
    assert told.endswith(" See rlr-fast train --help.\n") and told.count("\n") == 1


def test_a_file_that_cannot_be_read_is_named(tmp_path, capsys):
    (tmp_path / "latin.yaml").write_bytes(b"device: caf\xe9")
    for name, message in [("none.yaml", "No such file"), ("latin.yaml", "is not UTF-8 text")]:
        assert main(["info", "--config", str(tmp_path / name)]) == 2
        told = capsys.readouterr().err
        assert name in told and message in told and told.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("trian DATA", 'Did you mean "train"?'),
        ("data chek DATA", 'Did you mean "check"?'),
        ("train --out RUN", "DATA is needed."),
        ("train DATA", "--out is needed."),
        ("train DATA --out", "--out requires an argument."),
        ("predict A --out B --class -x", "A value that begins with '-' is given as --class=-x."),
        ("train DATA --out RUN --classes -x", "is given as --classes=-x."),
        ("info --windows 4", "windows must be odd and positive, got windows=(4, 4)"),
        ("train DATA more --out RUN", "unexpected argument 'more'."),
        ("train DATA --out RUN --quite", "Unknown option: --quite. Did you mean --quiet?"),
        ("train DATA --out RUN --epoch 3", "Unknown option: --epoch. Did you mean --epochs?"),
        ("train DATA --out RUN --epochs 3.5", "must be a whole number, got '3.5'"),
        (
            "train DATA --out RUN --image-size 64x128",
            "or height and width such as 512 1024, got '64x",
        ),
        ("train DATA --out RUN --alpha 1 --alpha 2", "--alpha is given twice"),
        ("train DATA --out RUN --residual --no-residual", "--residual is given twice"),
        (
            "train DATA --out RUN --piece 1 --micro-batch-size 2",
            "--micro-batch-size is given twice",
        ),
        ("train DATA --out RUN --windows 3x5x7", "must be a side, or height x width"),
        ("train DATA --out RUN --heads 8 a", "for --heads: must be a whole number, got 'a'"),
        ("train DATA --out RUN --hidden", "--hidden"),
        ("train DATA --out RUN --attention mlka lcaa", 'Did you mean "lca"?'),
        ("paper 6 DATA --out OUT", 'Choose from: "1", "2"'),
        ("predict --checkpoint RUN --out OUT", "IMAGES is needed."),
        ("eval DATA --checkpoint RUN --out OUT --per-defect 0", "at least 1, got '0'"),
        ("eval DATA --checkpoint RUN --out OUT --scale 1", "--scale requires 2"),
    ],
)
def test_a_mistyped_command_is_one_line(command, message, capsys):
    assert main(command.split()) == 2
    told = capsys.readouterr().err
    assert told.startswith("rlr-fast: error: ") and message in told and told.count("\n") == 1


def test_a_mistake_is_told_by_one_process_of_a_machine(monkeypatch, capsys):
    monkeypatch.setattr("rlr_fast.cli.messages._AFTER_PEER", 0)
    argv = ["train", "DATA", "--out", "RUN", "--alfa", "3"]
    told = []
    for rank in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert main(argv) == 2
        told.append(capsys.readouterr().err)
    assert "--alfa" in told[0] and told[1:] == ["", ""]


def test_a_traceback_on_request(monkeypatch):
    monkeypatch.setenv("RLR_FAST_TRACEBACK", "1")
    with pytest.raises(Exception, match="--alfa"):
        main(["train", "DATA", "--out", "RUN", "--alfa", "3"])
    with pytest.raises(ValueError, match="nowhere"):
        main(["data", "check", "nowhere"])


def test_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"rlr-fast \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_names_of_the_package_are_loaded_when_they_are_used():
    code = """
import sys
import rlr_fast
assert "torch" not in sys.modules
assert set(rlr_fast.__all__) <= set(dir(rlr_fast))
assert all(getattr(rlr_fast, name).__name__ == name for name in rlr_fast.__all__)
assert not hasattr(rlr_fast, "RLRModell")
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
