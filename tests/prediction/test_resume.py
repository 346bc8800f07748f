"""A prediction that was stopped, or that several processes share, ends as one that did neither."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import SMALL, save_picture

from rlr_fast import RLRModel
from rlr_fast.config import InferenceExecution
from rlr_fast.inference.decisions import Decider
from rlr_fast.prediction import row_maker
from rlr_fast.prediction.image_files import find_images
from rlr_fast.prediction.predict import predict
from rlr_fast.prediction.results import ResultsWriter, line
from rlr_fast.prediction.shares import PARTS_FOLDER, SETTINGS_FILE, Share, write_settings
from rlr_fast.training.calibration import Calibration, ClassScores
from rlr_fast.visualization.report import ReportWriter

TABLES = ("results.csv", "results.jsonl", "prediction.json")
THREE = InferenceExecution(batch_size=3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of a model's prediction of ten files, one of which is damaged, made at once."""
    folder = tmp_path_factory.mktemp("whole")
    for i in range(10):
        save_picture(folder / f"images/{i}.png", i)
    (folder / "images/4.png").write_bytes(b"no image")
    model = RLRModel(SMALL).eval()
    predict(model, find_images([folder / "images"]), folder / "out", (0.0, 2.0), THREE)
    return folder, model


def again(whole, out, execution=THREE, **options):
    folder, model = whole
    files = options.pop("files", None) or find_images([folder / "images"])
    options = {"scale": (0.0, 2.0), "resume": True} | options
    return predict(model, files, out, options.pop("scale"), execution, **options)


def same(folder, out):
    names = [*TABLES, *(p.relative_to(folder / "out") for p in (folder / "out").rglob("*.png"))]
    return all((out / name).read_bytes() == (folder / "out" / name).read_bytes() for name in names)


def test_a_table_cut_anywhere_is_completed_to_the_same_bytes(whole, tmp_path):
    folder, _ = whole
    lines = (folder / "out/results.jsonl").read_bytes()
    ends = [0, *(i for i, byte in enumerate(lines, 1) if byte == 10)]  # after each row
    cuts = {0: 0, 5: 0, ends[1]: 0, ends[3] - 1: 0, ends[3]: 3, ends[4] + 1: 3, ends[9]: 9}
    for cut, kept in (cuts | {ends[10]: 10}).items():
        out = tmp_path / str(cut)
        shutil.copytree(folder / "out", out)
        (out / "results.jsonl").write_bytes(lines[:cut])
        (out / "results.csv").write_text("half a ro")
        shutil.rmtree(out / "pictures")
        result = again(whole, out)
        assert (result.scored, len(result.failures)) == (9, 1)
        assert {int(p.stem) for p in out.rglob("*.png")} == set(range(kept, 10)) - {4}
        assert all((out / n).read_bytes() == (folder / "out" / n).read_bytes() for n in TABLES)


def test_a_line_of_zeros_as_a_power_cut_leaves_it_ends_what_is_kept(whole, tmp_path):
    folder, _ = whole
    shutil.copytree(folder / "out", tmp_path / "out")
    lines = (folder / "out/results.jsonl").read_bytes().splitlines(keepends=True)
    lines[7] = bytes(len(lines[7]))
    (tmp_path / "out/results.jsonl").write_bytes(b"".join(lines))
    again(whole, tmp_path / "out")
    assert same(folder, tmp_path / "out")


@pytest.mark.parametrize("lost", [(0, 0, 0), (1, 0, 0), (0, 4, 0), (2, 2, 2), (9, 9, 9)])
def test_the_parts_of_processes_that_were_killed_are_joined(whole, tmp_path, lost):
    """Three processes share the work after three files; each loses its last rows."""
    folder, _ = whole
    out = tmp_path / "out"
    shutil.copytree(folder / "out", out)
    rows = [json.loads(text) for text in (out / "results.jsonl").read_text().splitlines()]
    (out / "results.jsonl").write_text("".join(map(line, rows[:3])))
    (out / PARTS_FOLDER).mkdir()
    for rank, missing in enumerate(lost):
        share = Share(10, 3, 1, rank, 3)
        mine = [line(rows[i]) for i in share]
        part = "".join(mine[: max(0, len(mine) - missing)])
        (out / PARTS_FOLDER / share.part).write_text(part + '{"path": "ha')
    shutil.rmtree(out / "pictures")
    again(whole, out)
    assert not (out / PARTS_FOLDER).exists()
    assert all((out / n).read_bytes() == (folder / "out" / n).read_bytes() for n in TABLES)
    first = next((b for b in (1, 2, 3) if lost[b - 1]), 4)
    assert {int(p.stem) for p in out.rglob("*.png")} == set(range(3 * first, 10)) - {4}


