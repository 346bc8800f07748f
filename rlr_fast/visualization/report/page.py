"""The page of a report: its template, and data that a browser reads as data, whatever they hold."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files
from typing import Any

_SCRIPTS = ("counts.js", "charts.js", "gallery.js", "head.js", "page.js")
_ROWS, _FACTS = "@ROWS@", "@FACTS@"


def page_parts() -> tuple[str, str, str]:
    """Return the page before its rows, between rows and facts, and after the facts.

    Style and scripts stand in it, and its policy allows these alone: nothing is loaded from a
    network, and no other script runs.
    """
    style = _read("style.css")
    # One strict function, so that the scripts share names with each other and with nothing else.
    script = "(() => {\n'use strict';\n" + "\n".join(map(_read, _SCRIPTS)) + "\n})();\n"
    policy = (
        "default-src 'none'; img-src data: file: 'self'; "
        f"style-src '{_digest(style)}'; script-src '{_digest(script)}'; base-uri 'none'; "
        "form-action 'none'"
    )
    page = _read("page.html")
    for name, text in (("@POLICY@", policy), ("@STYLE@", style), ("@SCRIPT@", script)):
        page = page.replace(name, text)
    before, _, rest = page.partition(_ROWS)
    between, _, after = rest.partition(_FACTS)
    return before, between, after


def embedded(value: Any) -> str:
    """Return a value as JSON that may stand in a page: ASCII, without any ``<``.

    Raises:
        ValueError: A number is NaN or infinite.
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _read(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
