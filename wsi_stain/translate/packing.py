"""Room 3 of 4: pixels into channels and back, at the speed of memory.

In: pictures. Out: what `pixel_unshuffle` and `pixel_shuffle` give, in channels_last memory. Not
here: nets.

Those functions move one number at a time, and a second pass brings the result into the memory
order that convolutions want: a fifteenth of a student's time. The pixels of a row that go into one
position lie side by side before and after, so they can be moved as one word.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

__all__ = ["pack", "unpack"]

# By bytes. Nothing is computed with them.
_WORDS = {4: torch.int32, 8: torch.int64, 16: torch.complex128}


def pack(x: torch.Tensor, side_px: int) -> torch.Tensor:
    """Put squares of pixels into channels.

    Parameters
    ----------
    x
        Float (B, C, H, W), sides multiples of `side_px`.

    Returns
    -------
    torch.Tensor
        (B, C side_px^2, H / side_px, W / side_px), channels_last.
    """
    word = _word_of(x, side_px)
    if word is None:
        packed = F.pixel_unshuffle(x, side_px)
        return packed.contiguous(memory_format=torch.channels_last)
    b, c, height, width = x.shape
    words = x.contiguous().view(word).view(b, c, height // side_px, side_px, width // side_px)
    moved = words.permute(0, 2, 4, 1, 3).contiguous().view(x.dtype)
    return moved.view(b, height // side_px, width // side_px, -1).permute(0, 3, 1, 2)


def unpack(x: torch.Tensor, side_px: int) -> torch.Tensor:
    """Undo `pack`: (B, C side_px^2, h, w) to (B, C, h side_px, w side_px), contiguous."""
    word = _word_of(x, side_px)
    if word is None:
        return F.pixel_shuffle(x, side_px).contiguous()
    b, packed, h, w = x.shape
    words = x.permute(0, 2, 3, 1).contiguous().view(word).view(b, h, w, -1, side_px)
    moved = words.permute(0, 3, 1, 4, 2).contiguous().view(x.dtype)
    return moved.view(b, packed // side_px**2, h * side_px, w * side_px)


def _word_of(x: torch.Tensor, side_px: int) -> torch.dtype | None:
    """Give the type as large as a row of a square; none where there is none, or gradients flow."""
    if torch.is_grad_enabled() and x.requires_grad:
        return None
    return _WORDS.get(side_px * x.element_size())
