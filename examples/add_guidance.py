"""Add a term of your own to the guidance: python examples/add_guidance.py."""

import torch

from wsi_stain import load_bundle
from wsi_stain.config import SampleConfig, resolve_sampling
from wsi_stain.translate.guidance import StepState, Sum
from wsi_stain.translate.noise import NoiseField


class KeepBrightness:
    """Pulls each pixel's brightness towards that of the start image at the same noise level."""

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def __call__(self, state: StepState) -> torch.Tensor:
        """Give the wanted direction, float32 (B, 3, H, W)."""
        off = state.x_t.mean(dim=1, keepdim=True) - state.y_t.mean(dim=1, keepdim=True)
        return self.strength * off.expand_as(state.y_t)


def main() -> None:
    """Paint one tile with the bundle's guidance, and with one term more."""
    bundle = load_bundle("ki67", torch.device("cpu"))
    solver, guidance = resolve_sampling(bundle.spec, SampleConfig(steps=4))
    start = torch.linspace(-0.4, 0.8, 128).expand(1, 3, 128, 128)  # a ramp instead of tissue
    field, corner = NoiseField(seed=0), torch.zeros(1, 2, dtype=torch.int64)
    sampler = bundle.sampler(solver, guidance)
    for name, more in (("as shipped", []), ("with KeepBrightness", [KeepBrightness(20.0)])):
        sampler.guidance = Sum([sampler.guidance, *more])
        painted = sampler(start, lambda step: field.at(corner, step, 128), 1.0)
        off = (painted.mean(dim=1) - start.mean(dim=1)).abs().mean()
        print(f"{name}: brightness off by {127.5 * float(off):.1f} grey levels")


if __name__ == "__main__":
    main()
