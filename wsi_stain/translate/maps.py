"""Room 3 of 4: maps of structure, and the Gaussian that smooths maps.

In: pictures. Out: maps of their shape. Not here: what is asked of maps (`guidance`, `structure`,
`color`).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from wsi_stain.translate.pixels import to_model

__all__ = ["blur", "gradient_map", "measure_map_scale", "sobel"]

_LUMA = (0.299, 0.587, 0.114)


def gradient_map(y: torch.Tensor, kind: str, scale: float | torch.Tensor = 1.0) -> torch.Tensor:
    """Map structure without its polarity: always of luma, always a magnitude.

    Parameters
    ----------
    y
        float32 (B, 3, H, W) in [-1, 1] (noised or not).
    kind
        "sobel": magnitude over `scale`; "ngf": ``m / (m + scale)``; "dog": absolute difference
        of Gaussians; "smooth": Gaussian-smoothed luma.
    scale
        99th percentile of the clean map, one number per slide (or (B, 1, 1, 1) in training).

    Returns
    -------
    torch.Tensor
        float32 (B, 1, H, W).
    """
    weights = torch.tensor(_LUMA, device=y.device).view(1, 3, 1, 1)
    luma = (y * weights).sum(dim=1, keepdim=True)
    if kind == "smooth":
        return blur(luma, 2.0)
    if kind == "dog":
        return (blur(luma, 1.0) - blur(luma, 2.0)).abs() / scale
    magnitude = sobel(luma)
    return magnitude / (magnitude + scale) if kind == "ngf" else magnitude / scale


def sobel(luma: torch.Tensor) -> torch.Tensor:
    """Take the magnitude of the gradient, float32 (B, 1, H, W), per pixel; borders continue."""
    padded = F.pad(luma, (1, 1, 1, 1), mode="replicate")
    rows = padded[:, :, :-2] + 2.0 * padded[:, :, 1:-1] + padded[:, :, 2:]
    cols = padded[..., :-2] + 2.0 * padded[..., 1:-1] + padded[..., 2:]
    g_x = (rows[..., 2:] - rows[..., :-2]) / 8.0
    g_y = (cols[:, :, 2:] - cols[:, :, :-2]) / 8.0
    return torch.sqrt(g_x.square() + g_y.square() + 1e-8)


def blur(maps: torch.Tensor, sd_px: float) -> torch.Tensor:
    """Smooth each map of (B, C, H, W) by a Gaussian that ends at 3 sd; borders continue.

    All maps lie side by side as channels of one picture, each with a kernel of its own: for those
    there are fast kernels, for pictures of one channel there are none (a thirtieth of the time).
    """
    radius = round(3 * sd_px)
    x = torch.arange(-radius, radius + 1, device=maps.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (x / sd_px) ** 2)
    kernel = kernel / kernel.sum()
    side_by_side = maps.flatten(0, 1)[None].contiguous(memory_format=torch.channels_last)
    n = side_by_side.shape[1]
    padded = F.pad(side_by_side, (radius,) * 4, mode="replicate")
    rows = F.conv2d(padded, kernel.view(1, 1, 1, -1).expand(n, 1, 1, -1), groups=n)
    smooth = F.conv2d(rows, kernel.view(1, 1, -1, 1).expand(n, 1, -1, 1), groups=n)
    return smooth.view(maps.shape)


def measure_map_scale(pictures: NDArray[np.uint8], tissue: NDArray[np.bool_], kind: str) -> float:
    """Measure a slide's scale of the gradient map: its 99th percentile over tissue.

    Parameters
    ----------
    pictures
        Start images of sample patches of the slide, uint8 (n, t, t, 3).
    tissue
        Tissue pixels of those patches, bool (n, t, t).
    kind
        Gradient map, see `gradient_map`.

    Returns
    -------
    float
        Positive; the map divided by it is about 0..1.
    """
    strengths = gradient_map(to_model(pictures), kind)[:, 0].numpy()
    return max(1e-3, float(np.percentile(strengths[tissue], 99.0)))
