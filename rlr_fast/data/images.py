"""Image and mask files as tensors, one at a time or decoded ahead by threads.

What becomes of a picture, the same in training, testing and prediction:

- Gray, palette and CMYK pictures become RGB as Pillow converts them; color profiles are ignored.
- Transparent pixels are laid over black: what cannot be seen cannot be scored.
- 16-bit pixels keep their high byte (65535 → 255), as Pillow does for 16-bit color. The full range
  counts, not the range of the file: two files with equal pixels stay equal. 12-bit data should thus
  be stretched to 16 bits before.
- 32-bit integers and floats have no agreed white and are refused.
- The orientation in EXIF is not applied: masks are drawn on the pixels as stored.
- Of several frames or pages the first is read.
- Images are resized by Lanczos; masks are thresholded ``!= 0`` as stored, then resized by nearest
  neighbor (pixel centers, as Pillow and torchvision do).

Every size is (height, width) in pixels.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, UnidentifiedImageError

from rlr_fast.config import LARGEST
from rlr_fast.data.layouts import Box, Sample
from rlr_fast.data.threads import default_workers, map_ahead
from rlr_fast.files import readable_digest

# What Pillow raised over 150,000 broken files: cut short, or with bytes changed.
_BROKEN_FILE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    Image.DecompressionBombError,
)

# What gives back the pixels as stored, where Pillow has turned a TIFF by its orientation.
_STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
_ON_ITS_SIDE = 5  # from this orientation on, height and width are exchanged

# Pillow reads fifty formats more, by readers that are less tested, and one starts a program.
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP")

_PICTURES_AHEAD = 2

# An image, and the (height, width) of its file.
_Loaded = tuple[torch.Tensor, tuple[int, int]]


class UnreadableImageError(OSError):
    """An image file that is missing, broken, too large, or of pixels with no meaning as a picture.

    Attributes:
        path: The file.
        reason: What is wrong with it.
    """

    _action = "read"

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        # Both as arguments of OSError, so that the error can be pickled to another process.
        super().__init__(str(path), reason)
        self.path = Path(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot {self._action} image {str(self.path)!r}: {self.reason}"


class UnscoredImageError(UnreadableImageError):
    """An image file that can be read, but of which the model can make nothing."""

    _action = "take"


@dataclass(frozen=True)
class ImageFailure:
    """A file that could not be read: its place in the list, and why.

    Attributes:
        index: Place in the list.
        error: Names the file and the reason.
    """

    index: int
    error: UnreadableImageError


@dataclass(frozen=True)
class ImageBatch:
    """Some images of a list, and the files among them that could not be read.

    Attributes:
        indices: Place in the list of each image.
        images: (B, 3, H, W) uint8, RGB.
        original_sizes: (height, width) of each file before resizing.
        failures: Files met on the way that could not be read; they are in neither of the above.
    """

    indices: list[int]
    images: torch.Tensor
    original_sizes: list[tuple[int, int]]
    failures: list[ImageFailure]


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Decode a file, in the mode it is stored in; its content says the format, not its name.

    Raises:
        UnreadableImageError: If the file is missing, truncated, broken, no image of a known
            format, or so large that Pillow takes it for an attack.
    """
    image: Image.Image
    try:
        with _opened(path) as image:
            turned = _turned(image)
            image.load()
            if turned in _STORED:
                image = image.transpose(_STORED[turned])
    except _BROKEN_FILE as error:
        raise UnreadableImageError(path, _reason(path, error)) from error
    return image


