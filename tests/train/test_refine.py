"""Stage 3: the grey copy, and heads that learn to find their place."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import structs

from wsi_stain.config import DataConfig, HeadsSpec, NetSpec, TrainConfig
from wsi_stain.train.data import ImageSet
from wsi_stain.train.feed import Feed
from wsi_stain.train.images import TrainImage
from wsi_stain.train.refine import RefineStage, grey_copy
from wsi_stain.translate.networks import ScoreNet

CONFIG = TrainConfig(
    stage="refine",
    bundle="none",
    data=DataConfig(root=".", crop_px=96),
    batch=2,
    heads=HeadsSpec(embed=16),
)


@pytest.fixture
def stage(tissue: ImageSet) -> RefineStage:
    """Heads on a small random encoder."""
    torch.manual_seed(0)
    encoder = ScoreNet(NetSpec(channels=(16, 16, 16), blocks=1))
    return RefineStage(CONFIG, encoder, tissue, tissue, torch.device("cpu"))


def test_grey_copy_has_the_mean_density_when_gamma_is_1() -> None:
    levels = torch.tensor([200.0, 120.0, 60.0])
    y_0 = (levels / 127.5 - 1.0).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    grey = grey_copy(y_0, torch.ones(1))
    expected = 2.0 * float((levels / 255.0).prod()) ** (1 / 3) - 1.0
    torch.testing.assert_close(grey, torch.full((1, 3, 4, 4), expected))
    squared = grey_copy(y_0, torch.tensor([2.0]))
    torch.testing.assert_close((squared + 1.0) / 2.0, ((grey + 1.0) / 2.0) ** 2)


def test_grey_copy_stays_in_range_when_black_or_white() -> None:
    y_0 = torch.stack([torch.full((3, 4, 4), -1.0), torch.full((3, 4, 4), 1.0)])
    grey = grey_copy(y_0, torch.tensor([1.0, 3.0]))
    assert float(grey[0].max()) == pytest.approx(2.0 / 255.0 - 1.0, abs=1e-5)
    assert float(grey[1].min()) == pytest.approx(1.0)


def test_encoder_is_frozen_when_heads_train(stage: RefineStage) -> None:
    before = {name: p.clone() for name, p in stage.encoder.named_parameters()}
    optimizer = torch.optim.Adam(stage.net.parameters(), lr=1e-2)
    loss = stage.loss(
        *Feed(stage.draw, np.random.SeedSequence, 0).take(0), torch.Generator().manual_seed(0)
    )
    assert loss.shape == (2, 36)
    loss.mean().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    for name, p in stage.encoder.named_parameters():
        assert p.grad is None
        assert torch.equal(p, before[name])
    assert all(p.grad is not None for p in stage.net.parameters())


def test_loss_is_equal_when_generators_are(stage: RefineStage) -> None:
    def draw(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return stage.loss(
            *Feed(stage.draw, np.random.SeedSequence, 0).take(seed), generator
        ).detach()

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def _train(stage: RefineStage, steps: int) -> dict[str, float]:
    optimizer = torch.optim.Adam(stage.net.parameters(), lr=3e-3)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        stage.loss(stage.draw(rng), rng, generator).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return stage.evaluate()


def test_heads_find_nothing_when_pictures_are_blank() -> None:
    # Under one noise for query and key they would match the noise: 0.04 nats of 3.6.
    flat = TrainImage(Path("flat.png"), "ihc/flat", "CC0", np.full((112, 112, 3), 180, np.uint8))
    images = ImageSet([flat], structs.replace(CONFIG.data, stain_jitter=0.0))
    torch.manual_seed(0)
    encoder = ScoreNet(NetSpec(channels=(16, 16, 16), blocks=1))
    stage = RefineStage(CONFIG, encoder, images, images, torch.device("cpu"))
    values = _train(stage, steps=40)
    for t in (10, 25, 40):
        assert values[f"nats_{t}"] == pytest.approx(math.log(36.0), abs=0.1)
        assert values[f"sure_{t}"] < 0.01


def test_heads_find_their_place_when_trained(stage: RefineStage) -> None:
    before = stage.evaluate()
    after = _train(stage, steps=40)
    assert set(after) == {f"{name}_{t}" for name in ("nats", "sure") for t in (10, 25, 40)}
    for t in (10, 25, 40):
        assert after[f"nats_{t}"] < min(before[f"nats_{t}"], math.log(36.0)) - 0.3
        assert after[f"sure_{t}"] > before[f"sure_{t}"]


def test_sure_counts_places_below_ln_2_when_measured(
    stage: RefineStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = torch.tensor([[0.1, 0.69, 0.70, 5.0]])
    monkeypatch.setattr("wsi_stain.train.refine.contrast_loss", lambda *_: losses)
    values = stage.evaluate()
    assert values["sure_10"] == 0.5
    assert values["nats_10"] == pytest.approx(float(losses.mean()))
