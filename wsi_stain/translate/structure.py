"""Room 3 of 4: structure by mutual information in closed form, no net to train.

In: one frozen `StepState`. Out: a gradient of the picture's shape. Not here: the learned critic
(`guidance`), step sizes.

Around each pixel the two gradient maps, of the H&E and of the clean estimate, are taken as jointly
Gaussian with correlation rho. Their mutual information is then ``-1/2 ln(1 - rho^2)``, exact for
Gaussians and a lower bound on what the critic must learn. Its gradient is exact too, at all noise
levels, because it acts on the clean estimate and not on the noised picture.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from wsi_stain.config import GuidanceSpec
from wsi_stain.translate.guidance import StepState, blur, gradient_map
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
    return gradient_map(y.mean(dim=1, keepdim=True), "sobel")


def local_information(a: torch.Tensor, b: torch.Tensor, window_sd_px: float) -> torch.Tensor:
    """Give the mutual information of two maps around each pixel, as of jointly Gaussian ones.

    Parameters
    ----------
    a, b
        float32 (B, 1, H, W).
    window_sd_px
        Gaussian window.

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
    moments = F.avg_pool2d(torch.cat([a, b, a * a, b * b, a * b]), MOMENT_STRIDE_PX)
    joined = blur(moments, window_sd_px / MOMENT_STRIDE_PX)
    mean_a, mean_b, square_a, square_b, product = joined.chunk(5)
    variance_a = (square_a - mean_a.square()).clamp_min(0.0) + VARIANCE_FLOOR
    variance_b = (square_b - mean_b.square()).clamp_min(0.0) + VARIANCE_FLOOR
    rho = (product - mean_a * mean_b) / torch.sqrt(variance_a * variance_b)
    return -0.5 * torch.log1p(-rho.clamp(0.0, MAX_CORRELATION).square())


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

    def __call__(self, state: StepState) -> torch.Tensor:
        """Give ``s_E grad sum I(g_x; g(y0_hat))``, bounded."""
        with torch.enable_grad():
            y0_hat = state.y0_hat.detach().clone().requires_grad_(True)
            nats = local_information(state.edges, edge_map(y0_hat), self.spec.edges_window_px)
            (gradient,) = torch.autograd.grad(MOMENT_STRIDE_PX**2 * nats.sum(), y0_hat)
        bound = self.spec.edges_push / float(self.schedule.sigma[state.t])
        return (self.spec.edges_scale * gradient).clamp(-bound, bound)
