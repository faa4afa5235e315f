"""Room 3 of 4: the nets. Score UNet, mutual-information critic, patch-contrast heads.

In: tensors. Out: tensors. Not here: losses, schedules' decisions, files.

Every normalization works on one position (over channels), never over a window: what a tile
shows at a place depends on the tile's frame as little as a convolution allows.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from wsi_stain.config import CriticSpec, HeadsSpec, NetSpec
from wsi_stain.translate.packing import pack, unpack

__all__ = ["ContrastHeads", "Critic", "ScoreNet", "count_parameters"]


MAX_AMPLITUDE = 20.0


class PositionNorm(nn.Module):
    """Layer norm over the channels of each position, (B, C, H, W) in and out.

    Group norm would average over the tile, so that a pixel would depend on where the tile's
    frame lies; this one does not, so overlapping tiles agree.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize; in channels_last memory the permutes are free."""
        return self._normed(x, self.weight, None)

    def modulated(self, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """Normalize, scale and shift all positions alike, (C,) each, in one pass."""
        weight = self.weight * scale
        return self._normed(x, weight, shift.to(weight.dtype))

    @staticmethod
    def _normed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        normed = F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias)
        return normed.permute(0, 3, 1, 2)


def _norm(kind: str, channels: int) -> nn.Module:
    return PositionNorm(channels) if kind == "position" else nn.GroupNorm(16, channels)


class NoiseLevel(nn.Module):
    """Embed the noise level ``ln(sigma / alpha)`` (B,) as features (B, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        frequencies = torch.exp(torch.linspace(math.log(0.25), math.log(16.0), 32))
        self.frequencies: torch.Tensor
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, log_noise: torch.Tensor) -> torch.Tensor:
        """Give the embedding, SiLU applied."""
        phase = log_noise.float()[:, None] * self.frequencies
        return F.silu(self.mlp(torch.cat([phase.cos(), phase.sin()], dim=1)))


def _silu(fresh: torch.Tensor) -> torch.Tensor:
    """Apply SiLU to what nobody else needs: in place, where no gradient will ask for it."""
    return F.silu(fresh, inplace=not torch.is_grad_enabled())


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, modulated by the noise level, added to the input."""

    def __init__(self, c_in: int, c_out: int, width: int, norm: str) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = _norm(norm, c_in), _norm(norm, c_out)
        self.conv_1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.conv_2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.modulate = nn.Linear(width, 2 * c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv_2.weight)
        nn.init.zeros_(self.conv_2.bias)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Map (B, c_in, H, W) and (B or 1, width) to (B, c_out, H, W)."""
        h = self.conv_1(_silu(self.norm_1(x)))
        scale, shift = self.modulate(level).to(h.dtype).chunk(2, dim=1)
        if len(level) == 1 and isinstance(self.norm_2, PositionNorm):
            h = self.norm_2.modulated(h, 1.0 + scale[0], shift[0])
        else:
            h = torch.addcmul(shift[..., None, None], self.norm_2(h), 1.0 + scale[..., None, None])
        out: torch.Tensor = self.conv_2(_silu(h))
        return out.add_(self.skip(x))


