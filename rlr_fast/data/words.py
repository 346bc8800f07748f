"""Numbers and names in words, as messages, reports and pictures write them."""

from __future__ import annotations


def counted(number: int, one: str, many: str = "") -> str:
    """Return ``1 image``, ``2 images``; ``many`` where an s does not do."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def one_line(text: str) -> str:
    """Return the text without breaks, which a name of a folder may hold."""
    return " ".join(text.splitlines())
