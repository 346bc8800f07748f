"""What the tests of the command share."""

from __future__ import annotations

from rlr_fast.cli import main

FLAGS = [
    *("--preset", "tiny", "--backbone-weights", "random", "--image-size", "32", "--blocks", "1"),
    *("--hidden", "16", "--heads", "2", "--windows", "3", "--device", "cpu", "--quiet"),
    *("--epochs", "2", "--batch-size", "4"),
]


def refused(capsys, *argv):
    """Run a command that must fail; return its message, which must not be a traceback."""
    assert main([str(word) for word in argv]) == 2
    message = capsys.readouterr().err
    assert message.startswith("rlr-fast: error: ") and "Traceback" not in message
    return message
