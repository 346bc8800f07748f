"""Tiles: where they lie, how their maps are blended, and the score of the whole."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F

from rlr_fast import RLRModel
from rlr_fast.config import checked_tiles
from rlr_fast.config.tiles import tile_starts
from rlr_fast.data import resize_image
from rlr_fast.pictures.tiling import blend_weights, predict_tiled

AXES = [
    pytest.param(64, 64, 8, id="one-tile"),
    pytest.param(65, 64, 0, id="one-pixel-more"),
    pytest.param(128, 64, 0, id="edge-to-edge"),
    pytest.param(200, 64, 8, id="little-overlap"),
    pytest.param(200, 64, 32, id="half-overlap"),
    pytest.param(201, 63, 50, id="many-on-a-pixel"),
    pytest.param(1000, 7, 6, id="every-pixel"),
]


@pytest.fixture
def model(small):
    return RLRModel(small).eval()


def picture(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (3, height // 8, width // 8), generator=generator)
    return resize_image(coarse.to(torch.uint8), (height, width))


@pytest.mark.parametrize(("length", "tile", "overlap"), AXES)
def test_tiles_cover_an_axis_from_border_to_border_and_share_enough(length, tile, overlap):
    starts = tile_starts(length, tile, overlap)
    steps = [b - a for a, b in itertools.pairwise(starts)]
    assert starts[0] == 0 and starts[-1] + tile == length
    assert all(0 < step <= tile - overlap for step in steps)
    assert len(starts) == 1 or (len(starts) - 2) * (tile - overlap) + tile < length  # the fewest


@pytest.mark.parametrize(("length", "tile", "overlap"), AXES)
def test_weights_sum_to_exactly_one_in_two_dimensions(length, tile, overlap):
    starts = tile_starts(length, tile, overlap)
    weights = blend_weights(starts, tile)
    other = blend_weights([0, 3, 6], 7)  # an axis that mixes
    total = torch.zeros(length, 13)
    for start, along in zip(starts, weights, strict=True):
        for left, across in zip([0, 3, 6], other, strict=True):
            total[start : start + tile, left : left + 7] += along[:, None] * across
    assert torch.equal(total, torch.ones(length, 13))


@pytest.mark.parametrize(("length", "tile", "overlap"), AXES)
def test_weights_rise_and_fall_linearly_and_mix_two_tiles_at_most(length, tile, overlap):
    starts = tile_starts(length, tile, overlap)
    whole = torch.zeros(len(starts), length)
    for i, (start, along) in enumerate(zip(starts, blend_weights(starts, tile), strict=True)):
        whole[i, start : start + tile] = along
    assert (whole >= 0).all() and ((whole > 0).sum(0) <= 2).all()
    for along in whole:
        peak = int(along.argmax())
        assert (along[: peak + 1].diff() >= 0).all() and (along[peak:].diff() <= 0).all()
    covering = sum(F.pad(torch.ones(tile), (s, length - s - tile)) for s in starts)
    assert torch.equal(whole.max(0).values[covering == 1], torch.ones(int((covering == 1).sum())))


def test_ramp_across_the_overlap_of_two():
    weights = blend_weights([0, 6], 10)
    rise = torch.tensor([0.125, 0.375, 0.625, 0.875])
    assert torch.equal(weights[1], torch.cat([rise, torch.ones(6)]))
    assert torch.equal(weights[0], torch.cat([torch.ones(6), 1 - rise]))


def test_a_picture_of_one_tile_is_scored_as_without_tiles(model):
    image = picture(48, 64)
    with torch.no_grad():
        expected = model(image[None])
    score_map, score = predict_tiled(model, image, (48, 64))
    torch.testing.assert_close(score_map, expected.score_map[0, 0])
    assert score == pytest.approx(expected.score.item(), rel=1e-5)


def test_where_one_tile_is_alone_the_map_is_that_tiles_own_bit_for_bit(model):
    image = picture(80, 112)
    found = predict_tiled(model, image, (48, 64), (16, 16), batch_size=1).score_map
    for top, rows in ((0, slice(0, 32)), (32, slice(48, 80))):
        for left, columns in ((0, slice(0, 48)), (48, slice(64, 112))):
            with torch.no_grad():
                own = model(image[None, :, top : top + 48, left : left + 64]).score_map[0, 0]
            expected = torch.zeros(80, 112)
            expected[top : top + 48, left : left + 64] = own
            assert torch.equal(found[rows, columns], expected[rows, columns])


def test_blend_is_the_weighted_sum_of_the_tiles_maps(model):
    image = picture(80, 112)
    found = predict_tiled(model, image, (48, 64), (16, 16), batch_size=3).score_map
    rise = (torch.arange(16) + 0.5) / 16
    with torch.no_grad():
        left, right = (model(image[None, :, :48, x : x + 64]).score_map[0, 0] for x in (0, 48))
    expected = (1 - rise) * left[:32, 48:] + rise * right[:32, :16]
    torch.testing.assert_close(found[:32, 48:64], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tile", [(96, 128), (24, 32), (50, 40)], ids=["large", "small", "odd"])
def test_tiles_of_another_size_are_resized_and_their_maps_back(model, tile):
    image = picture(*tile)
    with torch.no_grad():
        own = model(resize_image(image, (48, 64))[None]).score_map
    expected = F.interpolate(own, tile, mode="bilinear", antialias=True)[0, 0]
    torch.testing.assert_close(predict_tiled(model, image, tile).score_map, expected)


def test_score_is_the_maximum_after_the_models_gaussian_at_the_tiles_scale(small):
    model = RLRModel(dataclasses.replace(small, smoothing=8.0)).eval()
    score_map, score = predict_tiled(model, picture(100, 300), (96, 80), 8)
    sigma = [8.0 * 96 / 256, 8.0 * 80 / 256]
    expected = scipy.ndimage.gaussian_filter(score_map.double().numpy(), sigma, mode="reflect")
    assert score == pytest.approx(expected.max(), rel=1e-5)


def test_score_is_what_exceeds_its_surround_at_the_tiles_scale(small):
    model = RLRModel(dataclasses.replace(small, smoothing=8.0, image_surround=64.0)).eval()
    score_map, score = predict_tiled(model, picture(100, 300), (96, 80), 8)
    near = score_map.double().numpy()
    for sigma in (8.0, 64.0):
        blurred = scipy.ndimage.gaussian_filter(
            near, [sigma * 96 / 256, sigma * 80 / 256], mode="reflect"
        )
        near = blurred if sigma == 8.0 else near - blurred
    assert score == pytest.approx(near.max(), rel=1e-4)


def test_a_tile_counts_by_what_exceeds_its_surround(small):
    model = RLRModel(dataclasses.replace(small, surround=20.0)).eval()
    height, width = small.image_size
    image = picture(height, 2 * width)
    score_map, _ = predict_tiled(model, image, small.image_size, 0)
    with torch.inference_mode():
        tiles = model(torch.stack(image.split(width, dim=2))).score_map[:, 0]
    torch.testing.assert_close(score_map, torch.cat([*tiles], dim=1))


def test_score_is_the_mean_of_as_many_pixels_as_in_an_image_of_a_tiles_size(small):
    model = RLRModel(dataclasses.replace(small, smoothing=0.0, top_share=0.01)).eval()
    score_map, score = predict_tiled(model, picture(100, 80), (48, 64))
    highest = score_map.flatten().sort(descending=True).values[: round(0.01 * 48 * 64)]
    assert score == pytest.approx(highest.mean().item(), rel=1e-5)


def test_without_smoothing_the_score_is_the_maps_maximum(small):
    model = RLRModel(dataclasses.replace(small, smoothing=0.0)).eval()
    score_map, score = predict_tiled(model, picture(100, 80), (48, 64))
    assert score == score_map.max().item()


def test_no_more_than_a_batch_of_tiles_is_scored_at_once(model):
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    predict_tiled(model, picture(48 * 3, 64 * 3), (48, 64), 0, batch_size=4)
    assert seen == [4, 4, 1]


@pytest.mark.parametrize(
    ("tile", "overlap", "size", "shared"),
    [
        (1024, None, (1024, 1024), (128, 128)),
        (1024, 0, (1024, 1024), (0, 0)),
        ((512, 1024), None, (512, 1024), (64, 128)),
        ((512, 1024), 100, (512, 1024), (100, 100)),
        (7, (1, 2), (7, 7), (1, 2)),
    ],
)
def test_a_side_stands_for_both_and_an_eighth_is_shared(tile, overlap, size, shared):
    assert checked_tiles(tile, overlap) == (size, shared)


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [
        pytest.param(0, None, "tile must be a positive side", id="no-tile"),
        pytest.param(64.0, None, r"tile must be .* got tile=64\.0", id="float"),
        pytest.param(64, 8.0, r"overlap must be .* got overlap=8\.0", id="float-share"),
        pytest.param((64, -1), None, "tile must be a positive side", id="negative"),
        pytest.param((64, 64, 64), None, "tile must be a positive side", id="three"),
        pytest.param(64, 64, "overlap must be at least 0 and below the tile", id="whole"),
        pytest.param((64, 32), 40, "overlap must be at least 0 and below the tile", id="an-axis"),
        pytest.param(64, -1, "overlap must be at least 0 and below the tile", id="negative-share"),
        pytest.param(64, (1, 2, 3), "overlap must be at least 0", id="three-shares"),
    ],
)
def test_wrong_tiles_are_refused(tile, overlap, message):
    with pytest.raises(ValueError, match=message):
        checked_tiles(tile, overlap)


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        pytest.param(
            picture(40, 200), {}, "40 x 200 pixels, less than a tile of 48 x 64", id="low"
        ),
        pytest.param(picture(64, 64)[None], {}, r"image must be \(3, H, W\) uint8", id="batch"),
        pytest.param(torch.rand(3, 64, 64), {}, "uint8, got .* torch.float32", id="float"),
        pytest.param(picture(64, 64), {"batch_size": 0}, "batch_size must be positive", id="none"),
    ],
)
def test_what_cannot_be_tiled_is_refused(model, image, options, message):
    with pytest.raises(ValueError, match=message):
        predict_tiled(model, image, (48, 64), **options)


def test_sides_of_numpy_are_those_of_python():
    assert checked_tiles(np.int64(64), np.int32(8)) == checked_tiles(64, 8)
    assert all(type(side) is int for side in checked_tiles(np.int64(64)).size)


def test_an_array_is_not_taken_for_a_tensor(model):
    array = picture(64, 64).numpy()
    with pytest.raises(TypeError, match="image must be a tensor, got ndarray"):
        predict_tiled(model, array, 48)
    with pytest.raises(TypeError, match="images must be a tensor, got ndarray"):
        model(array[None])
