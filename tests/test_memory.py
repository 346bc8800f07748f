"""Memory at hand, in containers too."""

from __future__ import annotations

import multiprocessing
import threading
import time
from types import SimpleNamespace
from unittest import mock

import psutil
import pytest

from rlr_fast.cli import memory_watch
from rlr_fast.memory import GroupMemory, available_memory

VERSION_2 = ("sys/fs/cgroup", "memory.max", "memory.current", "active_file")
VERSION_1 = (
    "sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "total_inactive_file",
)


@pytest.fixture
def without_swap(monkeypatch):
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(total=0))


def make_group(root, version, path, limit, used=0, cached=0):
    place, limits, uses, cache = version
    folder = root / place / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limits).write_text(f"{limit}\n")
    (folder / uses).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 7\n{cache} {cached}\n")


def belong_to(root, line):
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text(f"3:cpuset:/\n{line}\n")


@pytest.mark.parametrize("version", [VERSION_1, VERSION_2], ids=["1", "2"])
def test_the_least_that_is_left_of_the_groups_counts(tmp_path, version):
    belong_to(tmp_path, "0::/queue/job" if version is VERSION_2 else "4:memory:/queue/job")
    make_group(tmp_path, version, "queue", 5000, used=4600, cached=500)
    make_group(tmp_path, version, "queue/job", 3000, used=1000)
    assert available_memory(tmp_path) == 900
    make_group(tmp_path, version, "queue/job", 3000, used=2200)
    assert available_memory(tmp_path) == 800
    make_group(tmp_path, version, "queue/job", 3000, used=3100)
    assert available_memory(tmp_path) == 0


def test_the_group_of_a_container_is_the_root_of_what_it_sees(tmp_path):
    belong_to(tmp_path, "0::/docker/0123")
    make_group(tmp_path, VERSION_2, "", 1000, used=100)
    assert available_memory(tmp_path) == 900


@pytest.mark.parametrize("limit", ["max", "9223372036854771712", ""])
def test_without_a_limit_the_machine_counts(tmp_path, limit, monkeypatch):
    there = psutil.virtual_memory()._replace(available=12345)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: there)
    assert available_memory(tmp_path) == 12345  # no groups
    belong_to(tmp_path, "0::/")
    make_group(tmp_path, VERSION_2, "", limit)
    assert available_memory(tmp_path) == 12345


def test_the_command_ends_with_a_line_where_the_memory_of_its_group_ends(capfd, without_swap):
    """In a process of its own, which ends at once."""
    left = iter([2**30, 2**27, 2**26 + 1, 2**25])

    def job():
        with (
            mock.patch.object(memory_watch, "group_memory", lambda: GroupMemory(next(left), 2**30)),
            memory_watch.watched_memory("less is less"),
        ):
            time.sleep(60)

    child = multiprocessing.get_context("fork").Process(target=job)
    child.start()
    child.join(30)
    assert child.exitcode == 2
    assert capfd.readouterr().err == (
        "\nrlr-fast: error: out of memory: the 1024 MiB that this container may take are nearly "
        "full; less is less\n"
    )


@pytest.mark.parametrize("swap", [0, 1])
def test_nothing_is_watched_without_a_limit_or_with_swap_space(monkeypatch, swap):
    memory = GroupMemory(0, 2**30) if swap else None
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(total=swap))
    monkeypatch.setattr(memory_watch, "group_memory", lambda: memory)
    with memory_watch.watched_memory("less is less"):
        assert not [t for t in threading.enumerate() if t.name == "memory"]
