"""Inks, fonts and numbers of the pictures."""

from __future__ import annotations

import os

import matplotlib
from PIL import ImageFont

Color = tuple[int, int, int]

INK: Color = (32, 32, 32)
FAINT: Color = (112, 112, 112)
PAPER: Color = (255, 255, 255)
EMPTY: Color = (236, 236, 236)


def number(value: float) -> str:
    """Return a number as the pictures write it."""
    return f"{value:.4g}"


def typeface(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans, which matplotlib brings, ``size`` pixels high."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(os.path.join(matplotlib.get_data_path(), "fonts/ttf", name), size)


def shortened(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Return the text, cut and ended by an ellipsis where it is wider than ``width`` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def one_line(text: str) -> str:
    """Return the text without breaks, which a name of a folder may hold."""
    return " ".join(text.splitlines())
