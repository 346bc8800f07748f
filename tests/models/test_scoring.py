"""Distance, perturbation and score map against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F

from rlr_fast.models.scoring import ScoreMap, distance, perturb, smooth


def test_distance_is_mean_squared_error_plus_one_minus_cosine():
    rec, org = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    for b in range(2):
        for n in range(5):
            x, y = rec[b, n].double(), org[b, n].double()
            expected = ((x - y) ** 2).sum() / 7 + 1 - (x @ y) / (x.norm() * y.norm())
            assert distance(rec, org)[b, n].item() == pytest.approx(expected.item(), rel=1e-5)


def test_distance_of_a_zero_token_is_finite_with_finite_gradient():
    rec = torch.zeros(1, 2, 4, requires_grad=True)
    out = distance(rec, torch.zeros(1, 2, 4))
    out.sum().backward()
    assert torch.equal(out, torch.ones(1, 2)) and rec.grad.isfinite().all()


def test_distance_of_bf16_tokens_is_taken_in_float32():
    rec, org = torch.randn(2, 3, 64).bfloat16(), torch.randn(2, 3, 64).bfloat16()
    assert torch.equal(distance(rec, org), distance(rec.float(), org.float()))


@pytest.mark.parametrize("backend", ["dense", "triton"])
def test_distance_is_of_tokens_of_one_shape(backend):
    tokens = torch.randn(2, 3, 4)
    for other in (tokens[:1], tokens[:, :2], tokens[..., :2], tokens[0]):
        with pytest.raises(ValueError, match=r"must be of one shape \(B, N, C\), got"):
            distance(tokens, other, backend)
    with pytest.raises(ValueError, match="must be on one device, got cpu and meta"):
        distance(tokens, tokens.to("meta"), backend)


def test_whole_numbers_are_smoothed_as_they_are():
    values = np.full(64, 28)
    for sigma in (2.0, 16.0):
        np.testing.assert_allclose(smooth(values, sigma, 256, 0), 28)


def test_perturbation_scales_with_the_tokens_norm_over_channels():
    tokens, noise = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    expected = tokens + noise * tokens.norm(dim=-1, keepdim=True) / 8 * 4
    torch.testing.assert_close(perturb(tokens, 4.0, noise), expected)
    assert perturb(tokens, 0.0, noise) is tokens


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (7, 5)], ids=["square", "wide", "tiny"])
def test_image_score_is_the_maximum_after_scipys_gaussian(size):
    score_map = ScoreMap(size, 4.0)
    maps = [torch.rand(2, 1, 6, 5), torch.rand(2, 1, 3, 4)]
    full, score = score_map(maps)
    expected = torch.stack(
        [F.interpolate(m, size, mode="bilinear", align_corners=True) for m in maps]
    )
    torch.testing.assert_close(full, expected.mean(0))
    sigma = [4.0 * s / 256 for s in size]
    for b in range(2):
        smooth = scipy.ndimage.gaussian_filter(full[b, 0].double().numpy(), sigma)
        assert score[b].item() == pytest.approx(smooth.max(), rel=1e-5)


def test_the_centers_of_tokens_stay_where_they_are_or_the_corners_do():
    rows, columns = torch.arange(6.0), torch.arange(5.0)
    level = (rows[:, None] + 0.5) / 6 + (columns + 0.5) / 5  # of each token's center in the image
    pixels = (torch.arange(48) + 0.5) / 48 + (torch.arange(40)[:, None] + 0.5) / 40
    score_map, _ = ScoreMap((48, 40), 0.0, align_corners=False)([level[None, None]])
    inside = (0, 0, slice(4, 44), slice(4, 36))
    torch.testing.assert_close(score_map[inside], pixels.T[inside[2:]])
    assert score_map[0, 0, 0, 0] == level[0, 0] and score_map[0, 0, 3, 3] == level[0, 0]
    score_map, _ = ScoreMap((48, 40), 0.0)([level[None, None]])
    assert score_map[0, 0, 0, 0] == level[0, 0] and score_map[0, 0, 3, 3] > level[0, 0]


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("sigma", [9.0, 40.0, 200.0])
def test_a_wide_gaussian_is_scipys(sigma, axis):
    values = np.random.default_rng(0).random((300, 270), dtype=np.float32)
    smoothed = smooth(values, sigma, 256, axis)
    expected = scipy.ndimage.gaussian_filter1d(values.astype(float), sigma, axis, mode="reflect")
    assert smoothed.dtype == np.float32
    np.testing.assert_allclose(smoothed, expected, rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 4.0])
def test_the_score_map_is_what_exceeds_the_surround(smoothing):
    levels = [torch.rand(2, 1, 6, 5)]
    plain, _ = ScoreMap((24, 40), smoothing)(levels)
    full, score = ScoreMap((24, 40), smoothing, surround=32.0)(levels)
    for b in range(2):
        around = scipy.ndimage.gaussian_filter(plain[b, 0].double().numpy(), [3, 5], mode="reflect")
        np.testing.assert_allclose(full[b, 0], plain[b, 0] - around, atol=1e-6)
        sigma = [smoothing * 24 / 256, smoothing * 40 / 256]
        near = scipy.ndimage.gaussian_filter(full[b, 0].double().numpy(), sigma, mode="reflect")
        assert score[b].item() == pytest.approx(near.max(), rel=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 4.0])
def test_the_image_score_is_what_exceeds_its_own_surround(smoothing):
    levels = [torch.rand(2, 1, 6, 5)]
    map_alone, _ = ScoreMap((24, 40), smoothing, surround=96.0)(levels)
    full, score = ScoreMap((24, 40), smoothing, surround=96.0, image_surround=32.0)(levels)
    assert torch.equal(full, map_alone)
    for b in range(2):
        near = full[b, 0].double().numpy()
        sigma = [smoothing * 24 / 256, smoothing * 40 / 256]
        near = scipy.ndimage.gaussian_filter(near, sigma, mode="reflect")
        near -= scipy.ndimage.gaussian_filter(near, [3, 5], mode="reflect")
        assert score[b].item() == pytest.approx(near.max(), rel=1e-4)


def test_levels_are_shifted_and_weighed_before_their_mean():
    maps = [torch.rand(2, 1, 6, 5), torch.rand(2, 1, 3, 4)]
    plain = [ScoreMap((16, 16), 0.0)([m])[0] for m in maps]
    full, _ = ScoreMap((16, 16), 0.0, (0.25, -0.5), (2.0, 0.5))(maps)
    expected = (2 * (plain[0] - 0.25) + 0.5 * (plain[1] + 0.5)) / 2
    torch.testing.assert_close(full, expected)


def test_weights_of_one_and_offsets_of_zero_are_eq_16_to_the_bit():
    maps = [torch.rand(2, 1, 6, 5), torch.rand(2, 1, 3, 4)]
    levels = [F.interpolate(m, (16, 16), mode="bilinear", align_corners=True) for m in maps]
    assert torch.equal(ScoreMap((16, 16), 4.0)(maps)[0], torch.stack(levels).mean(0))


@pytest.mark.parametrize(
    ("share", "count"), [(0.0, 1), (0.001, 1), (0.0235, 6), (1.0, 256)], ids=str
)
def test_image_score_is_the_mean_of_the_highest_pixels(share, count):
    full, score = ScoreMap((16, 16), 0.0, top_share=share)([torch.rand(3, 1, 4, 4)])
    highest = full.flatten(1).sort(1, descending=True).values[:, :count]
    torch.testing.assert_close(score, highest.mean(1))


def test_without_smoothing_the_score_is_the_maps_maximum():
    full, score = ScoreMap((16, 16), 0.0)([torch.rand(3, 1, 4, 4)])
    torch.testing.assert_close(score, full.amax((1, 2, 3)))