class ScoreNet(nn.Module):
    """Unconditional noise predictor of the IHC stain, preconditioned in VP form.

    With ``z = y_t / alpha - mean``, ``g = sigma / alpha`` and the data's spread ``sd``, the inner
    UNet F sees ``c_in z`` and the clean estimate is ``c_skip z + c_out F + mean`` (Karras et al.
    2022, arXiv 2206.00364, table 1, moved to VP variables). The last convolution starts at zero,
    so the untrained net is the best linear denoiser of white data.

    Parameters
    ----------
    spec
        Channels per level, residual blocks, pixel-unshuffle, data mean and spread.
    context_channels
        Channels seen beside the noised picture (a student's); their weights start at zero.
    """

    def __init__(self, spec: NetSpec, context_channels: int = 0) -> None:
        super().__init__()
        self.spec = spec
        width, chans = 4 * spec.channels[0], spec.channels
        packed = 3 * spec.unshuffle_px**2
        seen = packed + context_channels * spec.unshuffle_px**2
        self.level = NoiseLevel(width)
        self.head = nn.Conv2d(seen, chans[0], 3, padding=1)
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        self.up, self.grow = nn.ModuleList(), nn.ModuleList()
        for i, c in enumerate(chans):
            c_before = chans[max(0, i - 1)]
            self.down.append(_stack(c, c, spec, width))
            if i:
                self.shrink.append(nn.Conv2d(c_before, c, 3, stride=2, padding=1))
                self.grow.append(nn.Conv2d(c, c_before, 1))
        self.middle = ResidualBlock(chans[-1], chans[-1], width, spec.norm)
        for c in chans:
            self.up.append(_stack(2 * c, c, spec, width))
        self.norm_out = _norm(spec.norm, chans[0])
        self.tail = nn.Conv2d(chans[0], packed, 3, padding=1)
        nn.init.zeros_(self.tail.weight)
        nn.init.zeros_(self.tail.bias)  # type: ignore[arg-type]
        self.bypass = nn.Conv2d(chans[0] + seen, packed, 3, padding=1)
        with torch.no_grad():
            self.head.weight[:, packed:].zero_()
            self.bypass.weight[:, chans[0] + packed :].zero_()
        self.gain = nn.Linear(width, packed)
        nn.init.zeros_(self.gain.weight)
        nn.init.zeros_(self.gain.bias)
        mean = torch.tensor(spec.data_mean).view(1, 3, 1, 1)
        self.mean: torch.Tensor
        self.register_buffer("mean", mean, persistent=False)

    def lower(self, dtype: torch.dtype) -> None:
        """Put the UNet's weights in `dtype`; the noise level and the mean stay float32.

        In bfloat16 the phases of `NoiseLevel` would be off by 0.3 rad at low noise.
        """
        for child in self.children():
            if child is not self.level:
                child.to(dtype)

    def denoise(
        self,
        y_t: torch.Tensor,
        alpha: torch.Tensor,
        sigma: torch.Tensor,
        context: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Estimate the clean picture.

        Parameters
        ----------
        y_t
            float32 (B, 3, H, W), H and W multiples of ``unshuffle_px * 2 ** (levels - 1)``.
        alpha, sigma
            float32 (B,): the schedule at each sample's step; (1,): at that of all, which is faster.
        context
            float32 (B, context_channels, H, W), about [-1, 1]; none where the net takes none.

        Returns
        -------
        torch.Tensor
            y0_hat, float32 (B, 3, H, W), about [-1, 1], not clamped.
        """
        c_skip, c_out, z, inner = self.parts(y_t, alpha, sigma, context)
        return torch.addcmul(c_skip * z, c_out, inner).add_(self.mean)

    def parts(
        self,
        y_t: torch.Tensor,
        alpha: torch.Tensor,
        sigma: torch.Tensor,
        context: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Give ``c_skip, c_out, z, F(c_in z)``: the training loss has unit weight on F."""
        z, g = _center(y_t, alpha, sigma, self.mean)
        if self.spec.predict == "noise":
            seen = _join(y_t, context)
            return torch.ones_like(g), -g, z, self.inner(seen, torch.log(sigma / alpha))
        total = torch.sqrt(g**2 + self.spec.data_sd**2)
        c_skip, c_out = self.spec.data_sd**2 / total**2, g * self.spec.data_sd / total
        return c_skip, c_out, z, self.inner(_join(z / total, context), torch.log(sigma / alpha))

    def inner(self, x: torch.Tensor, log_noise: torch.Tensor) -> torch.Tensor:
        """Run the UNet F on a scaled input; float32 out."""
        level = self.level(log_noise).to(self._dtype())
        packed = self._pack(x)
        skips, h = self._encode(packed, level)
        h = self.middle(h, level)
        for i in reversed(range(len(self.up))):
            h = _run(self.up[i], torch.cat([h, skips[i]], dim=1), level)
            if i:
                h = F.interpolate(self.grow[i - 1](h), scale_factor=2.0, mode="nearest")
        out = self.tail(_silu(self.norm_out(h)))
        out = out + self._amplitude(level, log_noise) * self.bypass(torch.cat([h, packed], dim=1))
        return unpack(out, self.spec.unshuffle_px).float()

    def _amplitude(self, level: torch.Tensor, log_noise: torch.Tensor) -> torch.Tensor:
        """Scale the linear way from input to output, (B, packed, 1, 1).

        At low noise F is nearly the noise itself, ``sd / g`` times larger than in the scaled
        input, and norms over channels forget amplitudes: this way around them keeps it.
        """
        scale = (self.spec.data_sd * torch.exp(-log_noise)).clamp(max=MAX_AMPLITUDE)
        gain: torch.Tensor = self.gain(level)
        return (gain * scale.to(level.dtype)[:, None])[:, :, None, None]

    def features(
        self, y_t: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
    ) -> list[torch.Tensor]:
        """Encoder features, one (B, C, h, w) per level: what the contrast heads look at."""
        z, g = _center(y_t, alpha, sigma, self.mean)
        total = torch.sqrt(g**2 + self.spec.data_sd**2)
        scaled = y_t if self.spec.predict == "noise" else z / total
        level = self.level(torch.log(sigma / alpha)).to(self._dtype())
        return self._encode(self._pack(scaled), level)[0]

    def _pack(self, x: torch.Tensor) -> torch.Tensor:
        return pack(x.to(self._dtype()), self.spec.unshuffle_px)

    def _encode(
        self, packed: torch.Tensor, level: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        h = self.head(packed)
        skips = []
        for i, stack in enumerate(self.down):
            h = _run(stack, self.shrink[i - 1](h) if i else h, level)
            skips.append(h)
        return skips, h

    def _dtype(self) -> torch.dtype:
        return self.head.weight.dtype


def _center(
    y_t: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, mean: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    alpha, sigma = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
    return y_t / alpha - mean, sigma / alpha


def _join(scaled: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
    # Pixel-unshuffle keeps channels in order, so the context's weights come last.
    return scaled if context is None else torch.cat([scaled, context], dim=1)


def _stack(c_in: int, c_out: int, spec: NetSpec, width: int) -> nn.ModuleList:
    first = ResidualBlock(c_in, c_out, width, spec.norm)
    rest = [ResidualBlock(c_out, c_out, width, spec.norm) for _ in range(spec.blocks - 1)]
    return nn.ModuleList([first, *rest])


def _run(stack: nn.Module, h: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    for block in stack:  # type: ignore[attr-defined]
        h = block(h, level)
    return h


class Tower(nn.Module):
    """One side of the critic: stride 8, field of view 44 px, one embedding per position.

    Pixel-unshuffle by 4 comes first: all work is done at 64 x 64 positions or fewer per 256 px
    tile, since this net runs forward and backward in every step of the sampler.
    """

    def __init__(self, c_in: int, spec: CriticSpec) -> None:
        super().__init__()
        first, second, third = spec.channels
        self.level = NoiseLevel(2 * first)
        self.conv_1 = nn.Conv2d(16 * c_in, first, 3, stride=2, padding=1)
        self.conv_2 = nn.Conv2d(first, second, 3, padding=1)
        self.conv_3 = nn.Conv2d(second, third, 3, padding=1)
        self.norm_2, self.norm_3 = PositionNorm(second), PositionNorm(third)
        self.out = nn.Conv2d(third, spec.embed, 1)

    def forward(self, x: torch.Tensor, log_noise: torch.Tensor) -> torch.Tensor:
        """Map (B, c_in, H, W) to (B, embed, H/8, W/8)."""
        packed = pack(x, 4)
        scale, shift = self.level(log_noise)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(self.conv_1(packed) * (1.0 + scale) + shift)
        h = F.silu(self.norm_2(self.conv_2(h)))
        h = F.silu(self.norm_3(self.conv_3(h)))
        out: torch.Tensor = self.out(h)
        return out


class Critic(nn.Module):
    """Mutual-information critic G: scores whether a gradient map and a picture are one place.

    The score of a position is ``tau tanh(<a, b> / tau)``, with a and b the towers' embeddings:
    bounded, because a Donsker-Varadhan value may pass any truth after one large marginal score.

    Parameters
    ----------
    spec
        Tower widths, embedding, bound tau.
    """

    def __init__(self, spec: CriticSpec) -> None:
        super().__init__()
        self.spec = spec
        self.map_tower, self.picture_tower = Tower(1, spec), Tower(3, spec)

    def embed_map(self, g: torch.Tensor, log_noise: torch.Tensor) -> torch.Tensor:
        """Embed gradient maps (B, 1, H, W) as (B, embed, H/8, W/8)."""
        a: torch.Tensor = self.map_tower(g, log_noise)
        return a

    def embed_picture(self, y_t: torch.Tensor, log_noise: torch.Tensor) -> torch.Tensor:
        """Embed noised pictures (B, 3, H, W) as (B, embed, H/8, W/8)."""
        b: torch.Tensor = self.picture_tower(y_t, log_noise)
        return b

    def score(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Score paired positions (..., embed, h, w) in nats: (..., h, w) in (-tau, tau)."""
        return self.bound((a * b).sum(dim=-3))

    def bound(self, dot: torch.Tensor) -> torch.Tensor:
        """Turn inner products of embeddings into bounded scores."""
        return self.spec.tau * torch.tanh(dot / (math.sqrt(self.spec.embed) * self.spec.tau))


class ContrastHeads(nn.Module):
    """Project encoder features at chosen positions on the unit sphere (PatchNCE's MLPs).

    Park et al. 2020 (arXiv 2007.15651), section 3: Linear, ReLU, Linear, L2 norm, per level.
    """

    def __init__(self, spec: HeadsSpec, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.spec = spec
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(c, spec.embed), nn.ReLU(), nn.Linear(spec.embed, spec.embed))
            for c in channels
        )

    def forward(self, level: int, sampled: torch.Tensor) -> torch.Tensor:
        """Map features (B, P, C) of one level to unit vectors (B, P, embed)."""
        return F.normalize(self.mlps[level](sampled), dim=-1)


def count_parameters(net: nn.Module) -> int:
    """Count the trainable numbers of a net."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad)