def read_image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return (height, width) of an image file, from its header alone.

    Raises:
        UnreadableImageError: If the header cannot be read.
    """
    try:
        with _opened(path) as image:
            width, height = image.size
            if _turned(image) >= _ON_ITS_SIDE:
                width, height = height, width
    except _BROKEN_FILE as error:
        raise UnreadableImageError(path, _reason(path, error)) from error
    return height, width


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    # To open a pipe waits for its writer, and to read a terminal for its user, for ever.
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError("it is a pipe or a device, not a file")
    # Of a path, not of a file, Pillow maps the memory, and a TIFF that it turns in a wrong shape.
    with open(path, "rb") as file, Image.open(file, formats=_FORMATS) as image:
        yield image


def _turned(image: Image.Image) -> int:
    """Return the orientation by which Pillow turns a file that is not loaded yet; 1 is as stored.

    Of other formats it leaves the pixels as they are stored.
    """
    orientation = image.getexif().get(ExifTags.Base.Orientation) if image.format == "TIFF" else 1
    return orientation if orientation in _STORED else 1


def to_rgb(image: Image.Image, path: str | os.PathLike[str]) -> Image.Image:
    """Return a decoded image in mode RGB, by the rules on top of this file.

    Args:
        image: What `open_image` returned.
        path: Its file, for the error.

    Raises:
        UnreadableImageError: If the pixels are 32-bit integers, floats, or of a mode that Pillow
            cannot convert.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        # Pillow's own conversion clips at 255, which turns a 16-bit picture white.
        pixels = np.asarray(image).astype(np.uint16)
        high_byte = (pixels >> 8).astype(np.uint8)
        if "transparency" in image.info:  # the value of transparent pixels
            high_byte[pixels == image.info["transparency"]] = 0
        image = Image.fromarray(high_byte)
    elif image.mode in ("I", "F"):
        kind = "floats" if image.mode == "F" else "32-bit integers"
        raise UnreadableImageError(
            path, f"its pixels are {kind}, which have no agreed white; save it with 8 or 16 bits"
        )
    try:
        if image.mode == "La":
            image = image.convert("LA")  # Pillow converts La to nothing else.
        if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
            black = Image.new("RGBA", image.size, (0, 0, 0, 255))
            image = Image.alpha_composite(black, image.convert("RGBA"))
        return image if image.mode == "RGB" else image.convert("RGB")
    except ValueError as error:
        raise UnreadableImageError(path, f"mode {image.mode}: {error}") from error


def load_image(path: str | os.PathLike[str], size: tuple[int, int]) -> torch.Tensor:
    """Return an image file as RGB tensor (3, H, W) of uint8, resized to `size` by Lanczos.

    Args:
        path: Image file.
        size: (H, W) of the result.

    Raises:
        UnreadableImageError: If the file cannot be read as a picture.
        ValueError: If `size` is not two positive integers.
    """
    return _load_image(path, checked_size(size))[0]


def load_sample_mask(sample: Sample, size: tuple[int, int]) -> torch.Tensor:
    """Return a sample's ground truth, a tensor (H, W) of bool; a normal image has nothing marked.

    Args:
        sample: A sample of a data set.
        size: (H, W) of the result, by nearest neighbor.

    Raises:
        UnreadableImageError: If a mask, or the header of the image, cannot be read.
        ValueError: If a mask has another size than the image, or a defective image has no mask.
    """
    size = checked_size(size)
    if not sample.is_anomaly:
        return torch.zeros(size, dtype=torch.bool)
    if not sample.mask_paths:
        raise ValueError(
            "an image with a defect must have a mask to score its pixels, got "
            f"{str(sample.path)!r} (defect {sample.defect!r}) without one"
        )
    image_size = read_image_size(sample.path)
    return load_mask(sample.mask_paths, image_size, size, f"its image {str(sample.path)!r}")


def digest_images(images: Sequence[Path], workers: int | None = None) -> list[str | None]:
    """Return the digest of each file; None of one that cannot be read.

    Args:
        images: The files.
        workers: Threads that read.
    """
    return list(map_ahead(readable_digest, images, workers))


