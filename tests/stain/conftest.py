"""Tissue with planted stains: the truth that fits must find."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import pytest

from wsi_stain.config import ColorReference

Rgb8 = npt.NDArray[np.uint8]
Doubles = npt.NDArray[np.float64]

HE = np.array([[0.651, 0.701, 0.290], [0.216, 0.801, 0.558]])
WHITE = (243.0, 241.0, 244.0)


class PlantTissue(Protocol):
    """Signature of the `plant_tissue` fixture."""

    def __call__(
        self,
        stains: Doubles = HE,
        strengths: tuple[float, float] = (1.0, 1.0),
        white: tuple[float, float, float] = WHITE,
        n: int = 20_000,
        seed: int = 0,
    ) -> Rgb8:
        """Draw pixels."""
        ...


@pytest.fixture(scope="session")
def plant_tissue() -> PlantTissue:
    """Give the function that draws uint8 (n, 3) pixels from two known stains by Beer-Lambert.

    45 % of the pixels hold only the second stain, 10 % only the first, 45 % both; densities are
    gamma distributed. The same seed gives the same densities whatever the stains.
    """
    return _plant_tissue


def _plant_tissue(
    stains: Doubles = HE,
    strengths: tuple[float, float] = (1.0, 1.0),
    white: tuple[float, float, float] = WHITE,
    n: int = 20_000,
    seed: int = 0,
) -> Rgb8:
    rng = np.random.default_rng(seed)
    density = rng.gamma((2.0, 3.0), (0.35, 0.15), size=(n, 2))
    kind = rng.random(n)
    density[kind < 0.45, 0] = 0.0
    density[kind > 0.90, 1] = 0.0
    unit = stains / np.linalg.norm(stains, axis=1, keepdims=True)
    levels = np.array(white) * np.exp(-(density * strengths) @ unit)
    pixels: Rgb8 = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
    return pixels


@pytest.fixture(scope="session")
def reference() -> ColorReference:
    """Reference of a pale IHC: a white of its own, and 33 OD quantiles of a gamma law."""
    rng = np.random.default_rng(4)
    quantiles = np.quantile(0.05 + rng.gamma(1.0, 0.14, 100_000), np.linspace(0, 0.9999, 33))
    return ColorReference(
        white=(243.0, 243.0, 244.0),
        stain_od=((0.624, 0.690, 0.367), (0.278, 0.539, 0.795)),
        stain_c99=(1.03, 1.83),
        mean_od_quantiles=tuple(quantiles.tolist()),
        # Blue, and brown in the last ranks; the mean over channels is the quantile.
        ranked_od=tuple(
            (q * (1.3 - 0.6 * w), q, q * (0.7 + 0.6 * w))
            for q, w in zip(quantiles.tolist(), (np.arange(33) / 32) ** 6, strict=True)
        ),
    )
