"""Files that arrive: when one is complete, in which order they are told, and that each is once."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from rlr_fast.prediction import arrivals as module
from rlr_fast.prediction.arrivals import Arrivals


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def names(found):
    return [path.name for path in found]


def write(path, size=10, changed=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    if changed is not None:
        os.utime(path, (changed, changed))


def test_a_file_is_told_once_when_it_did_not_change_for_a_while(folder, tmp_path, clock):
    arrivals = Arrivals([folder], tmp_path / "out", settle=2, clock=clock)
    assert arrivals.poll() == []
    write(folder / "a.png", 10)
    told = []
    for now in range(8):
        clock.now = now
        if now == 2:
            write(folder / "a.png", 20)  # still being written
        told += [(now, name) for name in names(arrivals.poll())]
    assert told == [(4, "a.png")]
    write(folder / "a.png", 30)
    clock.now = 20
    assert arrivals.poll() == []


def test_order_is_that_of_the_last_changes(folder, tmp_path, clock):
    arrivals = Arrivals([folder], tmp_path / "out", settle=1, clock=clock)
    for name, changed in (("c.png", 100), ("a.jpg", 300), ("sub/b.png", 200), ("z.png", 100)):
        write(folder / name, changed=changed)
    arrivals.poll()
    clock.now = 1
    assert names(arrivals.poll()) == ["c.png", "z.png", "b.png", "a.jpg"]


def test_what_is_no_new_image_is_not_told(folder, tmp_path, clock):
    out = folder / "results"
    for name in (".a.png", "a.png.partial", "a.txt", "results/pictures/a.png", ".sub/a.png"):
        write(folder / name)
    write(folder / "done.png")
    arrivals = Arrivals([folder], out, {str(folder / "done.png")}, settle=0, clock=clock)
    assert [arrivals.poll() for _ in range(3)] == [[]] * 3


def test_a_file_that_goes_before_it_is_complete_is_forgotten(folder, tmp_path, clock):
    arrivals = Arrivals([folder], tmp_path / "out", settle=1, clock=clock)
    write(folder / "a.png")
    arrivals.poll()
    (folder / "a.png").unlink()
    for clock.now in (1, 2, 3):
        assert arrivals.poll() == []
    write(folder / "a.png")
    told = []
    for clock.now in (4, 5, 6, 7):
        told += names(arrivals.poll())
    assert told == ["a.png"]


def test_a_folder_without_changes_is_not_listed_again(folder, tmp_path, clock, monkeypatch):
    listed = []
    list_images = module.list_images
    monkeypatch.setattr(module, "list_images", lambda f: listed.append(f) or list_images(f))
    write(folder / "a.png")
    monkeypatch.setattr(module.time, "time", lambda: time.monotonic() + 1e10)  # long after
    arrivals = Arrivals([folder], tmp_path / "out", settle=0, clock=clock)
    for clock.now in (0, 1, 2, 4, 5):  # once more when a change in the same second would be over
        arrivals.poll()
    assert listed == [folder] * 2
    listed.clear()
    monkeypatch.undo()
    monkeypatch.setattr(module, "list_images", lambda f: listed.append(f) or list_images(f))
    write(folder / "b.png")  # now: the clock of the file system may not tell a further change
    for _ in range(5):
        arrivals.poll()
    assert len(listed) == 5


@pytest.mark.parametrize("behind", [-30, 0, 30])
def test_a_file_that_leaves_the_times_of_its_folder_is_told(
    folder, tmp_path, clock, monkeypatch, behind
):
    """A server has its own clock, and stamps of a second: two changes may show one time."""
    then = (int(time.time()) - behind) * 10**9
    monkeypatch.setattr(module, "_times_of_change", lambda folder: (then, then))
    arrivals = Arrivals([folder], tmp_path / "out", settle=0, clock=clock)
    told = []
    for name in ("a.png", "b.png"):
        write(folder / name)
        for _ in range(2):
            told += names(arrivals.poll())
            clock.now += 0.2
    for _ in range(20):
        told += names(arrivals.poll())
        clock.now += 0.2
    assert told == ["a.png", "b.png"]


def test_an_archive_that_sets_the_time_of_its_folder_back_hides_nothing(
    folder, tmp_path, clock, monkeypatch
):
    monkeypatch.setattr(module.time, "time", lambda: time.monotonic() + 1e10)  # long after
    arrivals = Arrivals([folder], tmp_path / "out", settle=0, clock=clock)
    told = []
    for name in ("a.png", "b.png", "c.png"):
        write(folder / name)
        os.utime(folder, (1e9, 1e9))
        for _ in range(4):
            told += names(arrivals.poll())
            clock.now += 2
    assert told == ["a.png", "b.png", "c.png"]


def test_a_folder_may_be_named_otherwise(folder, tmp_path, clock, monkeypatch):
    write(folder / "a.png")
    monkeypatch.chdir(tmp_path)
    arrivals = Arrivals([Path("in")], tmp_path / "out", [str(folder / "a.png")], 0, clock)
    assert [arrivals.poll() for _ in range(3)] == [[]] * 3


def test_nothing_is_missed_among_files_that_come_while_it_looks(folder, tmp_path, clock):
    arrivals = Arrivals([folder], tmp_path / "out", settle=1, clock=clock)
    told = []
    for i in range(40):
        write(folder / f"{i % 3}" / f"{i:02d}.png")
        if i % 7 == 0:
            clock.now += 1
            told += names(arrivals.poll())
    for _ in range(3):
        clock.now += 1
        told += names(arrivals.poll())
    assert sorted(told) == [f"{i:02d}.png" for i in range(40)]


@pytest.mark.parametrize(
    ("where", "settle", "message"),
    [
        ("nowhere", 1, "what is watched must be a folder, '.*nowhere' is none"),
        ("", -1, "settle must be 0 seconds or more, got -1"),
        ("", float("nan"), "settle must be 0 seconds or more, got nan"),
    ],
)
def test_what_cannot_be_watched_is_refused(folder, tmp_path, where, settle, message):
    with pytest.raises(ValueError, match=message):
        Arrivals([folder / where], tmp_path / "out", settle=settle)
