"""The cost of a plan: that counted on the net, and what the settings make of it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from wsi_stain.bundles import find_bundle, read_spec
from wsi_stain.config import ClusterConfig, NetSpec, RunConfig, SampleConfig
from wsi_stain.errors import DeviceError
from wsi_stain.geometry import Scale, Size
from wsi_stain.planning import count_net_flop, plan_slide, project_plan
from wsi_stain.slides.plan import TileGrid
from wsi_stain.translate.networks import ScoreNet


@pytest.mark.parametrize(
    "net",
    [
        NetSpec(channels=(16, 32), blocks=1),
        NetSpec(channels=(16, 16, 32), blocks=2),
        NetSpec(channels=(32,), blocks=3, unshuffle_px=8),
    ],
)
def test_flop_of_a_shape_are_those_of_its_net(net: NetSpec) -> None:
    ones = torch.ones(1)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        ScoreNet(net).denoise(torch.zeros(1, 3, 64, 64), ones, ones)
    assert count_net_flop(net, 64) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_time_follows_the_bundle_and_what_is_asked_of_it() -> None:
    spec = read_spec(find_bundle("ki67"))
    rc = np.array([(0, column) for column in range(64)], np.int32)
    grid = TileGrid(Scale(1.0, 0.5, Size(14368, 256)), 256, 32, 4, rc, np.ones(64, np.float32))

    def seconds(**asked: object) -> float:
        cluster = ClusterConfig(device="cpu", workers=1)
        config = RunConfig(sample=SampleConfig(**asked), cluster=cluster)  # type: ignore[arg-type]
        return project_plan(grid, spec, config).seconds

    once, twice = (seconds(steps=steps, guided=False) for steps in (10, 20))
    assert spec.net is not None
    assert (twice - once) / 64 / 10 == pytest.approx(count_net_flop(spec.net, 256) / 58e9)
    start_s = once - (twice - once)
    assert 1.0 < start_s < 5.0, (
        "a run of no tile takes as long as its workers' start and its report"
    )
    # Structure in closed form takes a tenth of the net; the bench of the model says so.
    assert 1.05 < seconds(steps=20) / twice < 1.2


@pytest.mark.parametrize("mpp", [0.25, 0.5, 1.0])
def test_pixels_that_are_enlarged_are_told_before_the_work(
    mpp: float, synthetic_slide: Path
) -> None:
    config = msgspec.convert({"bundle": "ki67", "slide": {"mpp": mpp}}, RunConfig)
    plan = plan_slide(synthetic_slide, config)
    with plan.source:
        assert any("coarser than the model's 0.5 um" in note for note in plan.notes) == (mpp > 0.5)
        doubt = f"Pixels of {mpp:g} um were asked for, the file says 0.5 um"
        assert any(doubt in note for note in plan.notes) == (mpp != 0.5)
        assert plan.facts().get("notes", []) == list(plan.notes)


def test_cuda_where_there_is_none_is_refused_before_the_slide_is_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = RunConfig(cluster=ClusterConfig(device="cuda"))
    with pytest.raises(DeviceError, match="torch sees no CUDA device"):
        plan_slide(Path("there_is_no_such_slide.svs"), config)
