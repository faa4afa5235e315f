"""Room 3 of 4: uint8 pictures to the model's tensors and back. Nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["to_model", "to_rgb"]


def to_model(rgb: NDArray[np.uint8], device: torch.device | str = "cpu") -> torch.Tensor:
    """Map uint8 (B, h, w, 3) to float32 (B, 3, h, w) in [-1, 1]."""
    tensor = torch.from_numpy(np.ascontiguousarray(rgb)).to(device).permute(0, 3, 1, 2)
    return tensor.float().div_(127.5).sub_(1.0).contiguous()


def to_rgb(y: torch.Tensor, gain: Sequence[float] = (1.0, 1.0, 1.0)) -> NDArray[np.uint8]:
    """Map float (B, 3, h, w) in [-1, 1] to uint8 (B, h, w, 3), clipped and rounded.

    `gain` scales the channels before they are rounded, so that no grey level is left out.
    """
    scale = 127.5 * torch.tensor(gain, dtype=torch.float32, device=y.device)[:, None, None]
    levels = (y.detach().float().clamp(-1, 1) + 1.0).mul_(scale)
    scaled = levels.round_().clamp_(max=255.0).to(torch.uint8)
    rgb: NDArray[np.uint8] = scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return rgb