def iterate_images(
    items: Iterable[Sample | str | os.PathLike[str]],
    size: tuple[int, int] | None,
    batch_size: int,
    workers: int | None = None,
) -> Iterator[ImageBatch]:
    """Yield images in the order of `items`, decoded ahead by threads while the caller is busy.

    Of a sample with a `box`, that part is an image. Parts of a file that follow each other are
    decoded once.

    Every batch is of `batch_size` items but the last, which may have fewer. A file that cannot be
    read does not end the iteration: it is told in `ImageBatch.failures`, and its batch has an image
    less, or none. So which images are scored together depends on their places alone. The threads
    are at most `batch_size` images ahead of the caller, or two per thread if that is more; two
    pictures where they keep their own size, since one can fill a gigabyte.

    Args:
        items: Samples or paths, taken from an iterator as they are needed.
        size: (H, W) of the images; None gives each the size of its file, one per batch.
        batch_size: Images in a batch; 1 where `size` is None.
        workers: Threads that decode; `default_workers` by default.

    Raises:
        ValueError: If `size`, `batch_size` or `workers` is not positive.
    """
    if size is not None:
        size = checked_size(size)
    if batch_size < 1 or (size is None and batch_size > 1):
        rule = "positive" if batch_size < 1 else "1 for images of their own size"
        raise ValueError(f"batch_size must be {rule}, got {batch_size=}")
    workers = default_workers() if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers must be positive, got {workers=}")
    parts = (
        (item.path, item.box) if isinstance(item, Sample) else (Path(item), None) for item in items
    )
    # Checked before the first batch is asked for, hence two functions.
    return _iterate(parts, size, batch_size, workers)


def _iterate(
    parts: Iterator[tuple[Path, Box | None]],
    size: tuple[int, int] | None,
    batch_size: int,
    workers: int,
) -> Iterator[ImageBatch]:
    ahead = _PICTURES_AHEAD if size is None else max(batch_size, 2 * workers)
    pictures = _Pictures()

    def load(part: tuple[Path, Box | None]) -> _Loaded | UnreadableImageError:
        path, box = part
        try:
            if box is None:
                return _load_image(path, size)
            return _part(pictures.decoded(path), path, box, size)
        except UnreadableImageError as error:
            return error

    decoded = enumerate(map_ahead(load, parts, workers, ahead))
    while batch := list(itertools.islice(decoded, batch_size)):
        read = [(i, *result) for i, result in batch if isinstance(result, tuple)]
        images = [image for _, image, _ in read]
        none = torch.empty(0, 3, *(size or (0, 0)), dtype=torch.uint8)
        yield ImageBatch(
            [i for i, _, _ in read],
            torch.stack(images) if images else none,
            [original_size for _, _, original_size in read],
            [ImageFailure(i, r) for i, r in batch if isinstance(r, UnreadableImageError)],
        )


class _Pictures:
    """Decoded files whose parts are asked for: the last of them, each decoded by one thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[Path, Future[Image.Image]] = {}

    def decoded(self, path: Path) -> Image.Image:
        """Return a file as RGB; UnreadableImageError where it cannot be read."""
        with self._lock:
            picture = self._kept.get(path)
            is_new = picture is None
            if picture is None:
                picture = self._kept[path] = Future()
                if len(self._kept) > _PICTURES_AHEAD:
                    del self._kept[next(iter(self._kept))]
        if is_new:
            try:
                picture.set_result(to_rgb(open_image(path), path))
            except BaseException as error:  # those who wait must not do so for ever
                picture.set_exception(error)
        return picture.result()


def _part(image: Image.Image, path: Path, box: Box, size: tuple[int, int] | None) -> _Loaded:
    top, left, height, width = box
    if top + height > image.height or left + width > image.width:
        raise UnreadableImageError(path, f"it has no part {box} any more, it was replaced")
    part = image.crop((left, top, left + width, top + height))
    return _as_tensor(part, (height, width) if size is None else size), (image.height, image.width)


def resize_image(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return an RGB tensor (3, h, w) of uint8 resized to `size` (H, W) as image files are."""
    pixels = np.ascontiguousarray(image.numpy().transpose(1, 2, 0))
    return _as_tensor(Image.fromarray(pixels), size)


