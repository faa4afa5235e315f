"""Noise by place, and the schedule against its closed form."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_stain.translate.noise import MAP_NOISE_STEP, START_NOISE_STEP, NoiseField, Schedule

SIDE_PX = 256
STEPS = (START_NOISE_STEP, 1, 2, 137, 1000, MAP_NOISE_STEP)
Z_LIMIT = 4.5  # chance of one pass in 1e5 for a standard normal


def _field(seed: int, step: int, x_px: int = 0, y_px: int = 0) -> npt.NDArray[np.float64]:
    places = torch.tensor([[x_px, y_px]])
    return NoiseField(seed).at(places, step, SIDE_PX)[0].numpy().astype(np.float64)


def _z(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """Correlation in units of its standard error under independence."""
    return float((a * b).mean() * math.sqrt(a.size))


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
@pytest.mark.parametrize("step", STEPS)
def test_moments_are_normal_when_drawn_at_any_seed_and_step(seed: int, step: int) -> None:
    values = _field(seed, step).ravel()
    n = values.size
    standard_errors = {1: 1.0, 2: math.sqrt(2.0), 3: math.sqrt(15.0), 4: math.sqrt(96.0)}
    for power, error in standard_errors.items():
        expected = {1: 0.0, 2: 1.0, 3: 0.0, 4: 3.0}[power]
        z = ((values**power).mean() - expected) / (error / math.sqrt(n))
        assert abs(z) < Z_LIMIT, f"moment {power}: z = {z:.2f}"


def test_distribution_is_normal_when_binned() -> None:
    values = np.concatenate([_field(seed, 5).ravel() for seed in range(4)])
    edges = [-math.inf, -3.0, -2.0, -1.0, -0.3, 0.0, 0.3, 1.0, 2.0, 3.0, math.inf]
    phi = [0.5 * (1.0 + math.erf(edge / math.sqrt(2.0))) for edge in edges]
    expected = np.diff(phi) * values.size
    counts = np.histogram(values, edges)[0]
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 33.7  # 9 degrees of freedom, 1 in 10,000
    assert np.abs(values).max() > 4.5  # the tails are there: 786,432 values


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("lag", [(0, 1), (1, 0), (1, 1), (0, 2), (3, -1), (16, 0), (0, 128)])
def test_neighbors_are_uncorrelated_when_shifted(step: int, lag: tuple[int, int]) -> None:
    field = _field(3, step)
    dy, dx = lag
    for a in range(3):
        for b in range(3):
            assert abs(_z(field[a], np.roll(field[b], (dy, dx), (0, 1)))) < Z_LIMIT


def test_squares_of_neighbors_are_uncorrelated_when_shifted() -> None:
    # Channels 0 and 1 share a Box-Muller radius: only independent if the angle is uniform.
    squares = (_field(4, 7) ** 2 - 1.0) / math.sqrt(2.0)
    for a, b in combinations(range(3), 2):
        assert abs(_z(squares[a], squares[b])) < Z_LIMIT
    for lag in ((0, 1), (1, 0), (1, -1)):
        assert abs(_z(squares[0], np.roll(squares[0], lag, (0, 1)))) < Z_LIMIT


def test_fields_are_uncorrelated_when_seed_step_or_channel_differ() -> None:
    fields = [_field(seed, step) for seed in (0, 1, 12345) for step in STEPS]
    channels = [channel for field in fields for channel in field]
    scores = np.array([_z(a, b) for a, b in combinations(channels, 2)])
    assert np.abs(scores).max() < 5.0  # 1,431 pairs
    assert np.sqrt((scores**2).mean()) == pytest.approx(1.0, abs=0.08)


@settings(max_examples=30, deadline=None)
@given(
    x_px=st.integers(-(2**20), 2**20),
    y_px=st.integers(-(2**20), 2**20),
    dx=st.integers(-24, 24),
    dy=st.integers(-24, 24),
    step=st.integers(0, MAP_NOISE_STEP),
)
def test_values_are_equal_when_tiles_overlap(
    x_px: int, y_px: int, dx: int, dy: int, step: int
) -> None:
    size_px = 40
    pair = NoiseField(9).at(torch.tensor([[x_px, y_px], [x_px + dx, y_px + dy]]), step, size_px)
    left, top = max(0, dx), max(0, dy)
    width, height = size_px - abs(dx), size_px - abs(dy)
    first = pair[0, :, top : top + height, left : left + width]
    second = pair[1, :, top - dy : top - dy + height, left - dx : left - dx + width]
    assert torch.equal(first, second)


def test_tile_is_equal_when_batch_mates_differ() -> None:
    places = torch.tensor([[0, 0], [224, 0], [448, 224], [-32, 7], [5, -900]])
    field = NoiseField(1)
    together = field.at(places, 3, 64)
    for i in range(len(places)):
        assert torch.equal(field.at(places[i : i + 1], 3, 64)[0], together[i])
    assert torch.equal(field.at(places.flip(0), 3, 64), together.flip(0))


def test_place_is_told_apart_when_rows_and_columns_swap() -> None:
    a, b = NoiseField(0).at(torch.tensor([[10, 20], [20, 10]]), 1, 64).double().numpy()
    assert abs(_z(a, b)) < Z_LIMIT
    assert abs(_z(a, b.transpose(0, 2, 1))) < Z_LIMIT


@pytest.mark.gpu
def test_field_is_equal_when_drawn_on_the_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    places = torch.tensor([[0, 0], [1000, -77]])
    cpu = NoiseField(5).at(places, 17, 256)
    gpu = NoiseField(5).at(places.cuda(), 17, 256).cpu()
    assert float((cpu - gpu).abs().max()) < 1e-6


def test_schedule_equals_ddpm_when_multiplied_out() -> None:
    schedule = Schedule()
    abar = np.cumprod(1.0 - np.linspace(1e-4, 2e-2, 1000))
    assert schedule.alpha[0] == 1.0
    assert schedule.sigma[0] == 0.0
    assert schedule.alpha.dtype == np.float64
    np.testing.assert_allclose(schedule.alpha[1:], np.sqrt(abar), rtol=1e-12)
    np.testing.assert_allclose(schedule.sigma[1:], np.sqrt(1.0 - abar), rtol=1e-10)
    np.testing.assert_allclose(schedule.alpha**2 + schedule.sigma**2, 1.0, rtol=1e-14)


@pytest.mark.parametrize(
    ("step", "abar", "alpha", "sigma", "snr", "kappa"),
    [
        (300, 0.396, 0.630, 0.777, 0.66, 0.959),
        (150, 0.788, 0.888, 0.460, 3.7, 0.238),
        (80, 0.932, 0.965, 0.262, 13.6, 0.071),
        (40, 0.981, 0.990, 0.139, 50.7, 0.0195),
        (10, 0.998, 0.999, 0.044, 527.0, 0.0019),
        (1, 0.9999, 0.99995, 0.010, 1e4, 0.0001),
    ],
)
def test_schedule_equals_the_design_table_when_read(
    step: int, abar: float, alpha: float, sigma: float, snr: float, kappa: float
) -> None:
    schedule = Schedule()
    assert schedule.alpha[step] ** 2 == pytest.approx(abar, abs=6e-4)
    assert schedule.alpha[step] == pytest.approx(alpha, abs=6e-4)
    assert schedule.sigma[step] == pytest.approx(sigma, abs=6e-4)
    assert math.exp(2.0 * schedule.half_log_snr(step)) == pytest.approx(snr, rel=0.01)
    assert schedule.kappa(step) == pytest.approx(kappa, rel=0.03)


def test_tables_equal_the_schedule_when_moved_to_tensors() -> None:
    schedule = Schedule()
    alpha, sigma = schedule.tables()
    assert alpha.dtype == sigma.dtype == torch.float32
    np.testing.assert_allclose(alpha.numpy(), schedule.alpha, rtol=1e-6)
    np.testing.assert_allclose(sigma.numpy(), schedule.sigma, rtol=1e-6)
