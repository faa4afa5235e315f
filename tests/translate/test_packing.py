"""Pixels moved into channels as words equal PyTorch's own functions, to the bit."""

import pytest
import torch
from torch.nn import functional as F

from wsi_stain.translate.packing import pack, unpack


def _draws() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("side_px", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pack_equals_pixel_unshuffle_and_unpack_undoes_it(side_px: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 7, 6 * side_px, 5 * side_px, generator=_draws()).to(dtype)
    packed = pack(x, side_px)
    assert torch.equal(packed, F.pixel_unshuffle(x, side_px))
    assert packed.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(unpack(packed, side_px), x)


def test_any_memory_order_is_taken() -> None:
    x = torch.randn(2, 3, 16, 12, generator=_draws())
    turned = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(pack(turned, 4), F.pixel_unshuffle(x, 4))
    packed = F.pixel_unshuffle(x, 4)
    assert torch.equal(unpack(packed, 4), x)


@pytest.mark.parametrize("move", [pack, unpack])
def test_gradients_flow_where_they_are_asked_for(move: object) -> None:
    assert callable(move)
    x = torch.randn(1, 16, 8, 8, generator=_draws(), requires_grad=True)
    weights = torch.arange(1.0, x.numel() + 1.0)
    (move(x, 4).flatten() * weights).sum().backward()
    assert x.grad is not None
    assert sorted(x.grad.flatten().tolist()) == weights.tolist()
