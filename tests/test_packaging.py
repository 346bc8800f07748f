"""What is installed: every package of the source tree, each named in pyproject.toml."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import installed
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


def test_every_dependency_is_listed_with_its_license():
    text = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    table = text.split("| package | license | for |")[1].split("\n\n")[0]
    rows = [row.split("|")[1:3] for row in table.splitlines()[2:]]
    licenses = {re.split(r"[¹ ]", name.strip())[0]: license.strip() for name, license in rows}
    assert licenses.keys() == {r.name for r in requirements("dependencies")}
    assert all(licenses.values())
    of_extras = re.search(r"^With an extra: (.*?)\n\n", text, re.M | re.S)
    assert of_extras is not None
    named = set(re.findall(r"([a-z0-9_]+)¹? \(", of_extras[1]))
    extras = ("anomalib", "demo", "export", "openvino")
    assert named == {r.name for extra in extras for r in requirements(extra)} - {"rlr_fast"}


def requirements(name: str) -> list[Requirement]:
    """Return the requirements of a list in pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(rf"^{name} = \[(.*?)\]\n", text, re.M | re.S)
    assert listed is not None
    return [Requirement(text) for text in re.findall(r'"([^"]+)"', listed[1])]


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


def test_the_wheel_works_where_no_checkout_is(tmp_path):
    sources = installed.copy_sources(tmp_path / "sources")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, sources]
    subprocess.run([*pip, *build], check=True)
    [wheel] = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel], check=True)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    installed.use(sys.executable, tmp_path / "site", tmp_path / "empty", environment)


# Of the standard library, what Windows does not have.
POSIX = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "termios", "tty", "syslog"}


def test_nothing_that_one_system_lacks_is_imported():
    for file in (ROOT / "rlr_fast").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert POSIX.isdisjoint(name.partition(".")[0] for name in names), file
