"""Gradient maps: closed forms, and that polarity and hue do not matter."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch

from wsi_stain.translate.maps import gradient_map

KINDS = ("sobel", "ngf", "dog", "smooth")


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("slope_x", "slope_y"), [(0.02, 0.0), (0.0, -0.01), (0.03, 0.04)])
def test_sobel_equals_the_slope_when_luma_is_a_ramp(slope_x: float, slope_y: float) -> None:
    ys, xs = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    ramp = (slope_x * xs + slope_y * ys).expand(1, 3, 16, 16)
    inside = gradient_map(ramp, "sobel", 0.5)[..., 1:-1, 1:-1]
    expected = math.sqrt(slope_x**2 + slope_y**2 + 1e-8) / 0.5
    torch.testing.assert_close(inside, torch.full_like(inside, expected), rtol=1e-3, atol=1e-6)
    ngf = gradient_map(ramp, "ngf", 0.5)[..., 1:-1, 1:-1]
    torch.testing.assert_close(ngf, inside / (inside + 1.0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["sobel", "ngf", "dog"])
def test_map_is_the_same_when_polarity_flips(
    kind: Literal["sobel", "ngf", "dog"],
) -> None:
    y = 0.3 * _randn(2, 3, 32, 32)
    torch.testing.assert_close(gradient_map(y, kind, 0.2), gradient_map(-y, kind, 0.2))


def test_map_is_blind_when_luma_is_constant() -> None:
    y = torch.zeros(1, 3, 16, 16)
    y[:, 0] = torch.linspace(-0.5, 0.5, 16)
    y[:, 1] = -y[:, 0] * 0.299 / 0.587
    assert float(gradient_map(y, "sobel").max()) < 2e-4


def test_smooth_equals_a_gaussian_when_given_a_point() -> None:
    y = torch.zeros(1, 3, 33, 33)
    y[:, :, 16, 16] = 1.0
    x = torch.arange(-6, 7, dtype=torch.float32)
    bell = torch.exp(-(x**2) / 8.0)
    bell /= bell.sum()
    blurred = gradient_map(y, "smooth")[0, 0, 10:23, 10:23]
    torch.testing.assert_close(blurred, torch.outer(bell, bell), rtol=1e-4, atol=1e-7)


def test_dog_is_zero_when_flat_and_positive_at_an_edge() -> None:
    y = torch.zeros(1, 3, 32, 32)
    y[..., 16:] = 1.0
    edges = gradient_map(y, "dog")[0, 0, 16]
    assert float(edges[:6].max()) < 1e-6
    assert float(edges[14:18].max()) > 0.05


def test_maps_differ_when_kinds_differ() -> None:
    y = 0.3 * _randn(1, 3, 48, 48)
    maps = [gradient_map(y, kind, 0.3) for kind in KINDS]
    for i, a in enumerate(maps):
        assert a.shape == (1, 1, 48, 48)
        for b in maps[i + 1 :]:
            assert float((a - b).abs().mean()) > 0.01


def test_scale_is_per_image_when_given_as_a_tensor() -> None:
    y = 0.3 * _randn(2, 3, 16, 16)
    scales = torch.tensor([0.5, 2.0]).view(2, 1, 1, 1)
    both = gradient_map(y, "sobel", scales)
    torch.testing.assert_close(both[1:], gradient_map(y[1:], "sobel", 2.0))
