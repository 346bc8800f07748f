"""The ``rlr-fast`` command: a verb for each job.

A verb is a function: its parameters are its flags, and its docstring is their help. The settings of
model, recipe and execution are the fields of the dataclasses in `rlr_fast.config`. A verb imports
what it works with when it is called, so help and mistakes need not wait for PyTorch. May import
everything; nothing but `__main__` imports it.
"""

from __future__ import annotations

import io
import itertools
import logging
import sys
import warnings
from collections.abc import Sequence

from cyclopts import CycloptsError, MissingArgumentError, UnusedCliTokensError

from rlr_fast.cli import flags
from rlr_fast.cli.messages import follow_peer, refuse, tells, wants_traceback
from rlr_fast.cli.verbs import VERBS, build_app


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        0: done. 1: done, but some files were left out, or a check failed. 2: a mistake of the
        user, or something that stopped the job; it is told in a line on standard error, by one of
        several processes. 3: an image is called anomalous (``predict --fail-on-anomaly``). 130:
        interrupted. 143: terminated by the system.
    """
    level = logging.WARNING if tells() else logging.ERROR  # what one tells, the others meet too
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s")
    # Pillow's, of pictures that are read all the same.
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot show is no end
            stream.reconfigure(errors="backslashreplace")
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _main(argv)
    except KeyboardInterrupt:  # before the work of a verb began
        print("\nrlr-fast: interrupted", file=sys.stderr)
        return 130


def _main(argv: list[str]) -> int:
    app = build_app()
    words, _, _ = app.parse_commands(argv)
    flagged = itertools.takewhile(lambda word: word != "--", argv)
    names = [w.partition("=")[0].replace("_", "-") for w in flagged if w.startswith("--")]
    meant = [flags.OLDER_NAMES.get(name, name).replace("--no-", "--") for name in names]
    twice = next((name for name in meant if meant.count(name) > 1), None)
    if twice is not None:  # a list of values would be joined, and of two the last would win
        return _refused(f"{twice} is given twice.", words)
    try:
        function, bound, _ = app.parse_args(argv, exit_on_error=False, print_error=False)
    except (CycloptsError, ValueError) as error:
        if wants_traceback():
            raise
        return _refused(_line(error, argv), words)
    verb = VERBS.get(words)
    if verb is None or function.__module__ != verb.module:  # --help or --version
        function(*bound.args, **bound.kwargs)
        return 0
    from rlr_fast.cli.run import run

    return run(verb, lambda: function(*bound.args, **bound.kwargs))


def _refused(sentence: str, words: Sequence[str]) -> int:
    """Tell a mistake in the words of a command; return the exit code."""
    command = " ".join(("rlr-fast", *words))
    return refuse(f"{sentence} See {command} --help.") if tells() else follow_peer()


def _line(error: Exception, argv: Sequence[str]) -> str:
    """Return what the mistake is, as a line of whole sentences."""
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        return f"unexpected argument {error.unused_tokens[0]!r}."
    if isinstance(error, MissingArgumentError) and error.argument and error.keyword is None:
        return f"{error.argument.name} is needed."
    line = " ".join(str(error).split())
    line = line if line.endswith((".", "?")) else f"{line}."
    if isinstance(error, MissingArgumentError) and error.keyword in argv[:-1]:
        value = argv[argv.index(error.keyword) + 1]
        if value.startswith("-") and not value.startswith("--"):
            line += f" A value that begins with '-' is given as {error.keyword}={value}."
    return line
