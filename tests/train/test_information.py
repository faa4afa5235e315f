"""Information against the noise level: intervals, unrelated maps, the table, the picture."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict

import numpy as np
import pytest
import torch

from wsi_stain.config import CriticSpec, DataConfig, TrainConfig
from wsi_stain.train.data import ImageSet
from wsi_stain.train.information import LEVELS, Level, draw_levels, measure_levels, to_csv
from wsi_stain.train.mine import MineStage


class Planted(MineStage):
    """A critic that knows: a planted score for the right map, 0 for any other."""

    planted = 2.0

    def scores(
        self,
        y_0: torch.Tensor,
        steps: torch.Tensor,
        generator: torch.Generator,
        mapped: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give joint scores (n,) and marginal scores (3, n) of 16 positions a picture."""
        n = 16 * len(y_0)
        return torch.full((n,), self.planted if mapped is None else 0.0), torch.zeros(3, n)


@pytest.fixture(scope="module")
def stage(tissue_144: ImageSet) -> Planted:
    """Planted critic on drawn tissue, trained up to step 120."""
    config = TrainConfig(
        stage="mine",
        bundle="none",
        data=DataConfig(root="."),
        focus_step=120,
        critic=CriticSpec(channels=(8, 8, 8), embed=4, negatives=4),
    )
    return Planted(config, tissue_144, tissue_144, torch.device("cpu"))


def test_levels_read_what_is_planted_and_nothing_elsewhere(stage: Planted) -> None:
    levels = measure_levels(stage)
    assert [level.step for level in levels] == [step for step in LEVELS if step <= 120]
    for level in levels:
        assert level.nats == pytest.approx(2.0)
        assert level.low == pytest.approx(2.0)
        assert level.high == pytest.approx(2.0)
        assert level.unrelated_nats == pytest.approx(0.0)
        # InfoNCE of a sure critic among 3 negatives: 2 - ln((e^2 + 3) / 4)
        assert level.nce_nats == pytest.approx(2.0 - np.log((np.exp(2.0) + 3.0) / 4.0))


def test_table_and_picture_hold_each_level() -> None:
    levels = [Level(t, 5.0 - t / 100, 4.0, 6.0, 3.0, 0.01) for t in (1, 10, 300)]
    rows = list(csv.DictReader(io.StringIO(to_csv(levels))))
    assert [{k: float(v) for k, v in row.items()} for row in rows] == [
        pytest.approx(asdict(level)) for level in levels
    ]
    colors = {color for _, color in draw_levels(levels, "x").getcolors(2**20) or []}
    assert {(0, 0, 0), (230, 159, 0), (86, 180, 233)} <= colors
