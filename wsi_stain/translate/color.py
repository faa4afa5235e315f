"""Room 3 of 4: color that is held, in closed form, no net to train.

In: one frozen `StepState`. Out: a gradient of the picture's shape. Not here: which color (the start
image's).

At the level where the start image enters, the noise hides the hue of a single nucleus: left alone,
the process draws its own, and neighbors turn green, yellow and violet. The energy is the squared
distance of the local color, clean estimate against start image; its gradient is bounded and clipped
with the others.
"""

from __future__ import annotations

import torch

from wsi_stain.config import GuidanceSpec
from wsi_stain.translate.guidance import StepState
from wsi_stain.translate.maps import blur
from wsi_stain.translate.noise import Schedule

__all__ = ["ColorHold"]


class ColorHold:
    """Color: the pull at the start image's local chroma.

    Parameters
    ----------
    schedule
        Noise levels.
    spec
        `color_pull`, the share of the difference that one step makes good, and `color_window_px`.

    Notes
    -----
    Only differences between channels are held, and only their low frequencies: lightness and
    texture stay with the score net and the structure term.

    References
    ----------
    Choi et al., "ILVR: Conditioning method for denoising diffusion probabilistic models", ICCV
    2021 (arXiv 2108.02938): the low frequencies of all channels, replaced on the noised picture.
    """

    def __init__(self, schedule: Schedule, spec: GuidanceSpec) -> None:
        self.schedule, self.spec = schedule, spec

    def __call__(self, state: StepState) -> torch.Tensor:
        """Give the gradient whose step moves the clean estimate by ``color_pull`` of the way."""
        missing = state.start - state.y0_hat
        missing = missing - missing.mean(dim=1, keepdim=True)
        local = blur(missing, self.spec.color_window_px)
        return (self.spec.color_pull / self.schedule.kappa(state.t)) * local
