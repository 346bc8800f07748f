"""The tests, with the lowest and with the newest versions that ``pyproject.toml`` allows.

    python tests/bounds.py FOLDER [--lowest PYTHON3.10] [--newest PYTHON3.13] [-- OF PYTEST]

makes a virtual environment for each in FOLDER, unless one is there, runs pytest in both, and prints
a table of what ran. An environment takes six gigabytes; Python 3.11 or later runs the script.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import tomllib
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = [
    Requirement(text)
    for text in (
        *PROJECT["dependencies"],
        *PROJECT["optional-dependencies"]["test"],
        *PROJECT["optional-dependencies"]["export"],
    )
]
_VERSIONS = (
    "import importlib.metadata as m, json, platform, sys; "
    "print(json.dumps({'python': platform.python_version()} "
    "| {name: m.version(name) for name in sys.argv[1:]}))"
)


def lowest(requirements: list[Requirement]) -> list[str]:
    """Return each requirement with a lower bound as that very version."""
    return [
        f"{requirement.name}=={bound.version}"
        + (f"; {requirement.marker}" if requirement.marker else "")
        for requirement in requirements
        for bound in requirement.specifier
        if bound.operator == ">="
    ]


def make_environment(folder: Path, python: str, constraints: list[str]) -> None:
    """Make a virtual environment with the package and what its tests need."""
    subprocess.run([python, "-m", "venv", folder], check=True)
    file = folder / "constraints.txt"
    file.write_text("".join(f"{line}\n" for line in constraints), encoding="utf-8")
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--upgrade", "pip"], check=True)
    subprocess.run([*pip, "--constraint", file, "--editable", f"{ROOT}[test]"], check=True)


def run_tests(folder: Path, arguments: list[str]) -> tuple[str, bool]:
    """Run pytest; return the last line that it prints, and whether all is well."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [folder / "bin" / "python", "-m", "pytest", *arguments]
    last = ""
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    return last.strip("= "), process.returncode == 0


def versions(folder: Path) -> dict[str, str]:
    """Return the versions of Python and of every requirement in an environment."""
    names = [requirement.name for requirement in REQUIREMENTS if requirement.name != "rlr_fast"]
    command = [folder / "bin" / "python", "-c", _VERSIONS, *names]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> int:
    """Run the tests with both bounds; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--lowest", default="python3.10", metavar="PYTHON")
    parser.add_argument("--newest", default="python3.13", metavar="PYTHON")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest, after --")
    args = parser.parse_args()
    kinds = {"lowest": (args.lowest, lowest(REQUIREMENTS)), "newest": (args.newest, [])}
    table = {}
    for kind, (python, constraints) in kinds.items():
        folder = args.folder / kind
        if not (folder / "constraints.txt").exists():
            make_environment(folder, python, constraints)
        line, passed = run_tests(folder, args.pytest)
        table[kind] = versions(folder) | {"tests": line, "": "passed" if passed else "FAILED"}
    for name in table["lowest"]:
        print(f"{name:<35}" + "".join(f"{row[name]:<20}" for row in table.values()))
    return 0 if all(row[""] == "passed" for row in table.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
