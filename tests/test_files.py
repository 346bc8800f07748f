"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from rlr_fast import files
from rlr_fast.files import file_digest, put_in_place, replacing, write_atomically


def test_a_file_that_is_replaced_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), replacing(path) as unfinished:
        unfinished.write_text("ne")
        assert unfinished.suffix == ".png" and unfinished.name.startswith(".")
        raise OSError("the disk is full")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="folders are not synced there")
def test_a_new_file_is_on_the_disk_before_it_has_its_name_and_its_name_before_the_end(
    tmp_path, monkeypatch
):
    done = []
    sync, replace = os.fsync, os.replace

    def fsync(number):
        done.append("folder" if stat.S_ISDIR(os.fstat(number).st_mode) else "file")
        sync(number)

    def rename(*paths):
        done.append("name")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    with replacing(tmp_path / "a.png") as unfinished:
        unfinished.write_text("new")
    assert done == ["file", "name", "folder"]
    done.clear()
    (tmp_path / "partial").mkdir()
    put_in_place(tmp_path / "partial", tmp_path / "whole")
    assert done == ["folder", "name", "folder"] and (tmp_path / "whole").is_dir()


def test_a_disk_that_cannot_sync_folders_is_written_and_a_broken_one_is_told(tmp_path, monkeypatch):
    sync = os.fsync

    def broken(error):
        def fsync(number):
            if stat.S_ISDIR(os.fstat(number).st_mode):
                raise OSError(error, "no")
            sync(number)

        return fsync

    monkeypatch.setattr(os, "fsync", broken(errno.EINVAL))
    write_atomically(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"
    monkeypatch.setattr(os, "fsync", broken(errno.EIO))
    with pytest.raises(OSError, match="no"):
        write_atomically(tmp_path / "a", "newer")


def test_atomic_write_keeps_the_old_file_when_the_new_cannot_be_written(tmp_path, monkeypatch):
    write_atomically(tmp_path / "a", "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "a", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_what_stands_in_the_way_of_a_file_is_named(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(OSError) as caught:
        write_atomically(tmp_path / "a.json", "{}")
    assert caught.value.filename == str(tmp_path / "a.json") and caught.value.filename2 is None


def test_a_long_name_can_be_replaced(tmp_path):
    path = tmp_path / ("x" * 251 + ".png")
    with replacing(path) as unfinished:
        unfinished.write_text("new")
    assert path.read_text() == "new"


def test_digests_of_equal_files_are_equal_in_any_parts(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"0123456789")
    whole = file_digest(tmp_path / "a")
    monkeypatch.setattr(files, "_PART", 3)
    assert file_digest(tmp_path / "a") == whole
    (tmp_path / "a").write_bytes(b"0123456780")
    assert file_digest(tmp_path / "a") != whole