def test_parts_that_were_joined_in_part_are_joined_once(whole, tmp_path):
    """A kill while the rows of parts are appended: they stand in both places."""
    folder, _ = whole
    out = tmp_path / "out"
    shutil.copytree(folder / "out", out)
    rows = [json.loads(text) for text in (out / "results.jsonl").read_text().splitlines()]
    (out / "results.jsonl").write_text("".join(map(line, rows[:7])))
    (out / PARTS_FOLDER).mkdir()
    for rank in range(2):
        share = Share(10, 3, 0, rank, 2)
        (out / PARTS_FOLDER / share.part).write_text("".join(line(rows[i]) for i in share))
    done = []
    again(whole, out, progress=done.append)
    assert done == [10] and same(folder, out)


def test_shares_are_whole_batches_in_turn_and_all_files():
    shares = [list(Share(20, 3, 2, rank, 3)) for rank in range(3)]
    assert shares == [[6, 7, 8, 15, 16, 17], [9, 10, 11, 18, 19], [12, 13, 14]]


def test_without_resume_all_is_scored_anew(whole, tmp_path):
    folder, _ = whole
    shutil.copytree(folder / "out", tmp_path / "out")
    (tmp_path / "out" / PARTS_FOLDER).mkdir()
    (tmp_path / "out" / PARTS_FOLDER / "rows-0-0-2.jsonl").write_text("{}")
    done = []
    again(whole, tmp_path / "out", resume=False, progress=done.append)
    assert done == [3, 3, 3, 1] and same(folder, tmp_path / "out")
    assert not (tmp_path / "out" / PARTS_FOLDER).exists()


def test_nothing_to_resume_is_told_and_begun(whole, tmp_path, caplog):
    folder, _ = whole
    again(whole, tmp_path / "out")
    assert "there is no prediction in" in caplog.text and same(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": (0.0, 1.0)}, r"scale was \[0.0, 2.0\], now \[0.0, 1.0\]"),
        ({"masks": True}, "masks was False, now True"),
        ({"execution": InferenceExecution(batch_size=2)}, "batch_size was 3, now 2"),
        ({"execution": InferenceExecution(batch_size=3, precision="bf16")}, "precision was fp32"),
        ({"tile": 48}, "tile was None, now"),
    ],
)
def test_other_settings_are_refused_and_nothing_is_lost(whole, tmp_path, options, message):
    folder, _ = whole
    shutil.copytree(folder / "out", tmp_path / "out")
    with pytest.raises(ValueError, match=message) as error:
        again(whole, tmp_path / "out", **options)
    assert "without --resume or --watch all files are scored anew" in str(error.value)
    assert same(folder, tmp_path / "out")


def test_relative_paths_are_of_the_folder_where_the_prediction_began(whole, tmp_path, monkeypatch):
    folder, _ = whole
    shutil.copytree(folder / "out", tmp_path / "out")
    settings = tmp_path / "out" / SETTINGS_FILE
    assert json.loads(settings.read_text())["folder"] is None  # these are absolute
    write_settings(tmp_path / "out", json.loads(settings.read_text()), [Path("in/a.png")])
    assert json.loads(settings.read_text())["folder"] == os.getcwd()
    again(whole, tmp_path / "out")
    write_settings(tmp_path / "out", json.loads(settings.read_text()), [Path("in/a.png")])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"are relative to '.*': go on there, or choose another"):
        again(whole, tmp_path / "out")
    for table in TABLES[:2]:
        assert (tmp_path / "out" / table).read_bytes() == (folder / "out" / table).read_bytes()


def test_a_prediction_from_before_a_setting_existed_goes_on(whole, tmp_path):
    folder, _ = whole
    shutil.copytree(folder / "out", tmp_path / "out")
    settings = tmp_path / "out" / SETTINGS_FILE
    values = json.loads(settings.read_text())
    settings.write_text(json.dumps({k: v for k, v in values.items() if k != "components"}))
    again(whole, tmp_path / "out")
    assert same(folder, tmp_path / "out")


