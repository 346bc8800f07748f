"""Tests of the pictures: fixed color scale, untouched normal images, sheets, loss curves."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
import warnings

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from rlr_fast.visualization import (
    ComparisonRow,
    PrincipalColors,
    RunView,
    SheetRow,
    comparison_sheet,
    heat_maps,
    loss_curve,
    prediction_picture,
    sample_sheet,
)

SCALE = (0.2, 1.0)
OUTLINE = (0, 229, 255)


@pytest.fixture(autouse=True)
def _warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def noise_image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def heat_map(score_map, scale):
    return heat_maps.heat_map(heat_maps.read_map(score_map), scale)


def overlay(image, score_map, scale):
    return heat_maps.overlay(image, heat_maps.map_of(image, score_map), scale)


def sample(**changed):
    mask = np.zeros((96, 96), bool)
    mask[20:40, 50:80] = True
    return dataclasses.replace(
        SheetRow(
            image=np.full((96, 96, 3), 128, np.uint8),
            score_map=np.where(mask, 0.9, 0.1).astype(np.float32),
            mask=mask,
            score=0.9,
            category="bottle",
            defect="crack",
        ),
        **changed,
    )


def outline_pixels(picture):
    return int((np.asarray(picture.convert("RGB")) == OUTLINE).all(axis=2).sum())


def test_heat_map_has_a_pixel_per_score():
    assert heat_map(np.zeros((20, 30), np.float32), SCALE).shape == (20, 30, 3)


def test_equal_scores_have_equal_colors_in_maps_of_different_range():
    narrow = heat_map(np.array([[0.2, 0.5, 0.6]]), SCALE)
    wide = heat_map(np.array([[-7.0, 0.5, 40.0]]), SCALE)
    assert (narrow[0, 1] == wide[0, 1]).all()
    assert (narrow[0, 2] != wide[0, 2]).any()


def test_no_score_is_above_the_scale_and_its_lower_half_is_even():
    """low is the first color, the middle the middle one, high at three quarters."""
    scores = np.array([[-3.0, 0.2, 0.4, 0.6, 1.0, 1.8, 99.0]])
    colors = heat_map(scores, SCALE)[0]
    places = np.array([[0, 0, 0.25, 0.5, 0.75, 0.875, 1]], np.float32)
    assert np.abs(colors.astype(int) - heat_maps.paint(places)[0]).max() <= 4
    assert colors[0].sum() < 30 < 600 < colors[-1].sum()
    assert (colors[4] != colors[5]).any() and (colors[5] != colors[6]).any()


def test_lightness_grows_with_the_score():
    colors = heat_map(np.linspace(0.2, 0.6, 256)[None], SCALE).astype(float)[0]
    brighter = heat_map(np.linspace(0.6, 9, 256)[None], SCALE).astype(float)[0]
    assert (np.diff(brighter @ [0.2126, 0.7152, 0.0722]) > -1).all()
    luminance = colors @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) > -1).all()
    assert np.corrcoef(luminance, np.arange(256))[0, 1] > 0.98


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, pytest.param(torch.bfloat16, id="no-numpy-dtype")]
)
def test_tensors_are_painted_as_arrays_are(dtype):
    scores = torch.rand(5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = heat_map(scores.float().numpy(), SCALE)
    assert (heat_map(scores.requires_grad_(), SCALE) == expected).all()


def test_image_below_the_scale_is_not_painted():
    image = noise_image(24, 32)
    scores = np.linspace(-5, 0.2, 24 * 32).reshape(24, 32)
    assert (overlay(image, scores, SCALE) == image).all()


def test_low_scores_of_a_normal_image_hardly_show():
    image = np.full((4, 4, 3), 200, np.uint8)
    at_a_tenth = np.full((4, 4), 0.28)
    painted = overlay(image, at_a_tenth, SCALE).astype(int)
    assert np.abs(painted - image).max() < 20


def test_overlay_reaches_its_opacity_in_the_middle_of_the_scale():
    image = np.full((1, 2, 3), 100, np.uint8)
    scores = np.array([[0.6, 1.0]])
    colors = heat_map(scores, SCALE).astype(float)
    expected = np.rint(0.3 * 100 + 0.7 * colors)
    assert np.abs(overlay(image, scores, SCALE) - expected).max() <= 1


def test_overlay_resizes_the_map_to_the_image():
    image = noise_image(40, 60)
    scores = np.zeros((4, 6), np.float32)
    scores[1, 4] = 1  # rows 10-19, columns 40-49 of the image
    picture = overlay(image, scores, SCALE)
    assert picture.shape == image.shape
    changed = (picture != image).any(axis=2)
    assert changed[15, 45]
    assert not changed[:, :30].any()
    assert not changed[26:].any()


def test_pictures_do_not_write_into_their_arguments():
    row = sample()
    before = row.image.copy(), row.score_map.copy()
    overlay(row.image, row.score_map, SCALE)
    prediction_picture(row.image, row.score_map, SCALE)
    assert (row.image == before[0]).all()
    assert (row.score_map == before[1]).all()


@pytest.mark.parametrize(
    ("height", "width"),
    [
        pytest.param(256, 256, id="usual"),
        pytest.param(32, 32, id="tiny-still-holds-the-bar"),
        pytest.param(120, 200, id="wide"),
        pytest.param(700, 100, id="high"),
    ],
)
def test_prediction_picture_holds_image_map_and_overlay_unscaled(height, width):
    image = noise_image(height, width)
    scores = np.random.default_rng(1).random((height, width)).astype(np.float32)
    picture = prediction_picture(image, scores, SCALE)
    pixels = np.asarray(picture)
    gap = max(2, round(height / 64))
    assert picture.height == height
    assert 3 * (width + gap) < picture.width < 3 * (width + gap) + max(60, height)
    panels = [pixels[:, i * (width + gap) :][:, :width] for i in range(3)]
    assert (panels[0] == image).all()
    assert (panels[1] == heat_map(scores, SCALE)).all()
    assert (panels[2] == overlay(image, scores, SCALE)).all()


def test_bar_prints_the_numbers_of_the_scale():
    row = sample()
    one = np.asarray(prediction_picture(row.image, row.score_map, (0.2, 1.0)))
    other = np.asarray(prediction_picture(row.image, row.score_map, (0.2, 1.5)))
    bar = slice(3 * (96 + 2), None)
    assert one[:, bar].shape != other[:, bar].shape or (one[:, bar] != other[:, bar]).any()
    colors = one[:, bar][:, 0].astype(int)  # high is a quarter below the top, low at the bottom
    low, middle, high = heat_map(np.array([[0.2, 0.6, 1.0]]), SCALE)[0].astype(int)
    assert (colors[-1] == low).all()
    assert np.abs(colors[len(colors) // 2] - middle).max() < 8
    assert np.abs(colors[len(colors) // 4] - high).max() < 8


@pytest.mark.parametrize(
    "scale",
    [
        pytest.param((1.0, 1.0), id="empty"),
        pytest.param((1.0, 0.0), id="reversed"),
        pytest.param((0.0, math.inf), id="infinite"),
        pytest.param((math.nan, 1.0), id="nan"),
        pytest.param((0.0, 0.5, 1.0), id="three-numbers"),
    ],
)
def test_bad_scale_is_refused(scale, tmp_path):
    row = sample()
    for draw in (
        lambda: heat_map(row.score_map, scale),
        lambda: overlay(row.image, row.score_map, scale),
        lambda: prediction_picture(row.image, row.score_map, scale),
        lambda: sample_sheet([row], scale, tmp_path / "sheet.png"),
    ):
        with pytest.raises(ValueError, match=r"^scale must be"):
            draw()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        pytest.param({"image": np.zeros((9, 9), np.uint8)}, "^image must have", id="gray-image"),
        pytest.param({"image": np.zeros((3, 9, 9), np.uint8)}, "^image must have", id="chw"),
        pytest.param({"image": np.zeros((9, 9, 3))}, "^image must be uint8", id="float-image"),
        pytest.param({"score_map": np.zeros((1, 9, 9))}, "^score_map must have", id="channel"),
        pytest.param({"score_map": np.full((9, 9), np.nan)}, "^score_map must be", id="nan"),
    ],
)
def test_wrong_arguments_are_named(changed, message):
    good = {"image": np.zeros((9, 9, 3), np.uint8), "score_map": np.zeros((9, 9)), "scale": SCALE}
    with pytest.raises(ValueError, match=message):
        prediction_picture(**(good | changed))


@pytest.mark.parametrize(
    ("count", "columns"),
    [
        pytest.param(1, 1, id="one-row"),
        pytest.param(16, 1, id="full-column"),
        pytest.param(17, 2, id="one-more"),
        pytest.param(60, 4, id="many"),
    ],
)
def test_sheet_grows_with_its_rows(count, columns, tmp_path):
    sample_sheet([sample()] * count, SCALE, tmp_path / "sheet.png", panel_size=64)
    with Image.open(tmp_path / "sheet.png") as sheet:
        per_column = math.ceil(count / columns)
        assert per_column * 64 < sheet.height < per_column * (64 + 8) + 140
        assert columns * 4 * 64 < sheet.width < columns * (4 * 64 + 200)


def test_every_row_of_a_sheet_is_drawn(tmp_path):
    # One row more than columns of equal length would need: the last column is shorter.
    colors = [(10, 20, 200 - i) for i in range(25)]
    rows = [sample(image=np.full((96, 96, 3), c, np.uint8), mask=None) for c in colors]
    sample_sheet(rows, SCALE, tmp_path / "sheet.png", panel_size=64)
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet)
    for color in colors:
        assert (pixels == color).all(axis=2).sum() >= 64 * 64


def test_sheet_outlines_the_ground_truth_on_the_overlay(tmp_path):
    def outlined(mask):
        rows = [sample(mask=mask)]
        sample_sheet(rows, SCALE, tmp_path / "sheet.png", panel_size=96)
        with Image.open(tmp_path / "sheet.png") as sheet:
            return outline_pixels(sheet)

    mask = np.zeros((96, 96), bool)
    legend = outlined(mask)
    assert legend == outlined(None)  # the line of the legend is all there is
    mask[20:40, 50:80] = True
    assert outlined(mask) - legend == 2 * (22 + 32) - 4  # a one-pixel frame around 20 x 30
    speckled = mask.copy()
    speckled[25:35:3, 55:75:3] = False
    speckled[27:30, 60:63] = False  # wider than one step of a closing fills
    assert outlined(speckled) == outlined(mask)
    dot = np.zeros((960, 960), bool)
    dot[481, 481] = True  # vanishes when the mask is shrunk by taking every tenth pixel
    assert outlined(dot) > legend


def test_outline_follows_a_mask_at_the_border(tmp_path):
    mask = np.zeros((96, 96), bool)
    mask[:10, 86:] = True
    sample_sheet([sample(mask=mask)], SCALE, tmp_path / "corner.png", panel_size=96)
    sample_sheet([sample(mask=None)], SCALE, tmp_path / "none.png", panel_size=96)
    with Image.open(tmp_path / "corner.png") as corner, Image.open(tmp_path / "none.png") as none:
        assert outline_pixels(corner) - outline_pixels(none) == 11 + 11 - 1


def test_captions_are_printed(tmp_path):
    def left_part(**changed):
        sample_sheet([sample(**changed)], SCALE, tmp_path / "sheet.png")
        with Image.open(tmp_path / "sheet.png") as sheet:
            return np.asarray(sheet)[:, : -4 * 198 - 12]

    plain = left_part()
    assert (plain < 128).any()
    # The captions of equal width are compared pixel by pixel.
    for changed in ({"category": "elttob"}, {"defect": "kcarc"}, {"score": 0.6}):
        other = left_part(**changed)
        assert other.shape == plain.shape
        assert (other != plain).any()


def test_long_captions_leave_the_panels_their_place(tmp_path):
    sample_sheet([sample(category="transistor" * 20)], SCALE, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width < 6 * 192


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        pytest.param([], {}, "^rows must hold", id="no-row"),
        pytest.param([sample()], {"panel_size": 8}, "^panel_size", id="illegible"),
        pytest.param([sample(score=math.nan)], {}, "^score must be a finite", id="no-number"),
        pytest.param(
            [sample(mask=np.zeros((96, 96), np.uint8))], {}, "^mask must be bool", id="0-255-mask"
        ),
    ],
)
def test_sheet_refuses_wrong_arguments(rows, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        sample_sheet(rows, SCALE, tmp_path / "sheet.png", **options)


def test_colors_are_the_components_of_the_originals():
    tokens = torch.randn(400, 6) * torch.tensor([9.0, 0.1, 4.0, 0.1, 2.0, 0.1])
    colors = PrincipalColors(tokens).paint(tokens, (20, 20)).reshape(400, 3).astype(float)
    for channel, column in enumerate((0, 2, 4)):  # by falling variance
        correlation = np.corrcoef(colors[:, channel], tokens[:, column])[0, 1]
        assert correlation > 0.98, channel  # the sign is fixed too
    assert colors.min() == 0 and colors.max() == 255


def test_reconstructions_are_painted_in_the_range_of_the_originals():
    originals = torch.randn(400, 6) * torch.tensor([9.0, 0.1, 4.0, 0.1, 2.0, 0.1])
    colors = PrincipalColors(originals)
    alone = colors.paint(originals[:100], (10, 10))
    assert (
        alone == colors.paint(originals, (20, 20)).reshape(400, 3)[:100].reshape(10, 10, 3)
    ).all()
    # A tenth of the contrast stays a tenth: nothing is stretched to its own range.
    flat = colors.paint(originals / 10, (20, 20)).astype(float)
    assert np.ptp(flat[..., 0]) < 60
    far = colors.paint(originals + torch.tensor([99.0, 0, 0, 0, 0, 0]), (20, 20))
    assert (far[..., 0] == 255).all()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        pytest.param(torch.randn(4, 2), "tokens must be .n, C.", id="two-channels"),
        pytest.param(torch.randn(2, 4), "tokens must be .n, C.", id="two-tokens"),
        pytest.param(torch.full((4, 5), math.nan), "tokens must be finite", id="nan"),
    ],
)
def test_principal_colors_refuse_what_they_cannot_paint(tokens, message):
    with pytest.raises(ValueError, match=message):
        PrincipalColors(tokens)


def test_constant_tokens_have_one_color():
    colors = PrincipalColors(torch.ones(16, 5)).paint(torch.ones(16, 5), (4, 4))
    assert (colors == colors[0, 0]).all()


def comparison(runs=2, decoded=True, defect="crack", mask=None, score=0.5):
    def flat(*color, size=8):
        return np.full((size, size, 3), color, np.uint8)

    return ComparisonRow(
        image=flat(10, 20, 200),
        mask=mask,
        defect=defect,
        features=flat(10, 200, 20),
        decoded=flat(200, 10, 20) if decoded else None,
        runs=[
            RunView(
                score_map=np.full((8, 8), 1.0 + r, np.float32),
                score=score,
                features=flat(50, 150, 60 + r),
                decoded=flat(150, 50, 60 + r) if decoded else None,
            )
            for r in range(runs)
        ],
    )


def write_comparison(tmp_path, rows, runs, note="a note"):
    scales = [(f"run {r}", (0.0, 4.0)) for r in range(runs)]
    comparison_sheet(rows, scales, "bolt", note, tmp_path / "sheet.png", panel_size=96)
    with Image.open(tmp_path / "sheet.png") as sheet:
        return np.asarray(sheet.convert("RGB"))


@pytest.mark.parametrize("decoded", [False, True])
@pytest.mark.parametrize("runs", [1, 2])
def test_comparison_shows_every_panel_of_every_run(runs, decoded, tmp_path):
    pixels = write_comparison(tmp_path, [comparison(runs, decoded)] * 3, runs)
    heat = heat_map(np.array([[1.0, 2.0]]), (0.0, 4.0))[0]
    panels = [(10, 20, 200), (10, 200, 20), *([(200, 10, 20)] if decoded else [])]
    for r in range(runs):
        panels += [tuple(heat[r]), (50, 150, 60 + r), *([(150, 50, 60 + r)] if decoded else [])]
    columns = []
    for color in panels:
        found = (pixels == color).all(axis=2)
        # Of the color bars, no more than a few columns have the color of a score map.
        assert 3 * 96 * 96 <= found.sum() < 3 * 96 * 96 + 100, color
        columns.append(np.flatnonzero(found.sum(axis=0) >= 3 * 96)[0])
    order = [0, 1, 2] if decoded else [0, 1]
    order += list(range(len(order), len(panels)))
    assert [columns[k] for k in order] == sorted(columns)


def test_comparison_writes_its_words_beside_the_panels(tmp_path):
    rows = [comparison(defect="x" * 80), comparison()]
    plain = write_comparison(tmp_path, rows, 2)
    assert plain.shape[1] < 96 * 11 + 250
    longer = write_comparison(tmp_path, rows, 2, note="one\ntwo\nthree")
    assert longer.shape[0] > plain.shape[0] and longer.shape[1] == plain.shape[1]


def written(monkeypatch, draw):
    """Return what is written into a picture: each text with its place."""
    texts = []
    original = ImageDraw.ImageDraw.text

    def spy(self, xy, text, *rest, **options):
        texts.append((text, xy))
        return original(self, xy, text, *rest, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", spy)
    draw()
    return texts


def test_runs_of_long_names_are_told_apart_and_keep_their_scores(tmp_path, monkeypatch):
    first, second = comparison().runs
    views = [dataclasses.replace(first, score=0.00123), dataclasses.replace(second, score=45.6)]
    row = dataclasses.replace(comparison(), runs=views)
    names = [f"{'experiment ' * 5}{end}" for end in ("one", "two")]
    texts = written(
        monkeypatch,
        lambda: comparison_sheet(
            [row], [(n, (0.0, 4.0)) for n in names], "bolt", "", tmp_path / "a.png", panel_size=96
        ),
    )
    words = [text for text, _ in texts]
    assert [t for t in words if ": score " in t] == ["A: score 0.00123", "B: score 45.6"]
    headings = [(text, xy[0]) for text, xy in texts if text[:6] in ("A: exp", "B: exp")]
    (first, left), (second, right) = headings[:2]
    assert first.startswith("A") and second.startswith("B") and left < right
    assert [text for text, _ in headings[2:]] == [f"A: {names[0]}", f"B: {names[1]}"]


def test_a_single_run_needs_no_letter(tmp_path, monkeypatch):
    texts = written(monkeypatch, lambda: write_comparison(tmp_path, [comparison(1)], 1))
    words = [text for text, _ in texts]
    assert "run 0" in words and "score 0.500" in words


def test_names_with_breaks_are_drawn(tmp_path):
    row = comparison(defect="a\nb")
    scales = [("c\nd", (0.0, 4.0)), ("e", (0.0, 4.0))]
    comparison_sheet([row], scales, "f\ng", "a note", tmp_path / "sheet.png")
    sample_sheet([sample(category="a\nb", defect="c\nd")], SCALE, tmp_path / "sheet.png")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        pytest.param([], "^rows must hold", id="no-row"),
        pytest.param([comparison(1)], "a view per run", id="a-run-too-few"),
        pytest.param([comparison(), comparison(decoded=False)], "all decoded", id="some-decoded"),
        pytest.param([comparison(score=math.inf)], "^score must be a finite", id="no-number"),
    ],
)
def test_comparison_refuses_uneven_rows(rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_comparison(tmp_path, rows, 2)


def record(i, count=10, **more):
    return {"step": 100 * i, "epoch": i / count, "loss": 1.0 / i, **more}


def svg_texts(history, tmp_path):
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        loss_curve(history, tmp_path / "loss.svg")
    return (tmp_path / "loss.svg").read_text(encoding="utf-8")


def test_loss_curve_states_last_values(tmp_path):
    history = [
        record(i, level_0=0.75 / i, level_1=0.25 / i, lr=1e-4, grad_norm=2.0 / i)
        for i in range(1, 11)
    ]
    text = svg_texts(history, tmp_path)
    for expected in (
        "loss  0.1<",
        "level 0  0.075<",
        "level 1  0.025<",
        "learning rate",
        "gradient norm",
        "Loss to step 1,000, epoch 1<",
    ):
        assert expected in text


def test_loss_curve_shows_only_what_was_recorded(tmp_path):
    text = svg_texts([record(i) for i in range(1, 11)], tmp_path)
    for absent in ("level", "learning rate", "gradient norm", "running mean"):
        assert absent not in text


def test_long_run_states_a_mean_and_says_so(tmp_path):
    history = [record(i) | {"loss": 1.0 + 0.5 * (-1) ** i} for i in range(1, 1001)]
    text = svg_texts(history, tmp_path)
    assert "running mean of 10 records" in text
    assert "loss  1<" in text


def test_diverged_run_says_where_its_loss_ended(tmp_path):
    history = [record(i) for i in range(1, 6)]
    history += [record(i) | {"loss": math.nan} for i in range(6, 9)]
    assert "loss  0.2 (epoch 0.5)<" in svg_texts(history, tmp_path)


@pytest.mark.parametrize(
    "history",
    [
        pytest.param([record(1)], id="one-record"),
        pytest.param([record(1) | {"loss": math.nan}], id="never-finite"),
        pytest.param([record(1), record(2, level_0=0.1)], id="level-from-the-second-record"),
        pytest.param(
            [record(i, level_0=0.5 / i, level_1=0.5 / i) for i in (1, 2)], id="labels-coincide"
        ),
        pytest.param([record(i) | {"loss": 0.3} for i in (1, 2)], id="constant"),
        pytest.param([record(1), record(2) | {"loss": 0.0}], id="zero-on-a-log-axis"),
    ],
)
def test_loss_curve_draws_unusual_runs(history, tmp_path):
    loss_curve(history, tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.width == 1200


def test_end_labels_do_not_touch(tmp_path):
    history = [record(i, **{f"level_{j}": 0.25 / i for j in range(4)}) for i in (1, 2)]
    text = svg_texts(history, tmp_path)
    heights = [float(y) for y in re.findall(r'<text[^>]* y="([\d.]+)"[^>]*>level ', text)]
    assert len(heights) == 4
    assert np.diff(np.sort(heights)).min() > 10  # points, the height of a line of text


@pytest.mark.parametrize(
    ("history", "message"),
    [
        pytest.param([], "^history must hold", id="no-record"),
        pytest.param([record(1), {"step": 1, "loss": 1.0}], "record 1 lacks.*epoch", id="no-epoch"),
    ],
)
def test_loss_curve_refuses_incomplete_history(history, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        loss_curve(history, tmp_path / "loss.png")


def test_figures_need_no_pyplot_and_await_no_scikit_learn():
    code = (
        "import sys, rlr_fast.visualization; "
        "sys.exit(bool({'matplotlib.pyplot', 'sklearn'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
