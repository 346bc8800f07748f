"""What is installed: every package of the source tree, each named in pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def test_every_package_is_named():
    listed = re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    assert listed is not None
    named = set(re.findall(r'"([\w.]+)"', listed[1]))
    found = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for file in (ROOT / "rlr_fast").rglob("__init__.py")
    }
    # The link rlr_fast/kernels is not followed.
    found |= {
        ".".join(("rlr_fast", *file.parent.relative_to(ROOT).parts))
        for file in (ROOT / "kernels").rglob("__init__.py")
    }
    assert named == found


def test_every_file_that_a_package_reads_is_installed():
    text = (ROOT / "pyproject.toml").read_text()
    table = re.search(r"^\[tool.setuptools.package-data\]\n(.*?)\n\n", text, re.M | re.S)
    assert table is not None
    patterns = {
        ROOT / package.replace(".", "/"): re.findall(r'"([^"]+)"', values)
        for package, values in re.findall(r'^"?([\w.]+)"? = \[(.*)\]', table[1], re.M)
    }
    listed = {file for folder, globs in patterns.items() for g in globs for file in folder.glob(g)}
    others = {
        file
        for file in (ROOT / "rlr_fast").rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc", ".md")
    }
    assert others == listed


@pytest.mark.parametrize(
    ("system", "machine", "wanted"),
    [
        ("Linux", "x86_64", True),
        ("Linux", "aarch64", True),  # GH200, GB200
        ("Linux", "ppc64le", False),
        ("Darwin", "arm64", False),
        ("Windows", "AMD64", False),
    ],
)
def test_triton_is_wanted_where_it_has_wheels(system, machine, wanted):
    text = (ROOT / "pyproject.toml").read_text()
    (line,) = re.findall(r'^  "(triton>=[^"]*)",$', text, re.M)
    marker = Requirement(line).marker
    assert marker is not None
    assert marker.evaluate({"platform_system": system, "platform_machine": machine}) == wanted
