"""The floors of the package: imports lead downwards only, and every file lies in its folder."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rlr_fast"

# From the bottom; who stands on a floor imports from the floors below it.
FLOORS = (
    {"config", "files", "kernels", "memory", "ops"},
    {"functional"},
    {"models", "data"},
    {"visualization", "pictures"},
    {"training"},
    {"inference"},
    {"prediction"},
    {"export"},
    {"paper", "integrations"},
    {"cli"},
    {"__main__"},
)
# The face of the package: whoever imports anything of it runs this first.
FACE = "__init__"
ROOT_FILES = {
    "__init__.py",
    "__main__.py",
    "files.py",
    "functional.py",
    "memory.py",
    "py.typed",
}


def floor(part: str) -> int:
    return next(i for i, parts in enumerate(FLOORS) if part in parts)


def imports(file: Path, package: Path) -> Iterator[tuple[str, int]]:
    """Yield the part of the package that each import of a file names, and its line."""
    folders = list(file.relative_to(package.parent).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = folders[: len(folders) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == package.name and len(parts) > 1:
                yield parts[1], node.lineno


def faults(package: Path) -> list[str]:
    """Name every import that does not lead downwards, and every file without a floor."""
    found = []
    files = [*package.rglob("*.py"), *(package / "kernels").rglob("*.py")]
    for file in sorted(set(files)):
        where = file.relative_to(package)
        part = where.parts[0].removesuffix(".py")
        if part == FACE:
            continue
        if not any(part in parts for parts in FLOORS):
            found.append(f"{where} stands on no floor")
            continue
        for target, line in imports(file, package):
            if target == part:
                continue
            if not any(target in parts for parts in FLOORS):
                if target not in ("__version__",):
                    found.append(f"{where}:{line} imports {target}, which stands on no floor")
            elif floor(target) >= floor(part):
                found.append(f"{where}:{line} imports {target}, which is not below {part}")
    return found


def test_imports_lead_downwards():
    assert faults(PACKAGE) == []


@pytest.mark.parametrize(
    ("where", "line", "fault"),
    [
        ("models/a.py", "from rlr_fast.training import trainer", "training, which is not below"),
        ("models/a.py", "def late():\n    import rlr_fast.data.images", "data, which is not below"),
        ("models/a.py", "from ..cli import main", "cli, which is not below"),
        ("models/a.py", "from rlr_fast import RLRModel", "RLRModel, which stands on no floor"),
        ("ops/a.py", "from rlr_fast import kernels", "kernels, which is not below"),
        ("config/a.py", "from ..models.rlr import RLRModel", "models, which is not below"),
        ("helpers.py", "import math", "helpers.py stands on no floor"),
        ("helpers/a.py", "import math", "a.py stands on no floor"),
    ],
)
def test_an_arrow_upwards_is_seen(tmp_path, where, line, fault):
    file = tmp_path / "rlr_fast" / where
    file.parent.mkdir(parents=True)
    file.write_text("from rlr_fast.models import rlr\n" if "models" in where else "")
    assert faults(tmp_path / "rlr_fast") == [] or "stands on no floor" in fault
    file.write_text(line)
    (found,) = faults(tmp_path / "rlr_fast")
    assert fault in found


def test_no_file_in_the_root_but_the_public_face():
    files = {path.name for path in PACKAGE.iterdir() if path.is_file()}
    assert files == ROOT_FILES


def test_every_folder_says_what_lives_there_and_what_it_may_import():
    for folder in (path.parent for path in PACKAGE.glob("*/__init__.py")):
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
        assert text is not None and "import" in text.lower(), folder.name


def test_no_module_imports_in_a_circle():
    """Within a folder too: what is imported stands ready before its importer."""
    graph: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        name = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
        tree = ast.parse(file.read_text(encoding="utf-8"))
        graph[name.removesuffix(".__init__")] = {
            f"{node.module}.{alias.name}"
            for node in tree.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done and name in graph:
            for target in graph[name]:
                module = target if target in graph else target.rpartition(".")[0]
                visit(module, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_kernels_import_torch_and_triton_alone():
    outside = set()
    for file in (PACKAGE / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            outside |= {name.partition(".")[0] for name in names}
    assert outside - sys.stdlib_module_names == {"rlr_fast", "torch", "triton"}
