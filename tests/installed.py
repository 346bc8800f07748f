"""The package as it is installed: built, put where no checkout is, and each verb run there.

    python tests/installed.py FOLDER

builds the sdist and from it the wheel, checks what a package index would show, makes an empty
virtual environment in FOLDER, installs the wheel with its extra ``demo``, and runs every verb, the
kernels' import and the demo there. The environment takes six gigabytes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE")

# What a user does with the package, in a process that finds it where it is installed.
USE = """
import sys
from pathlib import Path
import rlr_fast
where = Path(rlr_fast.__file__).resolve()
assert where.is_relative_to(sys.argv[1]), f"{where} is not what was installed"
from rlr_fast.cli import main

def run(words, code=0):
    found = main(words.split())
    assert found == code, f"rlr-fast {words} ended with {found}"

small = "--image-size 32 --backbone-weights random --quiet"
tiny = f"--preset tiny --blocks 1 --hidden 16 --heads 2 --windows 3 --batch-size 8 {small}"
run("data make data --size 64 --train 4 --classes washer wood")
run("data check data")
run(f"train data --out run --epochs 2 --cache-dir cache {tiny}")
run("calibrate data/wood/test/good --checkpoint run --class wood --quiet")
run("eval data --checkpoint run --out eval --report --figures --quiet")
run("predict data/wood/test --checkpoint run --out out --report --masks --alpha 0.3 --quiet")
run("predict data/wood/test --checkpoint run --out again --resume --no-pictures --quiet")
run("decoder train data --checkpoint run --out decoder.safetensors --epochs 1 --quiet")
run("figures data --checkpoint run --out figures --decoder decoder.safetensors --quiet")
run("info --checkpoint run")
run(f"paper perturbation data --out paper --seeds 1 --epochs 1 --cache-dir cache {tiny}")
for page in ("eval", "out"):
    text = Path(page, "report.html").read_text(encoding="utf-8")
    assert "<style>" in text and "function " in text, "the report lacks its scripts"
if sys.platform == "linux":
    import rlr_fast.kernels.lca, rlr_fast.kernels.mlka
print("the installed package works")
"""


def copy_sources(folder: Path) -> Path:
    """Copy what the package is built from: building writes beside it. Return the copy."""
    for name in SOURCES:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("rlr_fast", "kernels"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    return folder


def use(python: str | Path, where: Path, folder: Path, environment: dict[str, str]) -> None:
    """Run `USE` with the package in ``where``, in an empty folder."""
    folder.mkdir(parents=True)
    command = [python, "-c", USE, str(where.resolve())]
    subprocess.run(command, check=True, cwd=folder, env=environment)


def _run(*words: str | Path, cwd: Path | None = None) -> None:
    subprocess.run(words, check=True, cwd=cwd)


def main(argv: Sequence[str] | None = None) -> int:
    """Build, install and use the package."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder.resolve()
    sources = copy_sources(folder / "sources")
    tools, user = folder / "tools", folder / "user"
    for environment in (tools, user):
        _run(sys.executable, "-m", "venv", environment)
    _run(tools / "bin/pip", "install", "--quiet", "build", "twine")
    _run(tools / "bin/python", "-m", "build", "--outdir", folder / "dist", sources)
    built = sorted((folder / "dist").iterdir())
    _run(tools / "bin/twine", "check", "--strict", *built)
    [wheel] = (folder / "dist").glob("*.whl")
    _run(user / "bin/pip", "install", "--quiet", f"{wheel}[demo]")
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    use(user / "bin/python", user, folder / "verbs", clean)
    _run(user / "bin/rlr-fast", "demo", cwd=folder / "verbs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
