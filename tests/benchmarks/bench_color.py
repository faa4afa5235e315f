"""Stain normalization: one color map per slide beside torchstain's Macenko, and beside float64.

torchstain fits each tile anew; ours is fitted once per slide, so only its application is timed.
One thread each.
"""

from __future__ import annotations

import importlib.util

import cv2
import numpy as np
import numpy.typing as npt
import torch
from ruler import Action, start
from specimen import GLASS, dense_tissue

from wsi_stain.config import ColorReference
from wsi_stain.stain.normalize import StainTransform, fit_stain

HAS_TORCHSTAIN = importlib.util.find_spec("torchstain") is not None
if HAS_TORCHSTAIN:
    from torchstain.torch.normalizers.macenko import TorchMacenkoNormalizer

Pixels = npt.NDArray[np.uint8]

SIDE_PX, QUICK_SIDE_PX = 1024, 256


def apply_float64(transform: StainTransform, rgb: Pixels) -> npt.NDArray[np.float64]:
    """Apply the same map in float64, not rounded."""
    od = -np.log(np.maximum(rgb.astype(np.float64), 1.0) / np.array(transform.white))
    moved = od @ np.array(transform.od_map).T
    levels: npt.NDArray[np.float64] = np.array(transform.target_white) * np.exp(-moved)
    return np.clip(levels, 0.0, 255.0)


def torchstain_action(rgb: Pixels) -> Action:
    """Give torchstain's per-tile Macenko, fitted to this very tile."""
    normalizer = TorchMacenkoNormalizer()
    tensor = torch.from_numpy(rgb).permute(2, 0, 1).float()
    normalizer.fit(tensor)
    return lambda: normalizer.normalize(I=tensor, stains=False)


def main() -> None:
    ruler = start("color", __doc__)
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    side_px = QUICK_SIDE_PX if ruler.quick else SIDE_PX
    rgb = dense_tissue(side_px, side_px)
    transform = fit_stain(rgb.reshape(-1, 3), GLASS, ColorReference())
    actions: dict[str, Action] = {"ours": lambda: transform.apply(rgb)}
    if HAS_TORCHSTAIN:
        actions["torchstain"] = torchstain_action(rgb)
    times = ruler.times(actions)
    speed = {who: rgb.size / 3e6 / time.wall_s for who, time in times.items()}
    peer = "torchstain Macenko (torch)" if HAS_TORCHSTAIN else None
    ruler.report("normalization", "MP/s", speed["ours"], peer, speed.get("torchstain"))
    off = np.abs(transform.apply(rgb) - apply_float64(transform, rgb)).max()
    ruler.report("normalization, largest error", "grey levels", float(off), "float64", None)


if __name__ == "__main__":
    main()
