"""Which changes of a data set's files are noticed, and which files cannot be read."""

from __future__ import annotations

import os

import pytest
from conftest import save_picture

from rlr_fast.data import read_dataset
from rlr_fast.data.contents import changed_files, file_digests, unreadable_files


def rewrite(path):
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(1, 1))


def grow(path):
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes() + b" ")
    os.utime(path, ns=times)


def rename(path):
    path.rename(path.with_name("other.png"))


def flip_a_bit_unseen(path):
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=times)


@pytest.mark.parametrize("change", [rewrite, grow, rename], ids=["time", "size", "name"])
@pytest.mark.parametrize(
    ("file", "noticed"),
    [
        ("bolt/train/good/000.png", "the training images of bolt are others"),
        ("cloth/test/good/001.png", "the test images of cloth are others"),
        ("bolt/ground_truth/hole/000_mask.png", "the test masks of bolt are others"),
    ],
    ids=["train", "test", "mask"],
)
def test_another_name_size_or_time_is_noticed(tree, change, file, noticed):
    before = file_digests(read_dataset(tree))
    assert changed_files(before, file_digests(read_dataset(tree))) == []
    change(tree / file)
    assert noticed in changed_files(before, file_digests(read_dataset(tree)))


def test_other_bytes_of_the_same_size_and_time_are_not_noticed(tree):
    before = file_digests(read_dataset(tree))
    flip_a_bit_unseen(tree / "bolt/train/good/000.png")
    assert changed_files(before, file_digests(read_dataset(tree))) == []


def test_unreadable_files_are_listed_with_their_reason(tree):
    save_picture(tree / "bolt/test/good/000.png", 3, (32, 32))
    (tree / "bolt/test/good/001.png").write_bytes(b"no image")
    done = []
    [line] = unreadable_files(read_dataset(tree), workers=2, progress=done.append)
    assert "good/001.png" in line and "not an image" in line
    data = read_dataset(tree)
    assert sum(done) == sum(len(s) for split in (data.train, data.test) for s in split.values())
