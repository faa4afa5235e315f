"""The table of costs: operations as counted, seconds per tile's area, null rows left out."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from wsi_stain.config import BundleSpec, NetSpec, SampleConfig, SolverSpec, StudentSpec
from wsi_stain.errors import BundleError
from wsi_stain.evaluate.costs import MethodCost, costs_markdown, method_costs
from wsi_stain.evaluate.metrics import METRIC_VERSION
from wsi_stain.evaluate.paint import ModelPainter, NullPainter
from wsi_stain.evaluate.recipe import EvaluateConfig, Variant, vary_spec
from wsi_stain.evaluate.rows import Row
from wsi_stain.translate.bundle import ModelBundle, load_bundle, save_nets
from wsi_stain.translate.cost import TileCost
from wsi_stain.translate.networks import ScoreNet
from wsi_stain.translate.student import student_net

NET = NetSpec(channels=(16, 16), blocks=1)
STUDENT = Variant(name="student", sample=SampleConfig(solver="student"))
SOLVER = Variant(name="solver", sample=SampleConfig(guided=False))


def _bundle(folder: Path, student: StudentSpec | None) -> ModelBundle:
    spec = BundleSpec(
        name="b", marker="x", tile_px=64, net=NET, solver=SolverSpec(steps=10), student=student
    )
    nets = {"score": ScoreNet(NET)} | ({"student": student_net(NET)} if student else {})
    save_nets(folder, spec, {part: dict(net.named_parameters()) for part, net in nets.items()})
    return load_bundle(str(folder), torch.device("cpu"))


def _row(method: str, width_px: int, height_px: int, seconds: float) -> Row:
    return Row(
        key=method,
        method=method,
        kind="variant",
        group="g",
        image="i",
        slide="s",
        paired=False,
        aligned=False,
        metric_version=METRIC_VERSION,
        mpp=0.5,
        width_px=width_px,
        height_px=height_px,
        bundle={},
        digests=(),
        settings={},
        whites={},
        seconds=seconds,
        peak_memory_mb=0.0,
        scores={},
    )


@pytest.fixture
def config() -> EvaluateConfig:
    """Settings of an evaluation; its images are not read."""
    raw = {
        "variants": [{"name": "v"}],
        "nulls": ["source"],
        "images": [{"name": "g", "mpp": 0.5, "folder": "he"}],
    }
    return msgspec.convert(raw, EvaluateConfig)


def test_costs_are_those_of_the_solver_and_the_student(
    tmp_path: Path, config: EvaluateConfig
) -> None:
    bundle = _bundle(tmp_path / "b", StudentSpec(steps=1, start_step=150))
    models = [ModelPainter.of(variant, bundle, config) for variant in (SOLVER, STUDENT)]
    null = NullPainter("source", np.empty((0, 3), np.uint8), "", (243.0, 243.0, 243.0), 2.0)
    rows = [
        _row("solver", 64, 64, 3.0),
        _row("solver", 128, 64, 9.0),
        _row("student", 64, 64, 0.5),
        _row("source", 64, 64, 0.1),
    ]
    solver, student = method_costs([*models, null], rows)
    assert (solver.method, solver.tile.evaluations, solver.tile_s) == ("solver", 10, 4.0)
    assert (student.method, student.tile.evaluations, student.tile_s) == ("student", 1, 0.5)
    # One student evaluation is a little more than one of the score net: its first layer is wider.
    assert 0.1 < student.tile.flop / solver.tile.flop < 0.2
    assert models[1].facts()["solver"]["trained_by"] == "regress"
    assert models[1].facts()["guidance"] is None


def test_table_compares_with_the_first() -> None:
    costs = [
        MethodCost("teacher", TileCost(6_000_000_000, 5_000_000_000, 150), 12.0),
        MethodCost("student", TileCost(40_000_000, 40_000_000, 1), 0.1),
        MethodCost("identity", TileCost(0, 0, 0), 0.01),
    ]
    lines = costs_markdown(costs).splitlines()
    assert lines[4:] == [
        "| teacher | 150 | 6 | 1.0 x | 12 |",
        "| student | 1 | 0.04 | 150.0 x | 0.1 |",
        "| identity | 0 | 0 | - | 0.01 |",
    ]


def test_variant_of_a_missing_student_is_refused_before_any_image(
    tmp_path: Path, config: EvaluateConfig
) -> None:
    bundle = _bundle(tmp_path / "b", None)
    assert vary_spec(bundle.spec, STUDENT) == bundle.spec
    with pytest.raises(BundleError, match="wsi-stain distill"):
        ModelPainter.of(STUDENT, bundle, config)


def test_variant_of_the_student_changes_the_student(tmp_path: Path) -> None:
    bundle = _bundle(tmp_path / "b", StudentSpec(steps=2))
    changed = vary_spec(bundle.spec, msgspec.structs.replace(STUDENT, solver={"steps": 1}))
    assert changed.student == StudentSpec(steps=1)
    assert changed.solver == bundle.spec.solver
