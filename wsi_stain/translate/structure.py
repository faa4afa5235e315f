"""Room 3 of 4: structure by mutual information in closed form, no net to train.

In: one frozen `StepState`. Out: a gradient of the picture's shape. Not here: the learned critic
(`guidance`), step sizes.

Around each pixel the two gradient maps, of the H&E and of the clean estimate, are taken as jointly
Gaussian with correlation rho. Their mutual information is then ``-1/2 ln(1 - rho^2)``, exact for
Gaussians and a lower bound on what the critic must learn. Its gradient is exact too, at all noise
levels, because it acts on the clean estimate and not on the noised picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from wsi_stain.config import GuidanceSpec
from wsi_stain.translate.guidance import StepState
from wsi_stain.translate.maps import sobel
from wsi_stain.translate.noise import Schedule

__all__ = ["EdgeInformation", "edge_map", "local_information"]

MAX_CORRELATION = 0.99
"""Where the maps agree this well there is nothing left to gain, and ln(1 - rho^2) diverges."""
MOMENT_STRIDE_PX = 2
VARIANCE_FLOOR = 0.004
"""Added to both variances: a map without edges, flat stroma, has no correlation to speak of."""


def edge_map(y: torch.Tensor) -> torch.Tensor:
    """Map edges by the mean of the channels, so that pulling at them tints nothing.

    Luma would pull at green five times as hard as at blue, and leave colored fringes.

    Parameters
    ----------
    y
        float32 (B, 3, H, W) in [-1, 1].

    Returns
    -------
    torch.Tensor
        Sobel magnitude, float32 (B, 1, H, W), not scaled.
    """
    return sobel(_grey(y))


def _grey(y: torch.Tensor) -> torch.Tensor:
    return y.mean(dim=1, keepdim=True)


@dataclass(frozen=True)
class Moments:
    """Mean and variance of a map around each place, float32 (B, 1, H/2, W/2)."""

    mean: torch.Tensor
    variance: torch.Tensor


def local_moments(maps: torch.Tensor, window_sd_px: float) -> Moments:
    """Take mean and variance (with the floor added) of maps, float32 (B, 1, H, W)."""
    mean, square = _smooth(torch.cat([maps, maps * maps]), window_sd_px).chunk(2)
    return Moments(mean, (square - mean.square()).clamp_min(0.0) + VARIANCE_FLOOR)


def local_information(
    a: torch.Tensor, b: torch.Tensor, window_sd_px: float, moments_a: Moments | None = None
) -> torch.Tensor:
    """Give the mutual information of two maps around each pixel, as of jointly Gaussian ones.

    Parameters
    ----------
    a, b
        float32 (B, 1, H, W).
    window_sd_px
        Gaussian window.
    moments_a
        Those of `a`, where they are known already.

    Returns
    -------
    torch.Tensor
        Nats, float32 (B, 1, H/2, W/2), 0..1.96; 0 where the correlation is negative, because an
        edge that is missing there is information too, but not the wanted one.

    Notes
    -----
    Moments are smooth, so they are taken on every second pixel: a sixth of the time.

    References
    ----------
    Cover and Thomas, Elements of Information Theory, example 8.5.1.
    """
    known = moments_a or local_moments(a, window_sd_px)
    mean, square, product = _smooth(torch.cat([b, b * b, a * b]), window_sd_px).chunk(3)
    variance = (square - mean.square()).clamp_min(0.0) + VARIANCE_FLOOR
    rho = (product - known.mean * mean) / torch.sqrt(known.variance * variance)
    return -0.5 * torch.log1p(-rho.clamp(0.0, MAX_CORRELATION).square())


def _smooth(maps: torch.Tensor, window_sd_px: float) -> torch.Tensor:
    """Average maps (B, 1, H, W) in a Gaussian window around every second pixel.

    Two matrix products, whose gradients are two more: a third of the time of convolutions with
    one channel, for which no fast kernels exist. Pairs of rows, which lie in memory as wholes, are
    added first: half the operations.
    """
    n, channels, height_px, width_px = maps.shape
    n_rows = height_px // MOMENT_STRIDE_PX
    even = maps[..., : n_rows * MOMENT_STRIDE_PX, :]
    pairs = even.reshape(n, channels, n_rows, MOMENT_STRIDE_PX, width_px).sum(dim=3)
    rows = _places(n_rows, window_sd_px, maps) / MOMENT_STRIDE_PX
    smooth: torch.Tensor = rows @ (pairs @ _window(width_px, window_sd_px, maps).mT)
    return smooth


def _window(side_px: int, window_sd_px: float, like: torch.Tensor) -> torch.Tensor:
    """Weigh the pixels of a row for each place: means of pairs, then `_places`.

    Returns
    -------
    torch.Tensor
        float32 (side_px // 2, side_px); each row sums to 1, the border is continued.
    """
    weights = _places(side_px // MOMENT_STRIDE_PX, window_sd_px, like)
    pixels = weights.repeat_interleave(MOMENT_STRIDE_PX, dim=1) / MOMENT_STRIDE_PX
    return F.pad(pixels, (0, side_px - pixels.shape[1]))


def _places(n_places: int, window_sd_px: float, like: torch.Tensor) -> torch.Tensor:
    """Weigh places for each place by a Gaussian that ends at 3 sd, float32 (n, n)."""
    sd = window_sd_px / MOMENT_STRIDE_PX
    radius = round(3 * sd)
    x = torch.arange(-radius, radius + 1, device=like.device)
    kernel = torch.exp(-0.5 * (x / sd) ** 2)
    places = torch.arange(n_places, device=like.device)[:, None]
    seen = (places + x).clamp(0, n_places - 1)
    weights = torch.zeros(n_places, n_places, device=like.device)
    return weights.scatter_add_(1, seen, (kernel / kernel.sum()).expand(n_places, -1))


class EdgeInformation:
    """Structure: the gradient of the local mutual information of the two edge maps.

    Parameters
    ----------
    schedule
        Noise levels.
    spec
        `edges_scale`, `edges_push`, `edges_window_px`.

    Notes
    -----
    The pull at a pixel is bounded by ``edges_push / sigma_t`` (rms over channels), and equal for
    all channels: lightness moves, hue stays with the score net.
    """

    def __init__(self, schedule: Schedule, spec: GuidanceSpec) -> None:
        self.schedule, self.spec = schedule, spec
        self._source: tuple[torch.Tensor, Moments] | None = None

    def __call__(self, state: StepState) -> torch.Tensor:
        """Give ``s_E grad sum I(g_x; g(y0_hat))``, bounded."""
        moments, window_px = self._moments(state.edges), self.spec.edges_window_px
        with torch.enable_grad():
            grey = _grey(state.y0_hat.detach()).requires_grad_(True)
            nats = local_information(state.edges, sobel(grey), window_px, moments)
            (gradient,) = torch.autograd.grad(MOMENT_STRIDE_PX**2 * nats.sum(), grey)
        bound = self.spec.edges_push / float(self.schedule.sigma[state.t])
        n_channels = state.y0_hat.shape[1]  # each has so much of the mean
        pull = (self.spec.edges_scale / n_channels * gradient).clamp(-bound, bound)
        return pull.expand_as(state.y0_hat)

    def _moments(self, edges: torch.Tensor) -> Moments:
        """Moments of the H&E's edges, which are the same array in all steps of a batch."""
        if self._source is None or self._source[0] is not edges:
            self._source = (edges, local_moments(edges, self.spec.edges_window_px))
        return self._source[1]
