"""Pictures that are hard to read, and broken ones, as the bytes of files with their suffixes."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from tests.attack.damage import Random, damaged
from tests.attack.lab import picture

SIZE = (24, 32)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return a picture as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(
    width: int, height: int, rows: bytes, depth: int = 8, color: int = 0, extra: bytes = b""
) -> bytes:
    """Return a PNG file by hand: packed ``rows`` and whatever the header says."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        length, check = struct.pack(">I", len(content)), zlib.crc32(kind + content)
        return length + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    parts = (
        chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + parts


def _exif(turn: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = turn
    return exif


def _noise(random: Random, *shape: int, dtype: Any = np.uint8) -> np.ndarray[Any, Any]:
    return random.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def _gray16(random: Random) -> Image.Image:
    return Image.fromarray(_noise(random, *SIZE, dtype=np.uint16))


def _several(random: Random) -> dict[str, Any]:
    return {"save_all": True, "append_images": [picture(int(random.integers(9)))] * 2}


def _chunk(kind: bytes, content: bytes) -> bytes:
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def _transparent(random: Random) -> bytes:
    """Return a PNG whose transparency does not go with its pixels."""
    depth, color = ((1, 0), (8, 0), (16, 0), (8, 2), (8, 3), (8, 4), (8, 6))[
        int(random.integers(7))
    ]
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    rows = b"".join(b"\0" + random.bytes((32 * depth * samples + 7) // 8) for _ in range(24))
    palette = _chunk(b"PLTE", random.bytes(3 * int(random.integers(1, 257)))) if color == 3 else b""
    alpha = _chunk(b"tRNS", random.bytes(int(random.integers(0, 300))))
    return png(32, 24, rows, depth, color, palette + alpha)


def _bomb_of_text(random: Random) -> bytes:
    """Return a PNG with a compressed text of 100 MB."""
    text = _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))
    return png(32, 24, b"".join(b"\0" + random.bytes(32) for _ in range(24)), extra=text)


Maker = Callable[[Random], bytes]

# Name → suffix and how it is made. Each is either a picture or something that is to be refused.
HARD: dict[str, tuple[str, Maker]] = {
    "gray": ("png", lambda r: encoded(picture(1).convert("L"), "PNG")),
    "bilevel": ("png", lambda r: encoded(picture(1).convert("1"), "PNG")),
    "palette": ("png", lambda r: encoded(picture(1).convert("P"), "PNG")),
    "palette-alpha": ("png", lambda r: encoded(picture(1).convert("P"), "PNG", transparency=1)),
    "alpha": ("png", lambda r: encoded(Image.fromarray(_noise(r, *SIZE, 4)), "PNG")),
    "gray-alpha": ("png", lambda r: encoded(picture(1).convert("LA"), "PNG")),
    "16-bit": ("png", lambda r: encoded(_gray16(r), "PNG")),
    "16-bit-tiff": ("tif", lambda r: encoded(_gray16(r), "TIFF")),
    "16-bit-color": (
        "png",
        lambda r: png(32, 24, b"".join(b"\0" + r.bytes(192) for _ in range(24)), 16, 2),
    ),
    "float-tiff": ("tif", lambda r: encoded(Image.fromarray(np.ones(SIZE, np.float32)), "TIFF")),
    "int-tiff": ("tif", lambda r: encoded(Image.fromarray(np.ones(SIZE, np.int32)), "TIFF")),
    "cmyk": ("jpg", lambda r: encoded(picture(1).convert("CMYK"), "JPEG")),
    "cmyk-tiff": ("tif", lambda r: encoded(picture(1).convert("CMYK"), "TIFF")),
    "lab-tiff": ("tif", lambda r: encoded(picture(1).convert("LAB"), "TIFF")),
    "lzw-tiff": ("tif", lambda r: encoded(picture(1), "TIFF", compression="tiff_lzw")),
    "jpeg-tiff": ("tif", lambda r: encoded(picture(1), "TIFF", compression="jpeg")),
    "deflate-tiff": (
        "tif",
        lambda r: encoded(picture(1), "TIFF", compression="tiff_adobe_deflate"),
    ),
    "exif": ("jpg", lambda r: encoded(picture(1), "JPEG", exif=_exif(int(r.integers(0, 10))))),
    "progressive": ("jpg", lambda r: encoded(picture(1), "JPEG", progressive=True)),
    "webp": ("webp", lambda r: encoded(picture(1), "WEBP")),
    "webp-alpha": ("webp", lambda r: encoded(Image.fromarray(_noise(r, *SIZE, 4)), "WEBP")),
    "animated-gif": ("gif", lambda r: encoded(picture(1), "GIF", **_several(r))),
    "animated-png": ("png", lambda r: encoded(picture(1), "PNG", **_several(r))),
    "animated-webp": ("webp", lambda r: encoded(picture(1), "WEBP", **_several(r))),
    "pages": ("tif", lambda r: encoded(picture(1), "TIFF", **_several(r))),
    "bmp": ("bmp", lambda r: encoded(picture(1), "BMP")),
    "one-pixel": ("png", lambda r: encoded(picture(1, (1, 1)), "PNG")),
    "wide": ("png", lambda r: encoded(picture(1, (2, 30_000)), "PNG")),
    "tall": ("jpg", lambda r: encoded(picture(1, (30_000, 2)), "JPEG")),
    "empty": ("png", lambda r: b""),
    "text": ("png", lambda r: b"not a picture\n"),
    "other-suffix": ("jpg", lambda r: encoded(picture(1), "PNG")),
    "bomb": ("png", lambda r: png(30_000, 30_000, bytes(10**6), 1)),
    "largest": ("png", lambda r: png(13_000, 13_000, bytes(10**6), 1)),
    "no-pixels": ("png", lambda r: png(0, 24, b"\0" * 24)),
    "few-rows": ("png", lambda r: png(32, 24, bytes(99))),
    "transparency": ("png", _transparent),
    "text-bomb": ("png", _bomb_of_text),
    "program": (
        "png",
        lambda r: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    ),
    "ppm": ("png", lambda r: b"P6 4 4 255\n" + r.bytes(48)),
    "ico": ("png", lambda r: encoded(picture(1), "ICO")),
    "pdf": ("png", lambda r: encoded(picture(1), "PDF")),
    "sgi": ("png", lambda r: encoded(picture(1), "SGI")),
    "tga": ("png", lambda r: encoded(picture(1), "TGA")),
    "pcx": ("png", lambda r: encoded(picture(1), "PCX")),
    "jpeg-2000": ("png", lambda r: encoded(picture(1), "JPEG2000")),
    "icns": ("png", lambda r: encoded(picture(1, (32, 32)), "ICNS")),
}


def hard_picture(random: Random, damage: float = 0.85) -> tuple[str, str, bytes]:
    """Return name, suffix and bytes of a hard picture, mostly damaged."""
    names = list(HARD)
    name = names[int(random.integers(len(names)))]
    suffix, make = HARD[name]
    data = make(random)
    if name not in ("largest", "text-bomb") and random.random() < damage:
        data = damaged(random, data)
        name += ", damaged"
    return name, suffix, data
