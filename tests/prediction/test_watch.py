"""Watching a folder: every file that arrives has one row, whatever stops the process."""

from __future__ import annotations

import json
import os

import pytest
from conftest import SMALL, save_picture

from rlr_fast import RLRModel
from rlr_fast.config import InferenceExecution
from rlr_fast.prediction import row_maker
from rlr_fast.prediction.predict import predict
from rlr_fast.prediction.shares import PARTS_FOLDER
from rlr_fast.prediction.watch import watch


@pytest.fixture(scope="module")
def model():
    return RLRModel(SMALL).eval()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def steps(*actions, looks=4):
    """Say when to stop: after the actions, each done before a look, and some more looks."""
    waiting = iter(actions)
    left = [looks]

    def stop():
        action = next(waiting, None)
        if action is not None:
            action()
            return False
        left[0] -= 1
        return left[0] < 0

    return stop


def start(model, folder, *actions, **options):
    out = options.pop("out", folder.parent / "out")
    options = {"settle": 0, "stop": steps(*actions)} | options
    return watch(model, [folder], out, (0.0, 2.0), InferenceExecution(batch_size=2), **options)


def table(folder):
    lines = (folder.parent / "out/results.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def names(folder):
    return [os.path.basename(row["path"]) for row in table(folder)]


def test_a_folder_into_which_pictures_are_written_is_not_watched(model, tmp_path):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(ValueError, match="where a prediction writes"):
        start(model, tmp_path / "pictures", out=tmp_path)


def arrive(folder, *files):
    def action():
        for place, name in enumerate(files):
            save_picture(folder / name, 1)
            os.utime(folder / name, (place, place))

    return action


def test_files_have_rows_and_pictures_as_they_arrive(model, folder):
    told = []
    arrive(folder, "old.png")()
    later = (lambda: None, lambda: None, arrive(folder, "b.png", "a.png", "sub/c.jpg"))
    result = start(model, folder, *later, told=told.append)
    assert names(folder) == ["old.png", "b.png", "a.png", "c.jpg"] and told == table(folder)
    assert result.scored == 4 and result.failures == []
    found = {str(p.relative_to(folder.parent / "out")) for p in folder.parent.glob("out/**/*.png")}
    pictures = ("old.png", "b.png", "a.png", "sub/c.jpg.png")
    assert found == {f"pictures/in/{name}" for name in pictures}
    csv = (folder.parent / "out/results.csv").read_text().splitlines()
    assert len(csv) == 5 and csv[1].startswith(table(folder)[0]["path"])


def test_a_damaged_file_and_one_of_two_classes_are_left_out_once(model, folder):
    def damaged():
        (folder / "bolt/nut").mkdir(parents=True)
        (folder / "a.png").write_bytes(b"no image")

    result = start(
        model, folder, damaged, arrive(folder, "bolt/nut/b.png"), classes=["bolt", "nut"]
    )
    rows = table(folder)
    assert [row["score"] for row in rows] == [None, None] and result.scored == 0
    assert "not an image of a known format" in rows[0]["failure"]
    assert "folders of two classes" in rows[1]["failure"]


def test_a_second_call_goes_on_with_what_has_no_row(model, folder):
    start(model, folder, arrive(folder, "a.png", "b.png"))
    before = table(folder)
    with open(folder.parent / "out/results.jsonl", "a") as file:
        file.write('{"path": "half a li')  # as a kill leaves it
    (folder.parent / "out/results.csv").write_text("")
    told = []
    start(model, folder, arrive(folder, "c.png"), told=told.append)
    assert names(folder) == ["a.png", "b.png", "c.png"] and table(folder)[:2] == before
    assert [os.path.basename(row["path"]) for row in told] == ["c.png"]
    assert len((folder.parent / "out/results.csv").read_text().splitlines()) == 4


def test_an_interruption_is_the_end_and_what_is_scored_has_its_row(model, folder):
    def interrupt():
        raise KeyboardInterrupt

    result = start(model, folder, arrive(folder, "a.png"), lambda: None, interrupt)
    assert result.scored == 1 and names(folder) == ["a.png"]


@pytest.mark.parametrize("place", [1, 2, 3])
def test_a_stop_while_it_draws_loses_and_repeats_nothing(model, folder, place, monkeypatch):
    draw, drawn = row_maker._draw, []

    def stop(*args):
        drawn.append(args)
        if len(drawn) == place:
            raise OSError(28, "No space left on device")
        draw(*args)

    arrive(folder, "a.png", "b.png", "c.png")()
    monkeypatch.setattr(row_maker, "_draw", stop)
    with pytest.raises(OSError, match="No space left"):
        start(model, folder)
    assert len(table(folder)) < 3
    start(model, folder)
    assert names(folder) == ["a.png", "b.png", "c.png"]
    assert len(list((folder.parent / "out/pictures").rglob("*.png"))) == 3


def test_other_settings_are_refused(model, folder):
    start(model, folder, arrive(folder, "a.png"))
    before = table(folder)
    with pytest.raises(ValueError, match="masks was False, now True"):
        start(model, folder, masks=True)
    assert table(folder) == before


def test_rows_of_processes_that_were_killed_are_not_thrown_away(model, folder):
    start(model, folder, arrive(folder, "a.png"))
    (folder.parent / "out" / PARTS_FOLDER).mkdir()
    (folder.parent / "out" / PARTS_FOLDER / "rows-1-0-2.jsonl").touch()
    with pytest.raises(ValueError, match="finish it by predict --resume"):
        start(model, folder)


def test_two_folders_with_a_name_of_a_file_share_no_picture(model, tmp_path):
    for name in ("x/in", "y/in"):
        save_picture(tmp_path / name / "a.png", 1)
    folders = [tmp_path / "x/in", tmp_path / "y/in"]
    watch(model, folders, tmp_path / "out", (0.0, 2.0), settle=0, stop=steps())
    assert len(list((tmp_path / "out/pictures").rglob("*.png"))) == 2


def test_another_folder_of_the_name_leaves_the_pictures_of_the_first(model, tmp_path):
    for seed, name in enumerate(("x/in", "y/in", "x/in")):
        save_picture(tmp_path / name / f"{seed // 2}.png", seed)
        watch(model, [tmp_path / name], tmp_path / "out", (0.0, 2.0), settle=0, stop=steps())
    assert len((tmp_path / "out/results.jsonl").read_text().splitlines()) == 3
    assert len(list((tmp_path / "out/pictures").rglob("*.png"))) == 3


@pytest.mark.parametrize("name", ["results.jsonl", "results.csv"])
def test_tables_that_are_taken_away_are_told(model, folder, name):
    def take():
        (folder.parent / "out" / name).rename(folder.parent / name)

    looks = (lambda: None, lambda: None)
    with pytest.raises(FileNotFoundError, match="removed, moved or replaced while rows"):
        start(model, folder, arrive(folder, "a.png"), *looks, take)


def test_a_table_that_was_taken_away_is_made_again(model, folder):
    start(model, folder, arrive(folder, "a.png"))
    (folder.parent / "out/results.csv").unlink()
    start(model, folder, arrive(folder, "b.png"))
    assert len((folder.parent / "out/results.csv").read_text().splitlines()) == 3


def test_it_goes_on_with_a_prediction(model, folder, tmp_path):
    from rlr_fast.prediction.image_files import find_images

    arrive(folder, "a.png", "b.png")()
    out = tmp_path / "out"
    execution = InferenceExecution(batch_size=2)
    predict(model, find_images([folder]), out, (0.0, 2.0), execution)
    told = []
    start(model, folder, arrive(folder, "c.png"), told=told.append)
    assert names(folder) == ["a.png", "b.png", "c.png"] and len(told) == 1