def _load_image(path: str | os.PathLike[str], size: tuple[int, int] | None) -> _Loaded:
    """Return the image (3, H, W) in `size`, or in its own, and the (height, width) of its file."""
    image = to_rgb(open_image(path), path)
    original_size = (image.height, image.width)
    return _as_tensor(image, original_size if size is None else size), original_size


def _as_tensor(image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    if (image.height, image.width) != size:
        image = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    # Transposed by NumPy: PyTorch would start its own threads within each of ours.
    return torch.from_numpy(np.array(np.asarray(image).transpose(2, 0, 1), order="C"))


def load_mask(
    paths: Sequence[str | os.PathLike[str]],
    image_size: tuple[int, int],
    size: tuple[int, int],
    image_name: str = "its image",
) -> torch.Tensor:
    """Return the union of mask files as tensor (H, W) of bool; without files, nothing is marked.

    Any pixel that is neither 0 (black) nor transparent in the file counts as anomalous, however
    small its value. Palette masks count by color.

    Args:
        paths: Mask files of one image.
        image_size: (height, width) of the image's file, which each mask must have.
        size: (H, W) of the result, by nearest neighbor.
        image_name: The image, for the error.

    Raises:
        UnreadableImageError: If a file cannot be read.
        ValueError: If a mask has another size than its image.
    """
    union = np.zeros(image_size, dtype=bool)
    for path in paths:
        marked = read_mask(path)
        if marked.shape != image_size:
            raise ValueError(
                f"a mask must have the size of its image: mask {str(path)!r} is "
                f"{marked.shape[0]} x {marked.shape[1]}, {image_name} is "
                f"{image_size[0]} x {image_size[1]} (height x width)"
            )
        union |= marked
    return torch.from_numpy(resize_mask(union, size))


def read_mask(path: str | os.PathLike[str]) -> npt.NDArray[np.bool_]:
    """Return a mask file as array (height, width) of bool, in the size it is stored in.

    Raises:
        UnreadableImageError: If the file cannot be read.
    """
    mask = open_image(path)
    if "transparency" in mask.info:
        try:
            mask = mask.convert("RGBA")
        except ValueError as error:
            raise UnreadableImageError(path, f"mode {mask.mode}: {error}") from error
    elif mask.mode not in ("1", "L", "LA", "RGB", "RGBA", "I", "F") and mask.mode[:4] != "I;16":
        mask = to_rgb(mask, path)
    pixels: npt.NDArray[Any] = np.asarray(mask)
    marked: npt.NDArray[np.bool_]
    if mask.mode in ("LA", "RGBA"):
        marked = (pixels[..., :-1] != 0).any(axis=-1) & (pixels[..., -1] != 0)
    elif mask.mode == "RGB":
        marked = (pixels != 0).any(axis=-1)
    else:
        marked = pixels != 0
    return marked


def resize_mask(mask: npt.NDArray[np.bool_], size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Return a mask (height, width) of bool in `size`, by nearest neighbor at pixel centers."""
    if mask.shape == size:
        return mask
    resized = Image.fromarray(mask.astype(np.uint8)).resize(
        (size[1], size[0]), Image.Resampling.NEAREST
    )
    return np.array(resized, dtype=bool)


def checked_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return `size` itself, if it is two positive integers; ValueError otherwise."""
    if (
        not isinstance(size, Sequence)
        or len(size) != 2
        or not all(isinstance(side, int) and 0 < side <= LARGEST for side in size)
    ):
        raise ValueError(
            f"size must be (height, width), two positive integers of at most {LARGEST}, got {size=}"
        )
    return size[0], size[1]


def _reason(path: str | os.PathLike[str], error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, UnidentifiedImageError):
        return (
            "the file is empty"
            if os.path.getsize(path) == 0
            else f"not an image of a known format ({', '.join(_FORMATS)})"
        )
    if isinstance(error, Image.DecompressionBombError) and Image.MAX_IMAGE_PIXELS is not None:
        return f"it has more than {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
