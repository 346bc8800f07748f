"""The page of a report in a real browser: what is counted, shown and heard by keys and mouse."""

from __future__ import annotations

import math
import re
from decimal import ROUND_HALF_UP, Decimal

import browser as browser_module
import numpy as np
import pytest
import yaml
from browser import Browser
from report_cases import HOSTILE, SCALE, image, labeled, write

from rlr_fast.visualization.heat_maps import heat_map, overlay
from rlr_fast.visualization.report import ReportWriter

pytestmark = pytest.mark.skipif(
    browser_module.missing() is not None, reason=str(browser_module.missing())
)

COUNTS = "[...document.querySelectorAll('#counts dd')].map((e) => [e.dataset.count, e.textContent])"
SLIDER = "document.querySelector('#slider')"
NOW = f"return Number({SLIDER}.getAttribute('aria-valuenow'))"
TILES = "[...document.querySelectorAll('.tile')]"
MARKS = """return [...document.querySelectorAll(".own-limit")].map((line) => {
    const [low, high] = ["min", "max"].map((end) =>
        Number(document.querySelector("#slider").getAttribute("aria-value" + end)));
    return low + ((Number(line.getAttribute("x1")) - 44) / (708 - 44)) * (high - low);
})"""
TYPE = """const field = document.querySelector("#threshold");
    field.value = arguments[0]; field.dispatchEvent(new Event("input"));"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    window = Browser(tmp_path_factory.mktemp("profile"))
    yield window
    window.close()


@pytest.fixture
def show(browser, tmp_path):
    """Open the report of rows; nothing may be complained of, then or later."""

    def open_page(rows, kind="evaluation", **more):
        path = write(tmp_path / "out", rows, kind, **more)
        browser.media()
        browser.complaints()
        browser.open(path)
        browser.settle()
        return browser

    yield open_page
    assert browser.complaints() == []


def choose(browser, selector, text):
    script = """
        const select = document.querySelector(arguments[0]);
        const option = [...select.options].find((o) => o.textContent === arguments[1]);
        select.value = option.value;
        select.dispatchEvent(new Event("change"));"""
    browser.run(script, selector, text)
    browser.settle()


def expected(rows, limits):
    """Return the counts of rows above the thresholds of their classes, as the page tells them."""
    above = np.array([row.score > limits[row.category] for row in rows])
    bad = np.array([row.defect != "good" for row in rows])

    def percent(value):
        # A half goes up, as in the browser.
        exact = Decimal(100 * float(value))
        return f"{float(exact.quantize(Decimal('0.1'), ROUND_HALF_UP)):g} %"

    def share(part, whole):
        return f"{part} of {whole} ({percent(part / whole)})" if whole else "–"

    flagged, alarms = int(above.sum()), int((above & ~bad).sum())
    misses, caught = int((~above & bad).sum()), int((above & bad).sum())
    return {
        "flagged": share(flagged, len(rows)),
        "alarms": share(alarms, int((~bad).sum())),
        "misses": share(misses, int(bad.sum())),
        "precision": percent(caught / flagged) if flagged else "–",
        "recall": percent(caught / int(bad.sum())) if bad.any() else "–",
    }


def highest_normal(rows):
    """Return where the thresholds of classes start that no calibration set."""
    good = [row for row in rows if row.defect == "good"]
    return {
        name: max(row.score for row in good if row.category == name)
        for name in {row.category: None for row in rows}
    }


def counts(browser):
    return dict(browser.run(f"return {COUNTS}"))


def shown(browser):
    """Return the numbers of the rows in the tiles of the document, in their order."""
    script = f"return {TILES}.sort((a, b) => a.dataset.place - b.dataset.place)"
    return browser.run(f"{script}.map((e) => Number(e.dataset.id))")


def test_keys_move_the_threshold_and_all_is_counted_again(show):
    rows = [row for row in labeled(90) if row.category == "bolt"]
    browser = show(rows)
    start = max(row.score for row in rows if row.defect == "good")
    assert browser.run(NOW) == start
    assert counts(browser) == expected(rows, {"bolt": start})
    assert browser.run(f"return [{SLIDER}.getAttribute('role'), {SLIDER}.tabIndex]") == [
        "slider",
        0,
    ]
    assert browser.run(f"return {SLIDER}.getAttribute('aria-label')") == "Threshold of bolt"
    browser.run(f"{SLIDER}.focus()")
    ends = [
        browser.run(f"return Number({SLIDER}.getAttribute('aria-value{end}'))")
        for end in ("min", "max")
    ]
    step = (ends[1] - ends[0]) / 200
    moves = {"left": -step, "right": step, "page up": 10 * step, "page down": -10 * step}
    value = start
    for key in ["left"] * 12 + ["page up", "right", "home", "left", "end", "page down", "end"]:
        browser.press(key)
        wanted = dict(zip(("home", "end"), ends, strict=True)).get(key)
        wanted = min(max(value + moves[key], ends[0]), ends[1]) if wanted is None else wanted
        value = browser.run(NOW)
        assert value == pytest.approx(wanted)
        assert counts(browser) == expected(rows, {"bolt": value})
    browser.click("#reset")
    assert browser.run(NOW) == start


def test_the_mouse_drags_the_threshold_and_the_points_follow(show):
    rows = [row for row in labeled(90) if row.category == "bolt"]
    browser = show(rows)
    browser.run("document.querySelector('#histogram').scrollIntoView({block: 'center'})")
    box = browser.run("const b = document.querySelector('#histogram').getBoundingClientRect();"
                      "return [b.left, b.top, b.width, b.height]")  # fmt: skip
    left, top, width, height = box
    y = top + height / 2
    for part in (0.2, 0.35, 0.5, 0.8):
        browser.drag((left + 0.6 * width, y), (left + part * width, y))
        value = browser.run(NOW)
        low, high = (
            browser.run(f"return Number({SLIDER}.getAttribute('aria-value{end}'))")
            for end in ("min", "max")
        )
        place = (part * 720 - 44) / (708 - 44)
        assert value == pytest.approx(low + place * (high - low), abs=(high - low) / 300)
        assert counts(browser) == expected(rows, {"bolt": value})
        bad = np.array([row.defect != "good" for row in rows])
        above = np.array([row.score > value for row in rows])
        read = "const p = document.querySelector(arguments[0]);" \
               "return p && [Number(p.dataset.x), Number(p.dataset.y)]"  # fmt: skip
        fpr, recall = above[~bad].mean(), above[bad].mean()
        assert browser.run(read, "#roc .point") == pytest.approx([fpr, recall])
        if above.any():
            precision = (above & bad).sum() / above.sum()
            assert browser.run(read, "#pr .point") == pytest.approx([recall, precision])


def test_a_typed_threshold_counts_scores_above_it_alone(show):
    rows = [image(f"{i}.png", "bolt", s, defect=d) for i, (s, d) in enumerate(
        [(1.0, "good"), (1.5, "good"), (1.5, "hole"), (2.0, "hole")])]  # fmt: skip
    browser = show(rows)
    for value in (1.5, 1.4999999, 2.0, 0.5):
        browser.run(TYPE, value)
        assert counts(browser) == expected(rows, {"bolt": value})


def test_each_class_has_its_threshold_and_they_are_copied_as_yaml(show):
    rows = labeled(80)
    names = dict(zip(("bolt", "cloth"), ('a: "b" # \u2028', "cloth"), strict=True))
    rows = [image(str(r.path), names[r.category], r.score, defect=r.defect) for r in rows]
    browser = show(rows)
    starts = highest_normal(rows)
    assert counts(browser) == expected(rows, starts)
    choose(browser, "#class-choice", "cloth")
    browser.run(f"{SLIDER}.focus()")
    browser.press("left", "left", "left")
    browser.settle()
    limits = starts | {"cloth": browser.run(NOW)}
    text = browser.run("return document.querySelector('#yaml').value")
    assert yaml.safe_load(text) == limits and limits["cloth"] < starts["cloth"]
    browser.click("#copy")
    browser.settle()
    told = browser.run("return document.querySelector('#copied').textContent")
    assert "Copied" in told or "Selected" in told
    choose(browser, "#class-choice", "all classes")
    assert counts(browser) == expected(rows, limits)
    browser.run(f"{SLIDER}.focus()")
    browser.press("right")
    assert counts(browser) == expected(rows, dict.fromkeys(starts, browser.run(NOW)))


def test_marks_show_the_thresholds_of_classes_where_they_are_now(show):
    rows = labeled(60)
    browser = show(rows)
    starts = highest_normal(rows)
    assert sorted(browser.run(MARKS)) == pytest.approx(sorted(starts.values()))
    choose(browser, "#class-choice", "cloth")
    browser.run(TYPE, 0.25)
    assert browser.run(MARKS) == []
    choose(browser, "#class-choice", "all classes")
    assert sorted(browser.run(MARKS)) == pytest.approx([0.25, starts["bolt"]])
    browser.run(TYPE, 14)  # of all, and beyond all scores
    assert browser.run(MARKS) == []
    choose(browser, "#class-choice", "cloth")
    assert browser.run(NOW) == 14
    assert browser.run(f"return Number({SLIDER}.getAttribute('aria-valuemax'))") > 14


def test_a_threshold_of_all_classes_is_told_as_one(browser, tmp_path):
    rows = labeled(60)
    with ReportWriter(tmp_path, "evaluation", SCALE, {}, alpha=0.05) as report:
        for i, row in enumerate(rows):
            report.add(i, row)
        for name in ("bolt", "cloth"):
            report.set_threshold(name, 1.3, True)
    browser.open(tmp_path / "report.html")
    browser.settle()
    basis = browser.run("return document.querySelector('#basis').textContent")
    assert basis == "One threshold for all classes."
    assert browser.run("return document.querySelector('#threshold').valueAsNumber") == 1.3
    assert browser.run("return document.querySelector('#roc .point') !== null")
    assert browser.complaints() == []


def test_calibrated_thresholds_are_where_the_page_starts(browser, tmp_path):
    rows = labeled(60)
    limits = {"bolt": 1.25, "cloth": 1.4}
    facts = {}
    with ReportWriter(tmp_path, "evaluation", SCALE, facts, alpha=0.05) as report:
        for i, row in enumerate(rows):
            known = i < 12  # of the calibration: they do not count as normal images
            more = {"defect": row.defect, "calibrated": known, "p_value": 0.5}
            report.add(i, image(str(row.path), row.category, row.score, **more))
            report.set_threshold(row.category, limits[row.category], row.category == "cloth")
    browser.open(tmp_path / "report.html")
    browser.settle()
    told = [row for i, row in enumerate(rows) if i >= 12 or row.defect != "good"]
    assert counts(browser) == expected(told, limits)
    assert "promised threshold" not in browser.run("return document.body.innerText")
    browser.click("#with-calibrated")
    assert counts(browser) == expected(rows, limits)
    choose(browser, "#class-choice", "cloth")
    assert browser.run(NOW) == 1.4
    basis = browser.run("return document.querySelector('#basis').textContent")
    assert "calibrated on all classes pooled: over their mix, and not in each" in basis
    choose(browser, "#class-choice", "bolt")
    basis = browser.run("return document.querySelector('#basis').textContent")
    assert "calibrated: of new normal images at most 5 % are expected to score above it" in basis
    assert browser.complaints() == []


def test_without_calibration_nothing_is_promised(show):
    rows = [image(f"{i}.png", None, i / 10) for i in range(9)]
    browser = show(rows, "prediction")
    assert "No promised threshold" in browser.run(
        "return document.querySelector('#notes').innerText"
    )
    assert browser.run(NOW) == 0.4
    assert "the median" in browser.run("return document.querySelector('#basis').textContent")
    assert counts(browser) == {"flagged": "4 of 9 (44.4 %)"}
    assert not browser.run("return document.querySelector('#roc').checkVisibility()")


def test_filters_and_orders_show_the_right_tiles(show):
    rows = labeled(30)
    browser = show(rows)
    limits = highest_normal(rows)
    choose(browser, "#class-choice", "cloth")
    browser.run(f"{SLIDER}.focus()")
    browser.press("page down", "page down")
    limits["cloth"] = browser.run(NOW)
    choose(browser, "#class-choice", "all classes")
    browser.run("document.querySelector('#grid').scrollIntoView()")
    above = [row.score - limits[row.category] for row in rows]
    bad = [row.defect != "good" for row in rows]
    orders = {
        "highest score first": lambda i: -rows[i].score,
        "lowest score first": lambda i: rows[i].score,
        "nearest to the threshold first": lambda i: abs(above[i]),
        "as the files": lambda i: i,
        "worst misses first": lambda i: (not bad[i], above[i]),
        "worst false alarms first": lambda i: (bad[i], -above[i]),
    }
    for name, key in orders.items():
        choose(browser, "#order", name)
        found = shown(browser)
        assert len(found) > 10 and found == sorted(range(30), key=key)[: len(found)], name
    choose(browser, "#order", "as the files")
    decisions = {
        "▲ flagged": lambda i: above[i] > 0,
        "● passed": lambda i: above[i] <= 0,
        "✕ misses": lambda i: bad[i] and above[i] <= 0,
        "◇ false alarms": lambda i: not bad[i] and above[i] > 0,
        "✕ ◇ both errors": lambda i: bad[i] != (above[i] > 0),
    }
    for name, keep in decisions.items():
        choose(browser, "#decision-filter", name)
        wanted = [i for i in range(30) if keep(i)]
        found = shown(browser)
        assert wanted and found == wanted[: len(found)], name
        number = browser.run("return document.querySelector('#shown').textContent")
        assert number == f"{len(wanted)} of 30 images"
    choose(browser, "#decision-filter", "all")
    choose(browser, "#defect-filter", "hole")
    assert shown(browser) == [i for i in range(30) if rows[i].defect == "hole"]
    choose(browser, "#class-filter", "bolt")
    assert shown(browser) == [
        i for i in range(30) if rows[i].defect == "hole" and rows[i].category == "bolt"
    ]
    search = """const field = document.querySelector("#text-filter");
        field.value = arguments[0]; field.dispatchEvent(new Event("input"));"""
    browser.run(search, "HOLE/00")
    assert shown(browser) == [i for i in range(30) if "bolt/test/hole/00" in str(rows[i].path)]
    browser.run(search, "nothing like it")
    assert shown(browser) == []
    assert "No image fits" in browser.run("return document.querySelector('#empty').innerText")


def test_keys_switch_the_view_of_all_and_of_an_opened_image(show):
    browser = show(labeled(40))
    choose(browser, "#order", "as the files")
    views = f"return [...new Set({TILES}.map((e) => e.querySelector('.frame').dataset.view))]"
    for key in "2341":
        browser.press(key)
        assert browser.run(views) == [key]
    browser.run(f"{TILES}[0].focus({{preventScroll: true}})")
    order = range(40)
    browser.press("right", "enter")
    browser.settle()
    opened = "const d = document.querySelector('dialog'); return [d.open, d.dataset.id]"
    assert browser.run(opened) == [True, str(order[1])]
    browser.press("3")
    stage = "return document.querySelector('#stage .frame').dataset.view"
    assert (browser.run(stage), browser.run(views)) == ("3", ["1"])
    browser.press("right", "right", "left")
    assert browser.run(opened) == [True, str(order[2])]
    browser.press(*["right"] * 50)  # past the last one, and back
    browser.settle()
    browser.press(*["left"] * 37)
    assert browser.run(opened) == [True, str(order[2])]
    browser.press("escape")
    browser.settle()
    assert browser.run(opened)[0] is False
    assert browser.run("return document.activeElement.dataset.id") == str(order[2])
    browser.press("2")
    browser.run("document.querySelector('#text-filter').focus()")
    browser.press("4")
    assert browser.run(views) == ["2"], "a digit that is typed is text"


def test_the_focus_stays_where_the_window_changes_its_width(show):
    browser = show(labeled(40))
    browser.run(f"{TILES}[0].focus({{preventScroll: true}})")
    browser.press("right")
    focused = "return document.activeElement.dataset.id"
    before = browser.run(focused)
    widths = f"return {TILES}[0].style.width"
    width = browser.run(widths)
    browser.run("document.querySelector('#grid').style.width = '690px';"
                "dispatchEvent(new Event('resize'))")  # fmt: skip
    browser.settle()
    assert browser.run(widths) != width
    assert browser.run(focused) == before is not None
    browser.run("document.querySelector('#grid').style.width = ''")


def test_paper_says_how_many_images_it_leaves_out(show):
    browser = show(labeled(70))
    browser.run("dispatchEvent(new Event('beforeprint'))")
    told = "return document.querySelector('#printed').textContent"
    assert browser.run(f"return {TILES}.length") == 60
    assert browser.run(told) == "The first 60 of 70 images."
    browser.run("dispatchEvent(new Event('afterprint'))")


def test_maps_are_painted_in_the_colors_of_the_heat_maps(show):
    levels = (0.0, 0.3, 0.7, 1.0, 1.6, 4.0)
    rows = [
        image(f"{i}.png", None, 1.0, score_map=np.full((4, 6), s, np.float32))
        for i, s in enumerate(levels)
    ]
    browser = show(rows, "prediction")
    choose(browser, "#order", "as the files")
    place = f"""return {TILES}.map((tile) => {{
        const box = tile.querySelector(".frame").getBoundingClientRect();
        return [box.left + box.width / 2, box.top + box.height / 2];
    }})"""
    gray = np.full((1, 1, 3), 128, np.uint8)
    for key, paint in (
        ("2", lambda m: heat_map(m, SCALE)),
        ("3", lambda m: overlay(gray, m, SCALE)),
    ):
        browser.press(key)
        browser.run("document.querySelector('#grid').scrollIntoView({block: 'end'})")
        browser.run(f"return Promise.all({TILES}.flatMap((e) => [...e.querySelectorAll('img')])"
                    ".map((i) => i.decode())).then(() => true)")  # fmt: skip
        browser.settle()
        while browser.run("return document.querySelector('.fresh') !== null"):
            browser.settle()  # tiles get their colors when scrolling rests
        window = browser.picture()
        for level, (x, y) in zip(levels, browser.run(place), strict=True):
            wanted = paint(np.full((1, 1), level, np.float32))[0, 0].astype(int)
            found = np.array(window.getpixel((round(x), round(y))))
            assert np.abs(found - wanted).max() <= 8, (key, level)


def test_hostile_names_run_nothing_and_are_shown_as_text(show):
    browser = show([image(name, name, 1.0 + i, defect=name) for i, name in enumerate(HOSTILE)])
    choose(browser, "#order", "as the files")
    browser.run("document.querySelector('#grid').scrollIntoView()")
    browser.settle()
    names = browser.run(
        f"return {TILES}.map((e) => e.querySelector('.name').textContent.toWellFormed())"
    )
    ends = [re.split(r"[/\\]", name.replace("\udcff", "\ufffd"))[-1] for name in HOSTILE]
    assert names == ends
    browser.run(f"{TILES}[0].click()")
    for _ in HOSTILE:
        browser.press("right")
    browser.settle()
    browser.press("escape")
    script = "return [window.hacked ?? null, document.querySelectorAll('img[onerror]').length]"
    assert browser.run(script) == [None, 0]
    assert browser.run("return document.querySelectorAll('script').length") == 3


def luminance(color):
    parts = [int(float(v)) / 255 for v in re.findall(r"[\d.]+", color)[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_both_color_schemes(show, scheme):
    browser = show(labeled(30))
    browser.media(prefers_color_scheme=scheme)
    browser.settle()
    script = """
        const opaque = (c) => c !== "transparent" && !/, 0\\)$/.test(c);
        const found = [];
        for (const element of document.querySelectorAll("body *")) {
          const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
          if (!own || !element.checkVisibility()) continue;
          if (element.closest("defs, script, noscript, option")) continue;
          const color = (node) => getComputedStyle(node).backgroundColor;
          let ground = element;
          while (ground && !opaque(color(ground))) ground = ground.parentElement;
          const style = getComputedStyle(element);
          const ink = element.closest("svg") ? style.fill : style.color;
          found.push([element.outerHTML.slice(0, 80), ink, color(ground ?? document.body)]);
        }
        return found;"""
    found = browser.run(script)
    assert len(found) > 60
    dark = luminance(browser.run("return getComputedStyle(document.body).backgroundColor")) < 0.2
    assert dark == (scheme == "dark")
    for text, ink, ground in found:
        low, high = sorted((luminance(ink), luminance(ground)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, text


def test_ten_thousand_images_scroll_with_few_tiles(show):
    random = np.random.default_rng(0)
    rows = [image(f"{i:05d}.png", "bolt", float(s)) for i, s in enumerate(random.random(10_000))]
    browser = show(rows, "prediction")
    order = sorted(range(10_000), key=lambda i: -rows[i].score)
    number = f"return {TILES}.length"
    height = browser.run("return document.documentElement.scrollHeight")
    for part in (0, 0.3, 0.31, 0.7, 1):
        browser.run("scrollTo(0, arguments[0])", math.floor(part * height))
        browser.settle()
        assert browser.run(number) < 300
    place = """const place = document.elementFromPoint(innerWidth / 2, innerHeight - 160);
        return place.closest(".tile")?.dataset.place"""
    assert int(browser.run(place)) > 9_900
    assert shown(browser)[-1] == order[-1]
    browser.press("3")
    browser.run("scrollTo(0, 0.5 * document.documentElement.scrollHeight)")
    for _ in range(100):
        browser.settle()
        if not browser.run("return document.querySelectorAll('.fresh').length"):
            break
    shades = (
        "return [...document.querySelectorAll('.tile .over')].every((e) => e.checkVisibility())"
    )
    assert browser.run(shades), "the colors come when scrolling rests"
    browser.run(f"{TILES}[0].focus()")
    browser.press("home", "end")
    browser.settle()
    assert browser.run("return document.activeElement.dataset.id") == str(order[-1])
    assert browser.run(number) < 300


def test_a_page_of_nothing_and_a_page_on_paper(show):
    browser = show([])
    assert "There is no image in this report." in browser.run("return document.body.innerText")
    browser = show(labeled(100))
    assert browser.printed().startswith(b"%PDF")
    browser.settle()
    assert len(shown(browser)) < 100


def test_pictures_in_files_are_shown(show):
    browser = show(labeled(12), embed_limit=0)
    browser.run("document.querySelector('#grid').scrollIntoView()")
    browser.settle()
    script = f"""const images = {TILES}.map((tile) => tile.querySelector("img"));
        return Promise.all(images.map((i) => i.decode())).then(() =>
            images.map((i) => i.naturalWidth));"""
    assert set(browser.run(script)) == {120}
