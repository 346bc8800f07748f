"""Which files a prediction finds, their classes, and the names of their pictures."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest
from conftest import save_picture

from rlr_fast.prediction.image_files import find_images, picture_name


def test_masks_of_a_data_set_are_left_out_and_told(tree, caplog):
    found = [file.path for file in find_images([tree])]
    assert found and not any("ground_truth" in path.parts for path in found)
    assert {path.parts[-3] for path in found} == {"train", "test"}
    assert f"the masks in {tree / 'bolt/ground_truth'} are not scored" in caplog.text
    assert len(find_images([tree / "bolt/ground_truth"])) == 2  # asked for


def test_small_pictures_of_an_earlier_report_are_not_scored(tmp_path):
    save_picture(tmp_path / "images/a.png", 1)
    save_picture(tmp_path / "images/report/0000/0000000.jpg", 1)
    files = find_images([tmp_path / "images"], tmp_path / "images")
    assert [f.path.name for f in files] == ["a.png"]


@pytest.mark.parametrize("name", ["pictures", "masks"])
@pytest.mark.parametrize("path", ["", "line1", "line1/a.png"])
def test_images_where_pictures_are_written_are_refused(name, path, tmp_path):
    save_picture(tmp_path / name / "line1/a.png", 1)
    with pytest.raises(ValueError, match=f"/{name}', where a prediction writes"):
        find_images([tmp_path / name / path], tmp_path)
    (tmp_path / "results.csv").touch()  # of an earlier prediction
    with pytest.raises(ValueError, match=f"/{name}', where a prediction writes"):
        find_images([tmp_path / name / path], tmp_path)


@pytest.mark.parametrize("name", ["pictures", "masks"])
def test_a_folder_of_no_prediction_is_not_taken_for_one(name, tmp_path):
    """It would be written into, and its images left out."""
    save_picture(tmp_path / "a.png", 1)
    (tmp_path / name).mkdir()
    assert len(find_images([tmp_path], tmp_path)) == 1
    save_picture(tmp_path / name / "b.png", 1)
    with pytest.raises(ValueError, match=f"/{name}' is of no prediction"):
        find_images([tmp_path], tmp_path)


def test_pictures_of_a_prediction_elsewhere_are_left_out_and_told(tmp_path, caplog):
    save_picture(tmp_path / "images/a.png", 1)
    save_picture(tmp_path / "images/maps/pictures/images/a.png", 1)
    save_picture(tmp_path / "images/pictures/b.png", 1)  # of no prediction
    (tmp_path / "images/maps/results.csv").touch()
    for out in (None, tmp_path / "images/maps2"):
        found = find_images([tmp_path / "images"], out)
        assert [f.path.name for f in found] == ["a.png", "b.png"]
        told = f"the pictures of an earlier prediction in {tmp_path}/images/maps/pictures are not"
        assert told in caplog.text
    caplog.clear()
    assert len(find_images([tmp_path / "images"], tmp_path / "images/maps")) == 2
    assert not caplog.records  # those of this prediction
    assert len(find_images([tmp_path / "images/maps/pictures"])) == 1  # asked for


def test_single_files_of_one_name_do_not_share_a_picture(tmp_path):
    for name in ("a/x.png", "b/x.png"):
        save_picture(tmp_path / name, 1)
    files = find_images([tmp_path / "a/x.png", tmp_path / "b/x.png"])
    assert len({f.picture for f in files}) == 2


@pytest.mark.parametrize("path", ["missing.png", "empty"])
def test_paths_without_images_are_named(path, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=path):
        find_images([tmp_path / path])


def test_a_list_gives_its_files_by_place_and_by_slice(tree):
    files = find_images([tree / "bolt/test", tree / "cloth/test/good/001.png"])
    assert len(files) == 5
    assert [files[i] for i in range(-5, 5)] == list(files) * 2
    assert files[1:4] == list(files)[1:4]
    assert [file.path for file in files] == sorted(file.path for file in files)
    with pytest.raises(IndexError):
        files[5]


def test_classes_are_those_of_folders(tree):
    files = find_images([tree]).classified(["bolt", "zip"])
    assert {(f.path.relative_to(tree).parts[0], f.category) for f in files} == {
        ("bolt", "bolt"),
        ("cloth", None),
    }
    assert files.categories == {"bolt", None}
    assert files.count("bolt") == files.count(None) == 9 and files.count("zip") == 0
    assert find_images([tree]).of_class("zip").count("zip") == 18


def test_a_file_in_folders_of_two_classes_is_named(tree):
    with pytest.raises(ValueError, match=r"000\.png' lies in folders of two classes"):
        find_images([tree]).classified(["bolt", tree.name])


def test_links_are_followed_and_a_circle_ends(tmp_path):
    save_picture(tmp_path / "elsewhere/deep/a.png", 1)
    save_picture(tmp_path / "images/b.png", 1)
    (tmp_path / "images/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "images")
    found = [f.path.relative_to(tmp_path / "images") for f in find_images([tmp_path / "images"])]
    assert found == [Path("b.png"), Path("link/deep/a.png")]


def test_hidden_files_and_folders_are_left_out(tmp_path):
    for name in ("a.png", ".b.png", ".trash/c.png"):
        save_picture(tmp_path / "images" / name, 1)
    assert [f.path.name for f in find_images([tmp_path / "images"])] == ["a.png"]


def test_no_two_images_of_a_folder_share_a_picture():
    names = ["a.jpg", "a.png", "a.jpg.png", "a.jpg.png.png", "a.PNG", "a.b.png"]
    pictures = [picture_name(Path(name)) for name in names]
    assert len(set(pictures)) == len(names) and all(p.suffix == ".png" for p in pictures)


def test_a_file_takes_little_memory(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(2000):
        (tmp_path / f"images/{i:020d}.png").touch()
    tracemalloc.start()
    files = find_images([tmp_path / "images"])
    traces = tracemalloc.take_snapshot().traces
    tracemalloc.stop()
    # The interpreter's table of interned strings grows now and then, at once, by megabytes.
    used = sum(trace.size for trace in traces if trace.size < 2**20)
    assert len(files) == 2000 and used < 300_000


def test_a_name_too_long_for_its_pictures_is_cut_and_stays_its_own(tmp_path):
    for letter in "ab":
        save_picture(tmp_path / f"{'ü' * 124}{letter}.jpg", 0)
    names = [file.picture.name for file in find_images([tmp_path])]
    assert len(set(names)) == 2 and all(len(os.fsencode(name)) <= 255 for name in names)
    assert all(name.startswith("ü" * 118) and name.endswith(".png") for name in names)


def test_links_to_a_folder_that_is_listed_too_have_pictures_of_their_own(tmp_path):
    for day in ("d1", "d2"):
        save_picture(tmp_path / day / "images/0.png", 1)
    (tmp_path / "latest").symlink_to("d2")
    files = find_images(sorted(tmp_path.glob("*/images")))
    assert len({file.picture for file in files}) == len(files) == 3
    beside = find_images([tmp_path / "d1/images", tmp_path / "d1/../d2/images"])
    assert all(".." not in file.picture.parts for file in beside)
