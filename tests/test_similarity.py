"""PSNR and SSIM, against the formulas window by window and against what they must obey."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fluxdeploy.similarity import psnr, ssim


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    """A picture with smooth parts and an edge, and a noisy, darker copy."""
    rng = np.random.default_rng(0)
    down, across = np.mgrid[0:24, 0:17] / 24
    picture = np.stack([down, across, down * across], axis=-1)
    picture[8:, 6:] = (0.9, 0.1, 0.4)
    noisy = np.clip(0.9 * picture + rng.normal(0, 0.08, picture.shape), 0, 1)
    return picture.astype(np.float32), noisy.astype(np.float32)


def slow_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Equations 6 and 13 to 16 of the paper, for each window in turn."""
    weights = np.array(
        [[math.exp(-(i * i + j * j) / (2 * 1.5 * 1.5)) for j in range(-5, 6)] for i in range(-5, 6)]
    )
    weights /= weights.sum()
    c1, c2 = (0.01 * 1) ** 2, (0.03 * 1) ** 2
    values = []
    for channel in range(3):
        for i in range(a.shape[0] - 10):
            for j in range(a.shape[1] - 10):
                x = a[i : i + 11, j : j + 11, channel].astype(np.float64)
                y = b[i : i + 11, j : j + 11, channel].astype(np.float64)
                mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
                var_x = (weights * (x - mean_x) ** 2).sum()
                var_y = (weights * (y - mean_y) ** 2).sum()
                both = (weights * (x - mean_x) * (y - mean_y)).sum()
                luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
                structure = (2 * both + c2) / (var_x + var_y + c2)
                values.append(luminance * structure)
    return sum(values) / len(values)


def test_ssim_is_the_papers(pair: tuple[np.ndarray, np.ndarray]) -> None:
    expected = slow_ssim(*pair)
    assert 0.3 < expected < 0.95
    assert ssim(*pair) == pytest.approx(expected, abs=1e-9)


def test_ssim_of_one_window_is_defined(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = (picture[:11, :11] for picture in pair)
    assert ssim(a, b) == pytest.approx(slow_ssim(a, b), abs=1e-9)


def test_equal_pictures_have_all_similarity(pair: tuple[np.ndarray, np.ndarray]) -> None:
    picture, _ = pair
    assert ssim(picture, picture) == pytest.approx(1, abs=1e-12)
    assert psnr(picture, picture) == math.inf


def test_order_and_orientation_do_not_matter(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = pair
    turned = (a.transpose(1, 0, 2)[::-1], b.transpose(1, 0, 2)[::-1])
    for measure in (psnr, ssim):
        assert measure(a, b) == pytest.approx(measure(b, a), rel=1e-12)
        assert measure(a, b) == pytest.approx(measure(*turned), rel=1e-9)


def test_more_noise_is_less_alike() -> None:
    rng = np.random.default_rng(1)
    picture = rng.uniform(0.3, 0.7, (32, 32, 3))
    noise = rng.uniform(-0.3, 0.3, picture.shape)
    pictures = [picture + share * noise for share in (0.01, 0.1, 0.5, 1.0)]
    for measure in (psnr, ssim):
        values = [measure(picture, other) for other in pictures]
        assert values == sorted(values, reverse=True)


def test_a_negative_has_negative_structure(pair: tuple[np.ndarray, np.ndarray]) -> None:
    picture = np.repeat(np.random.default_rng(2).uniform(0, 1, (20, 20, 1)), 3, axis=-1)
    assert -1 <= ssim(picture, 1 - picture) < -0.5


@pytest.mark.parametrize(("difference", "decibels"), [(1.0, 0.0), (0.1, 20.0), (1 / 255, 48.1308)])
def test_psnr_has_a_peak_of_one(difference: float, decibels: float) -> None:
    dark = np.zeros((4, 5, 3), np.float32)
    assert psnr(dark, dark + np.float32(difference)) == pytest.approx(decibels, abs=1e-4)


def test_pictures_of_another_shape_are_refused() -> None:
    picture = np.zeros((16, 16, 3))
    for other in (np.zeros((16, 15, 3)), np.zeros((16, 16))):
        with pytest.raises(ValueError, match="Two pictures"):
            psnr(picture, other)
    with pytest.raises(ValueError, match="Two pictures"):
        ssim(picture[..., :1], picture[..., :1])
    with pytest.raises(ValueError, match="11x11"):
        ssim(picture[:10], picture[:10])
