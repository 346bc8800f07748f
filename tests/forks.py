"""A process that imports what scripts need, which takes seconds, and is forked for each script."""

from __future__ import annotations

import importlib
import json
import linecache
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class Forks:
    """The process, which waits for scripts; a context manager ends it.

    Args:
        modules: What it imports.
        environment: Its variables.
    """

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks", *modules],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate()  # which closes its input, and so ends it

    def run(self, script: str, *words: object) -> subprocess.CompletedProcess[str]:
        """Run a script with the words of its command line, from the root of the project."""
        with tempfile.TemporaryDirectory() as folder:
            request = {"folder": folder, "script": script, "words": [str(word) for word in words]}
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            code = self._process.stdout.readline()
            assert code, "the process has ended; it says why among the errors of the tests"
            out, told = (Path(folder, name).read_text() for name in ("out", "err"))
        return subprocess.CompletedProcess(words, int(code), out, told)

    def main(self, module: str, *words: object) -> subprocess.CompletedProcess[str]:
        """Run the command ``python -m module``; see `run`."""
        return self.run(f"import sys; from {module} import main; sys.exit(main())", *words)

    def values(self, script: str) -> Any:
        """Return what a script prints, as JSON in one line, at its end."""
        done = self.run(script)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])


def _serve() -> None:
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = _run(**json.loads(line))
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _run(folder: str, script: str, words: list[str]) -> int:
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    path = str(Path(folder, "script.py"))
    # Triton reads the text of a kernel.
    linecache.cache[path] = len(script), None, script.splitlines(keepends=True), path
    sys.argv = [path, *words]
    try:
        exec(compile(script, path, "exec"), {"__name__": "__main__", "__file__": path})
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    _serve()