def test_another_calibration_is_another_setting(whole, tmp_path):
    def decider(score):
        scores = ClassScores.of([(score, score, str(i)) for i in range(9)], "test")
        return Decider(Calibration({}, {"bolt": scores}), 0.1)

    again(whole, tmp_path / "out", decider=decider(1.0))
    again(whole, tmp_path / "out", decider=decider(1.0))
    with pytest.raises(ValueError, match="decisions was"):
        again(whole, tmp_path / "out", decider=decider(2.0))


def test_other_files_are_refused_and_more_of_them_are_not(whole, tmp_path):
    folder, _ = whole
    files = list(find_images([folder / "images"]))
    shutil.copytree(folder / "out", tmp_path / "out")
    with pytest.raises(ValueError, match=r"file 1 was '.*0\.png' of class None and is '.*1\.png'"):
        again(whole, tmp_path / "out", files=files[1:])
    with pytest.raises(ValueError, match=r"file 9 was '.*8\.png' of class None and is not there"):
        again(whole, tmp_path / "out", files=files[:8])
    (tmp_path / "out/results.jsonl").write_bytes(
        b"".join((folder / "out/results.jsonl").read_bytes().splitlines(keepends=True)[:5])
    )
    again(whole, tmp_path / "out", files=files[:5])
    again(whole, tmp_path / "out", files=files)
    assert same(folder, tmp_path / "out")


def test_a_damaged_record_is_told(whole, tmp_path):
    folder, _ = whole
    shutil.copytree(folder / "out", tmp_path / "out")
    for text in ("{", "[]"):
        (tmp_path / "out/prediction.json").write_text(text)
        with pytest.raises(ValueError, match=r"prediction\.json is damaged: .*without --resume"):
            again(whole, tmp_path / "out")


def test_two_predictions_into_one_folder_are_refused(whole, tmp_path, monkeypatch):
    draw, met = row_maker._draw, []

    def meanwhile(*args):
        draw(*args)
        if not met:
            with pytest.raises(BlockingIOError, match="another process works in") as error:
                again(whole, tmp_path / "out")
            met.append(error)

    monkeypatch.setattr(row_maker, "_draw", meanwhile)
    again(whole, tmp_path / "out", InferenceExecution(batch_size=3, workers=1))
    assert met and same(whole[0], tmp_path / "out")


def test_a_report_of_a_part_is_refused(whole, tmp_path):
    with pytest.raises(ValueError, match="--report needs all files in one run"):
        again(whole, tmp_path / "out", report=object())


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError], ids=lambda e: e.__name__)
def test_a_batch_whose_rows_were_interrupted_is_not_written_twice(
    whole, tmp_path, monkeypatch, error
):
    write, rows = ResultsWriter.write, []

    def interrupted(self, row):
        write(self, row)
        rows.append(row["path"])
        if len(rows) == 5:  # in the middle of a batch
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(ResultsWriter, "write", interrupted)
        with pytest.raises(error):
            again(whole, tmp_path / "out")
    assert len(rows) == len(set(rows)) == 5
    again(whole, tmp_path / "out")
    assert same(whole[0], tmp_path / "out")


def test_a_second_prediction_leaves_the_report_of_the_first(whole, tmp_path, monkeypatch):
    def made():
        return ReportWriter(tmp_path / "out", "prediction", (0.0, 2.0), {})

    draw, met = row_maker._draw, []

    def meanwhile(*args):
        draw(*args)
        if not met:
            before = sorted(p.name for p in (tmp_path / "out").iterdir())
            with pytest.raises(BlockingIOError, match="another process works in"):
                again(whole, tmp_path / "out", resume=False, report=made)
            met.append(before == sorted(p.name for p in (tmp_path / "out").iterdir()))

    monkeypatch.setattr(row_maker, "_draw", meanwhile)
    one_by_one = InferenceExecution(batch_size=3, workers=1)
    again(whole, tmp_path / "out", one_by_one, resume=False, report=made)
    assert met == [True]
    assert (tmp_path / "out/report.html").read_text().count("images/9.png") >= 1
