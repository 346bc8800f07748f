"""Image and mask files: modes, sizes, broken files, and decoding ahead."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rlr_fast.data import images as images_module
from rlr_fast.data.images import (
    UnreadableImageError,
    iterate_images,
    load_image,
    load_mask,
    load_sample_mask,
    open_image,
    read_image_size,
    read_mask,
    to_rgb,
)
from rlr_fast.data.layouts import Sample


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, pixels: np.ndarray | Image.Image, **options) -> Path:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "gif", "tif", "webp"])
def test_rgb_pixels_come_back_channels_first_and_unchanged(tmp_path, suffix):
    pixels = noise(5, 7, 3)
    options = {"lossless": True} if suffix == "webp" else {}
    found = load_image(save(tmp_path / f"a.{suffix}", pixels, **options), (5, 7))
    assert found.dtype == torch.uint8
    assert found.is_contiguous()
    np.testing.assert_array_equal(found.numpy(), pixels.transpose(2, 0, 1))


def test_size_is_height_then_width_and_resizing_is_lanczos(tmp_path):
    pixels = noise(40, 20, 3)
    found = load_image(save(tmp_path / "a.png", pixels), (10, 16))
    expected = Image.fromarray(pixels).resize((16, 10), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(found.numpy(), np.asarray(expected).transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA"])
def test_gray_and_palette_become_rgb(tmp_path, mode):
    gray = Image.fromarray(noise(6, 6)).convert(mode)
    found = load_image(save(tmp_path / "a.png", gray), (6, 6))
    expected = np.asarray(gray.convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(found.numpy(), expected)


def test_cmyk_jpeg_becomes_rgb(tmp_path):
    red = Image.new("RGB", (16, 16), (250, 10, 10)).convert("CMYK")
    found = load_image(save(tmp_path / "a.jpg", red, quality=95), (16, 16)).float()
    assert found[0].mean() > 230
    assert found[1:].mean() < 30


def test_transparent_pixels_are_black_whatever_color_hides_there(tmp_path):
    pixels = np.full((2, 2, 4), 200, dtype=np.uint8)
    pixels[..., 3] = [[255, 0], [255, 128]]
    found = load_image(save(tmp_path / "a.png", pixels), (2, 2))
    assert found[0].tolist() == [[200, 0], [200, 100]]
    palette = Image.new("P", (2, 1))
    palette.putpixel((1, 0), 1)
    palette.putpalette([10, 20, 30, 200, 200, 200])
    found = load_image(save(tmp_path / "b.png", palette, transparency=1), (1, 2))
    assert found[:, 0].tolist() == [[10, 0], [20, 0], [30, 0]]


def test_premultiplied_gray_keeps_its_visible_gray(tmp_path):
    pixels = np.full((1, 2, 2), 128, dtype=np.uint8)
    pixels[0, :, 0] = [128, 64]
    image = to_rgb(Image.frombytes("La", (2, 1), pixels.tobytes()), tmp_path / "a.tif")
    np.testing.assert_allclose(np.asarray(image)[0, :, 0], [128, 64], atol=1)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_gray_keeps_its_high_byte_instead_of_turning_white(tmp_path, suffix):
    pixels = np.array([[0, 255, 256], [0x1234, 0x8000, 0xFFFF]], dtype=np.uint16)
    found = load_image(save(tmp_path / f"a.{suffix}", pixels), (2, 3))
    assert found[1].tolist() == [[0, 0, 1], [0x12, 0x80, 0xFF]]


def test_the_transparent_value_of_a_16_bit_gray_png_is_black(tmp_path):
    pixels = np.array([[0xFFFF, 0xFFFE]], dtype=np.uint16)
    path = save(tmp_path / "a.png", pixels)
    data = path.read_bytes()
    chunk = b"tRNS" + (0xFFFF).to_bytes(2, "big")
    end = data.index(b"IDAT") - 4
    chunk = (2).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    path.write_bytes(data[:end] + chunk + data[end:])
    assert load_image(path, (1, 2))[0].tolist() == [[0, 0xFF]]


def test_big_endian_16_bit_tiff(tmp_path):
    # Pillow writes little-endian alone, hence a file by hand: 2 x 1 pixels, one strip.
    entries = [(256, 3, 2), (257, 3, 1), (258, 3, 16), (259, 3, 1), (262, 3, 1)]
    entries += [(273, 4, 122), (277, 3, 1), (278, 3, 1), (279, 4, 4)]
    data = b"MM\x00\x2a" + (8).to_bytes(4, "big") + len(entries).to_bytes(2, "big")
    for tag, kind, value in entries:
        field = value.to_bytes(2, "big") + b"\0\0" if kind == 3 else value.to_bytes(4, "big")
        data += tag.to_bytes(2, "big") + kind.to_bytes(2, "big") + (1).to_bytes(4, "big") + field
    data += bytes(4)
    assert len(data) == 122
    (tmp_path / "a.tif").write_bytes(data + b"\x12\x34\xab\xcd")
    assert open_image(tmp_path / "a.tif").mode == "I;16B"
    assert load_image(tmp_path / "a.tif", (1, 2))[0].tolist() == [[0x12, 0xAB]]


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_without_an_agreed_white_are_refused(tmp_path, dtype):
    path = save(tmp_path / "a.tif", np.ones((2, 2), dtype=dtype))
    with pytest.raises(UnreadableImageError, match=r"a\.tif.*no agreed white"):
        load_image(path, (2, 2))


def test_mode_that_pillow_cannot_convert_names_the_file(monkeypatch):
    # Which modes those are depends on Pillow's version: LAB was one for long.
    image = Image.new("LAB", (2, 2))

    def convert(mode):
        raise ValueError(f"conversion from LAB to {mode} not supported")

    monkeypatch.setattr(image, "convert", convert)
    with pytest.raises(UnreadableImageError, match=r"a\.tif.*mode LAB"):
        to_rgb(image, "a.tif")


def test_exif_orientation_is_not_applied_because_masks_do_not_turn(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    path = save(tmp_path / "a.jpg", noise(8, 16, 3), exif=exif)
    assert Image.open(path).getexif()[0x0112] == 6
    assert read_image_size(path) == (8, 16)
    stored = np.asarray(Image.open(path)).transpose(2, 0, 1)
    np.testing.assert_array_equal(load_image(path, (8, 16)).numpy(), stored)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_a_tiff_is_read_as_stored_too(tmp_path, orientation, compression):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = noise(8, 16, 3)
    path = save(tmp_path / "a.tif", pixels, exif=exif, compression=compression)
    assert read_image_size(path) == (8, 16)
    np.testing.assert_array_equal(load_image(path, (8, 16)).numpy(), pixels.transpose(2, 0, 1))
    mask = (noise(8, 16) > 99).astype(np.uint8)
    path = save(tmp_path / "m.tif", mask, exif=exif, compression=compression)
    np.testing.assert_array_equal(read_mask(path), mask != 0)


@pytest.mark.parametrize("kind", ["PPM", "TGA", "PCX", "ICO", "PDF"])
def test_formats_beyond_the_known_ones_are_refused_whatever_the_name(tmp_path, kind):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png", kind)
    for read in (open_image, read_image_size):
        with pytest.raises(UnreadableImageError, match=r"known format \(PNG, JPEG"):
            read(tmp_path / "a.png")


def test_a_program_in_the_place_of_an_image_is_not_run(tmp_path, monkeypatch):
    """Pillow hands PostScript to an interpreter if one is installed."""
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started a program"))
    head = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    (tmp_path / "a.png").write_bytes(head)
    with pytest.raises(UnreadableImageError, match="not an image of a known format"):
        open_image(tmp_path / "a.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for read in (open_image, read_image_size):
        with pytest.raises(UnreadableImageError, match="a pipe or a device, not a file"):
            read(tmp_path / "a.png")


@pytest.mark.parametrize("read", [read_mask, lambda path: load_image(path, (2, 2))])
def test_more_transparent_colors_than_a_palette_has_name_the_file(tmp_path, read):
    data = save(tmp_path / "a.png", Image.new("P", (8, 8), 2)).read_bytes()
    place = data.index(b"IDAT") - 4
    content = b"tRNS" + bytes(300)
    chunk = (300).to_bytes(4, "big") + content + zlib.crc32(content).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(data[:place] + chunk + data[place:])
    with pytest.raises(UnreadableImageError, match=r"a\.png.*palette index out of range"):
        read(tmp_path / "a.png")


def test_first_page_of_several(tmp_path):
    first, second = Image.new("RGB", (3, 3), "red"), Image.new("RGB", (3, 3), "blue")
    path = save(tmp_path / "a.tif", first, save_all=True, append_images=[second])
    assert load_image(path, (3, 3))[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    "size",
    [(0, 4), (4,), (4, -1), 4, (4.0, 4), (4, 4, 4), "44"],
    ids=["zero", "one", "negative", "number", "float", "three", "string"],
)
def test_size_must_be_two_positive_integers(tmp_path, size):
    path = save(tmp_path / "a.png", noise(2, 2))
    with pytest.raises(ValueError, match=r"size must be \(height, width\)"):
        load_image(path, size)


def encoded(format: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(32, 32, 3)).save(buffer, format)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        pytest.param("a.png", None, "no such file", id="missing"),
        pytest.param("a.png", b"", "empty", id="empty"),
        pytest.param("a.jpg", b"<html>not found</html>" * 9, "not an image", id="web-page"),
        pytest.param("a.jpg", encoded("JPEG")[:-400], "truncated", id="truncated-jpeg"),
        pytest.param("a.png", encoded("PNG")[:-400], "truncated", id="truncated-png"),
        pytest.param("a.bmp", encoded("BMP")[:-400], "truncated", id="truncated-bmp"),
        pytest.param("a.tif", encoded("TIFF")[:-400], "", id="truncated-tiff"),
        pytest.param("a.webp", encoded("WEBP")[:-400], "", id="truncated-webp"),
        pytest.param("a.png", encoded("PNG")[:12] + bytes(60), "", id="broken-header"),
        pytest.param(
            "a.png", encoded("PNG")[:400] + bytes(99) + encoded("PNG")[499:], "", id="crc"
        ),
    ],
)
def test_unreadable_file_is_named_with_its_reason(tmp_path, name, content, reason):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UnreadableImageError) as error:
        open_image(path)
    assert reason in error.value.reason
    assert error.value.path == path
    assert str(path) in str(error.value)
    assert error.value.reason in str(error.value)
    assert isinstance(error.value, OSError)


def test_folder_in_place_of_a_file_is_unreadable(tmp_path):
    with pytest.raises(UnreadableImageError, match="directory"):
        open_image(tmp_path)


def test_decompression_bomb_is_unreadable(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", noise(20, 20))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableImageError, match="it has more than 0 million pixels"):
        open_image(path)
    with pytest.raises(UnreadableImageError, match="it has more than 0 million pixels"):
        read_image_size(path)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_broken_file_raises_anything_else(tmp_path):
    # Cut short or changed at random; what Pillow makes of it depends on its version.
    rng = np.random.default_rng(0)
    unreadable = 0
    for format in ("PNG", "JPEG", "BMP", "TIFF", "WEBP"):
        original = encoded(format)
        for round_ in range(40):
            content = bytearray(original)
            if round_ % 2:
                content = content[: rng.integers(1, len(content))]
            else:
                for place in rng.integers(0, min(len(content), 100), 4):
                    content[place] = rng.integers(256)
            path = tmp_path / "a"
            path.write_bytes(content)
            try:
                load_image(path, (4, 4))
            except UnreadableImageError:
                unreadable += 1
    assert unreadable > 100


@pytest.mark.parametrize("error", [OSError, SyntaxError, ValueError, TypeError])
def test_what_decoders_raise_over_broken_files_becomes_one_error(tmp_path, monkeypatch, error):
    path = save(tmp_path / "a.png", noise(4, 4))

    def load(*_):
        raise error("broken")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(UnreadableImageError, match=r"a\.png': broken"):
        open_image(path)


def test_error_survives_pickling_to_another_process(tmp_path):
    error = UnreadableImageError(tmp_path / "a.png", "the file is empty")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.path, copy.reason, str(copy)) == (error.path, error.reason, str(error))


def test_mask_values_below_255_count_before_resizing(tmp_path):
    # VisA's class ids and LOCO's values: a threshold at half, or after resizing, would lose them.
    pixels = np.zeros((4, 4), dtype=np.uint8)
    pixels[1, 2], pixels[3, 0] = 1, 254
    mask = load_mask([save(tmp_path / "m.png", pixels)], (4, 4), (4, 4))
    assert mask.dtype == torch.bool
    assert mask.nonzero().tolist() == [[1, 2], [3, 0]]


def test_mask_is_resized_by_nearest_neighbor_at_pixel_centers(tmp_path):
    pixels = noise(24, 12) // 128
    found = load_mask([save(tmp_path / "m.png", pixels)], (24, 12), (8, 6))
    # 3 rows and 2 columns to one pixel: centers fall on row 1 of 3, and on column 1 of 2.
    np.testing.assert_array_equal(found.numpy(), pixels[1::3, 1::2] != 0)


def test_masks_of_one_image_are_united(tmp_path):
    first, second = np.zeros((2, 3), dtype=np.uint8), np.zeros((2, 3), dtype=np.uint8)
    first[0, 0], second[1, 2] = 7, 255
    files = [save(tmp_path / "1.png", first), save(tmp_path / "2.png", second)]
    assert load_mask(files, (2, 3), (2, 3)).tolist() == [[True, False, False], [False, False, True]]


def test_no_mask_files_mark_nothing():
    assert not load_mask([], (8, 6), (4, 3)).any()
    assert load_mask([], (8, 6), (4, 3)).shape == (4, 3)


@pytest.mark.parametrize(
    ("marked", "clear", "mode"),
    [
        pytest.param(1, 0, "1", id="bilevel"),
        pytest.param((0, 0, 1), (0, 0, 0), "RGB", id="dark-blue-is-not-black"),
        pytest.param((255, 0, 0, 255), (0, 0, 0, 0), "RGBA", id="color-on-transparent"),
        pytest.param((255, 255, 255, 1), (255, 255, 255, 0), "RGBA", id="alpha-alone"),
        pytest.param((255, 255), (0, 255), "LA", id="gray-with-alpha"),
    ],
)
def test_mask_modes(tmp_path, marked, clear, mode):
    image = Image.new(mode, (2, 1), clear)
    image.putpixel((1, 0), marked)
    mask = load_mask([save(tmp_path / "m.png", image)], (1, 2), (1, 2))
    assert mask.tolist() == [[False, True]]


def test_transparent_color_of_a_palette_mask_is_not_marked(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpixel((1, 0), 1)
    palette.putpalette([255, 255, 255, 255, 0, 0])
    mask = load_mask([save(tmp_path / "m.png", palette, transparency=0)], (1, 2), (1, 2))
    assert mask.tolist() == [[False, True]]


def test_palette_mask_counts_by_color_not_by_index(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpixel((1, 0), 1)
    palette.putpalette([128, 0, 0, 0, 0, 0])  # index 0 is red, index 1 is black
    mask = load_mask([save(tmp_path / "m.png", palette)], (1, 2), (1, 2))
    assert mask.tolist() == [[True, False]]


def test_16_bit_mask_with_values_below_256(tmp_path):
    pixels = np.array([[0, 3, 0x4000]], dtype=np.uint16)
    mask = load_mask([save(tmp_path / "m.png", pixels)], (1, 3), (1, 3))
    assert mask.tolist() == [[False, True, True]]


def test_mask_of_another_size_names_both_files_and_sizes(tmp_path):
    image = save(tmp_path / "i.png", noise(4, 6))
    mask = save(tmp_path / "m.png", noise(6, 4))
    with pytest.raises(ValueError, match=r"m\.png' is 6 x 4, its image is 4 x 6"):
        load_mask([mask], (4, 6), (4, 6))
    sample = Sample(image, "nut", "dent", (mask,))
    with pytest.raises(ValueError, match=r"m\.png' is 6 x 4, its image '.*i\.png' is 4 x 6"):
        load_sample_mask(sample, (4, 6))


def test_truncated_mask_is_unreadable(tmp_path):
    path = save(tmp_path / "m.png", noise(32, 32))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UnreadableImageError, match="truncated"):
        load_mask([path], (32, 32), (8, 8))


def test_sample_mask(tmp_path):
    pixels = np.array([[0, 1], [0, 0]], dtype=np.uint8)
    image = save(tmp_path / "i.png", noise(2, 2, 3))
    mask = save(tmp_path / "m.png", pixels)
    found = load_sample_mask(Sample(image, "nut", "dent", (mask,)), (4, 4))
    np.testing.assert_array_equal(found.numpy(), pixels.repeat(2, 0).repeat(2, 1) != 0)
    assert not load_sample_mask(Sample(image, "nut", "good"), (4, 4)).any()


def test_defect_without_mask_is_not_taken_for_a_normal_image(tmp_path):
    sample = Sample(tmp_path / "i.png", "nut", "dent")
    with pytest.raises(ValueError, match=r"must have a mask.*i\.png.*dent"):
        load_sample_mask(sample, (4, 4))


@pytest.fixture
def ten_files(tmp_path):
    """Ten files of growing size and one gray value each; the 3rd and the last are broken."""
    files = [
        save(tmp_path / f"{i}.png", np.full((4 + i, 5, 3), i, dtype=np.uint8)) for i in range(10)
    ]
    for broken in (2, 9):
        files[broken].write_bytes(files[broken].read_bytes()[:40])
    return files


@pytest.mark.parametrize("workers", [1, 4, None], ids=["one-thread", "four-threads", "default"])
def test_batches_keep_order_and_place_past_failures(ten_files, workers):
    batches = list(iterate_images(iter(ten_files), (4, 5), 3, workers))
    assert [batch.indices for batch in batches] == [[0, 1], [3, 4, 5], [6, 7, 8], []]
    for batch in batches:
        assert batch.images.shape == (len(batch.indices), 3, 4, 5)
        assert batch.images.dtype == torch.uint8
        assert batch.images[:, 0, 0, 0].tolist() == batch.indices
        assert batch.original_sizes == [(4 + index, 5) for index in batch.indices]
    failed = [[failure.index for failure in batch.failures] for batch in batches]
    assert failed == [[2], [], [], [9]]
    assert batches[0].failures[0].error.path == ten_files[2]


def test_iterate_reports_failures_when_no_image_is_left(ten_files):
    (batch,) = iterate_images([ten_files[2], ten_files[9]], (4, 5), 2)
    assert batch.images.shape == (0, 3, 4, 5)
    assert [failure.index for failure in batch.failures] == [0, 1]


def test_iterate_takes_samples_and_nothing(ten_files):
    (batch,) = iterate_images([Sample(ten_files[4], "nut", "good")], (4, 5), 8)
    assert batch.images[0, 0, 0, 0] == 4
    assert list(iterate_images([], (4, 5), 8)) == []


def test_iterate_does_not_decode_far_ahead_of_a_slow_caller(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", noise(4, 4, 3))
    started = []
    decode = images_module._load_image
    monkeypatch.setattr(
        images_module, "_load_image", lambda *args: started.append(1) or decode(*args)
    )
    iterator = iterate_images([path] * 500, (4, 4), 4, workers=2)
    next(iterator)
    time.sleep(0.2)
    # The batch handed over and one batch ahead; the last of the first batch makes room for no more.
    assert 4 < len(started) <= 8
    iterator.close()
    assert len(started) <= 8


def test_iterate_decodes_the_next_batch_while_the_caller_is_busy(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", noise(4, 4, 3))
    started = []
    decode = images_module._load_image
    monkeypatch.setattr(
        images_module, "_load_image", lambda *args: started.append(1) or decode(*args)
    )
    iterator = iterate_images([path] * 8, (4, 4), 4, workers=2)
    next(iterator)
    deadline = time.monotonic() + 5
    while len(started) < 7 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(started) >= 7
    iterator.close()


def test_iterate_leaves_no_threads_when_abandoned(tmp_path):
    path = save(tmp_path / "a.png", noise(4, 4, 3))
    iterator = iterate_images([path] * 50, (4, 4), 4, workers=3)
    next(iterator)
    iterator.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("images")]


def test_iterate_does_not_hide_a_bug_as_an_unreadable_file(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(images_module, "_load_image", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        list(iterate_images([tmp_path / "a.png"], (4, 4), 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(((0, 4), 1, 1), "size must be", id="size"),
        pytest.param(((4, 4), 0, 1), "batch_size must be positive, got batch_size=0", id="batch"),
        pytest.param(((4, 4), 1, 0), "workers must be positive, got workers=0", id="workers"),
    ],
)
def test_iterate_refuses_bad_arguments_before_the_first_batch(arguments, message):
    with pytest.raises(ValueError, match=message):
        iterate_images([], *arguments)
