"""Pixels to tensors and back."""

from __future__ import annotations

import numpy as np
import torch

from wsi_stain.translate.pixels import to_model, to_rgb


def test_every_level_returns_when_mapped_there_and_back() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    rgb = np.concatenate([levels, 255 - levels, levels // 2], axis=-1)
    tensor = to_model(rgb)
    assert tensor.shape == (1, 3, 16, 16)
    assert tensor.dtype == torch.float32
    assert float(tensor.min()) == -1.0
    assert float(tensor.max()) == 1.0
    assert np.array_equal(to_rgb(tensor), rgb)


def test_channels_keep_their_place_when_mapped() -> None:
    rgb = np.zeros((1, 2, 3, 3), np.uint8)
    rgb[0, 1, 2] = (255, 0, 51)
    tensor = to_model(rgb)
    np.testing.assert_allclose(tensor[0, :, 1, 2].numpy(), [1.0, -1.0, -0.6], atol=1e-6)
    assert np.array_equal(to_model(rgb[:, ::-1, ::-1])[0, :, 0, 0].numpy(), tensor[0, :, 1, 2])


def test_channels_are_scaled_before_they_are_rounded() -> None:
    y = to_model(np.full((1, 1, 1, 3), 100, np.uint8)) + 0.4 / 127.5
    assert to_rgb(y, (1.0, 2.0, 3.0)).tolist() == [[[[100, 201, 255]]]]


def test_values_are_clipped_and_rounded_when_out_of_range() -> None:
    y = torch.tensor([-7.0, -1.0, -0.9999, 0.0, 0.9999, 3.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert to_rgb(y)[0, 0, :, 0].tolist() == [0, 0, 0, 128, 255, 255]
