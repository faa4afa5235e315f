"""Structure in closed form: the information is that of Gaussians, the pull is what it says."""

from __future__ import annotations

import math

import pytest
import torch

from wsi_stain.config import GuidanceSpec
from wsi_stain.translate.guidance import StepState
from wsi_stain.translate.maps import gradient_map
from wsi_stain.translate.noise import Schedule
from wsi_stain.translate.structure import (
    MAX_CORRELATION,
    EdgeInformation,
    edge_map,
    local_information,
)


@pytest.fixture(scope="module")
def schedule() -> Schedule:
    return Schedule(1000, 1e-4, 2e-2)


def _noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _picture(seed: int = 0, size_px: int = 64) -> torch.Tensor:
    """Discs on a flat ground: edges with a place."""
    y, x = torch.meshgrid(torch.arange(size_px), torch.arange(size_px), indexing="ij")
    picture = torch.full((1, 3, size_px, size_px), 0.6)
    rng = torch.Generator().manual_seed(seed)
    for _ in range(6):
        cy, cx = torch.randint(8, size_px - 8, (2,), generator=rng).tolist()
        picture[..., (y - cy) ** 2 + (x - cx) ** 2 < 30] = -0.2
    return picture


def _state(y0_hat: torch.Tensor, edges: torch.Tensor, t: int = 80) -> StepState:
    return StepState(t, y0_hat, y0_hat, y0_hat, edges, *3 * (_not_asked_for,))


def _not_asked_for() -> torch.Tensor:
    raise AssertionError("structure in closed form needs neither x_t nor g_t")


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_information_is_that_of_correlated_gaussians(rho: float) -> None:
    a = 10.0 * _noise(1, 1, 400, 400, seed=1)
    b = rho * a + math.sqrt(1.0 - rho**2) * 10.0 * _noise(1, 1, 400, 400, seed=2)
    found = local_information(a, b, window_sd_px=16.0)[..., 50:-50, 50:-50].mean()
    assert float(found) == pytest.approx(-0.5 * math.log(1.0 - rho**2), abs=0.02)


def test_information_is_capped_for_equal_maps_and_zero_for_opposite_ones() -> None:
    a = 10.0 * _noise(1, 1, 64, 64, seed=1)
    cap = -0.5 * math.log(1.0 - MAX_CORRELATION**2)
    assert float(local_information(a, a, 3.0).min()) == pytest.approx(cap, rel=1e-3)
    assert float(local_information(a, -a, 3.0).max()) == 0.0


def test_edge_map_is_that_of_the_channels_mean() -> None:
    picture = _noise(1, 3, 16, 16, seed=3)
    grey = picture.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    torch.testing.assert_close(edge_map(picture), gradient_map(grey, "sobel"), atol=1e-4, rtol=0)


def test_pull_raises_the_information_and_leaves_the_hue(schedule: Schedule) -> None:
    source, start = _picture(0), _picture(0) * 0.2 + 0.02 * _noise(1, 3, 64, 64, seed=4)
    edges = edge_map(source)
    term = EdgeInformation(schedule, GuidanceSpec(edges="gaussian"))
    pull = term(_state(start, edges))
    assert torch.equal(pull[:, 0], pull[:, 1])
    assert torch.equal(pull[:, 0], pull[:, 2])
    before = local_information(edges, edge_map(start), 2.5).sum()
    after = local_information(edges, edge_map(start + 0.01 * pull), 2.5).sum()
    assert float(after) > 1.02 * float(before)


def test_pull_is_bounded_by_the_push_over_sigma(schedule: Schedule) -> None:
    spec = GuidanceSpec(edges="gaussian", edges_scale=1e9, edges_push=0.3)
    for t in (20, 150):
        pull = EdgeInformation(schedule, spec)(_state(_picture(1), edge_map(_picture(0)), t))
        assert float(pull.abs().max()) == pytest.approx(0.3 / float(schedule.sigma[t]), rel=1e-5)


def test_pull_at_a_place_depends_on_its_surroundings_only(schedule: Schedule) -> None:
    """A tile's pull is that of the slide, away from its border: no seams by construction."""
    source, picture = _picture(0, 96), _picture(2, 96) + 0.05 * _noise(1, 3, 96, 96, seed=5)
    term = EdgeInformation(schedule, GuidanceSpec(edges="gaussian"))
    whole = term(_state(picture, edge_map(source)))
    part = term(_state(picture[..., :64], edge_map(source[..., :64])))
    torch.testing.assert_close(part[..., :44], whole[..., :44], atol=1e-4, rtol=1e-4)
