"""The page of a report as written: data that come back, limits, and nothing from a network."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_cases import HOSTILE, SCALE, image, labeled, write

from rlr_fast.visualization.heat_maps import opacity, paint, position
from rlr_fast.visualization.report import ReportWriter, check_report
from rlr_fast.visualization.report.thumbnails import MAP_SIDE, PICTURE_SIDE, color_tables


class Page(html.parser.HTMLParser):
    """A page as a browser reads it: its elements, and what stands in those that hold raw text."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.texts, self._at = [], {}, None
        self.feed(path.read_text(encoding="utf-8"))
        self.rows, self.data = (json.loads(self.texts[name]) for name in ("rows", "data"))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._at = dict(attrs).get("id", tag) if tag in ("script", "style") else None

    def handle_data(self, text):
        if self._at is not None:
            self.texts[self._at] = self.texts.get(self._at, "") + text

    def handle_endtag(self, tag):
        self._at = None


def decoded(uri):
    assert uri.startswith("data:image/")
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_rows_come_back_as_they_were_given(tmp_path):
    given = labeled(20)
    page = Page(write(tmp_path, given))
    assert len(page.rows) == 20
    for i, (row, expected) in enumerate(zip(page.rows, given, strict=True)):
        index, path, link, category, defect, score, p_value, calibrated, *size = row[:10]
        assert (index, path, category, defect) == (
            i, str(expected.path), expected.category, expected.defect,
        )  # fmt: skip
        assert (score, p_value, calibrated, tuple(size)) == (expected.score, None, 0, (80, 120))
        assert decoded(row[10]).size == (120, 80) and decoded(row[11]).size == (6, 4)
        assert (row[12] is None) == (expected.mask is None)
        assert link.startswith("./") or link.startswith("./..")
    assert page.data["kind"] == "evaluation" and not page.data["stopped"]
    assert dict(page.data["facts"])["Backbone"] == "some <b>network</b>"


def test_a_gray_map_holds_places_in_the_scale_and_keeps_a_small_peak(tmp_path):
    scores = np.zeros((1000, 1500), dtype=np.float32)
    scores[700, 300] = 2.0
    mask = scores > 1
    [row] = Page(
        write(tmp_path, [image("a.png", None, 1.0, score_map=scores, mask=mask, size=(100, 900))])
    ).rows
    assert decoded(row[10]).size == (256, 28)
    gray = np.asarray(decoded(row[11]))
    assert gray.shape == (MAP_SIDE, MAP_SIDE)
    y, x = np.unravel_index(gray.argmax(), gray.shape)
    assert (y, x) == (700 * MAP_SIDE // 1000, 300 * MAP_SIDE // 1500)
    expected = 255 * position(np.array([[2.0]], np.float32), SCALE).item()
    assert int(gray.max()) == pytest.approx(expected, abs=25)  # JPEG
    marked = np.asarray(decoded(row[12]))
    assert marked.shape == (PICTURE_SIDE, PICTURE_SIDE) and marked.sum() == 1


def test_the_browser_gets_the_colors_of_the_heat_maps():
    tables = color_tables(SCALE)
    place = np.linspace(0, 1, 300, dtype=np.float32)
    steps = np.linspace(0, 1, len(tables["red"]))
    names = ("red", "green", "blue")
    mixed = np.stack([np.interp(place, steps, tables[name]) for name in names], axis=-1)
    assert np.abs(255 * mixed - paint(place[None])[0]).max() < 4
    assert np.abs(np.interp(place, steps, tables["opacity"]) - opacity(place)).max() < 2e-3


def test_hostile_names_are_data(tmp_path):
    rows = [image(name, name, 1.0, defect=name) for name in HOSTILE]
    path = write(tmp_path, rows, normal="good")
    plain = Page(write(tmp_path / "plain", [image("a", "a", 1.0, defect="a")]))
    page = Page(path)
    assert [(row[1], row[3], row[4]) for row in page.rows] == [(n, n, n) for n in HOSTILE]
    assert page.elements == plain.elements  # no name made an element
    assert page.texts["script"] == plain.texts["script"]
    assert all(re.fullmatch(r"[./\w%~-]+", row[2]) for row in page.rows), "a link of a name"
    assert path.read_text(encoding="utf-8").count("</script>") == 3


def test_nothing_comes_from_a_network_and_no_other_script_runs(tmp_path):
    path = write(tmp_path, labeled(6))
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//cdn|@import|url\((?!#)", text)
    page = Page(path)
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") or name == "style" for name in attributes), tag
        assert "src" not in attributes and attributes.get("href", "data:,") in (
            "#gallery",
            "data:,",
        )
    [policy] = [a["content"] for _, a in page.elements if "Content-Security" in str(a)]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    html_tag = next(attributes for tag, attributes in page.elements if tag == "html")
    assert html_tag["lang"] == "en" and "<title>" in text


def test_a_report_of_nothing_is_a_page(tmp_path):
    page = Page(write(tmp_path, []))
    assert page.rows == [] and page.data["metrics"] is None and page.data["thresholds"] == []


def test_beyond_the_limit_pictures_are_files_beside_the_page(tmp_path):
    size = len(json.dumps(Page(write(tmp_path / "a", labeled(1))).rows[0][10:]))
    limit = 4 * size
    path = write(tmp_path / "b", labeled(20), embed_limit=limit)
    rows = Page(path).rows
    embedded = [row for row in rows if row[10].startswith("data:")]
    assert 0 < len(embedded) < len(rows)
    assert sum(len(uri) for row in embedded for uri in row[10:] if uri) <= limit
    assert embedded == rows[: len(embedded)], "whole rows, the first ones"
    for row in rows[len(embedded) :]:
        for place in filter(None, row[10:]):
            assert not Path(place).is_absolute() and place.startswith("report/")
            Image.open(path.parent / place).load()


def test_a_second_report_leaves_nothing_of_the_first(tmp_path):
    write(tmp_path, labeled(6), embed_limit=0)
    own = tmp_path / "report/0000/notes.txt"
    own.write_text("of the user")
    write(tmp_path, labeled(1))
    files = {file for file in tmp_path.rglob("*") if file.is_file()}
    assert files == {own, tmp_path / "report.html"}


def test_an_interruption_leaves_a_page_that_says_so(tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        ReportWriter(tmp_path, "prediction", SCALE, {}) as report,
    ):
        report.add(0, image("a.png", None, 1.0))
        raise KeyboardInterrupt
    page = Page(tmp_path / "report.html")
    assert page.data["stopped"] and len(page.rows) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_what_cannot_be_shown_is_refused(tmp_path):
    with ReportWriter(tmp_path, "prediction", SCALE, {}) as report:
        with pytest.raises(ValueError, match=r"score must be finite, got nan of a\.png"):
            report.add(0, image("a.png", None, float("nan")))
        with pytest.raises(ValueError, match="score_map must be finite"):
            report.add(0, image("a.png", None, 1.0, score_map=np.full((2, 2), np.inf)))
    assert Page(tmp_path / "report.html").rows == []
    (tmp_path / "x/report.html").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"--report writes a file, .* is a folder"):
        check_report(tmp_path / "x")
    (tmp_path / "y").mkdir()
    (tmp_path / "y/report").write_text("")
    with pytest.raises(ValueError, match=r"--report may need a folder, .* is a file"):
        check_report(tmp_path / "y")
