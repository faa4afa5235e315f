"""The student: it starts as the score net, sees the context, and is run and refused like a net."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from msgspec import structs

from wsi_stain.bundles import read_spec
from wsi_stain.config import (
    BundleSpec,
    GuidanceSpec,
    SampleConfig,
    SolverName,
    SolverSpec,
    StudentSpec,
    decode_bundle_spec,
    resolve_sampling,
    settle_solver,
)
from wsi_stain.errors import BundleError, ConfigError
from wsi_stain.stain.normalize import StainTransform
from wsi_stain.stain.start import StartTransform
from wsi_stain.translate.bundle import load_bundle, save_nets
from wsi_stain.translate.networks import ScoreNet
from wsi_stain.translate.noise import START_NOISE_STEP, Schedule
from wsi_stain.translate.sampler import Sampler, step_grid
from wsi_stain.translate.structure import edge_map, local_information
from wsi_stain.translate.student import (
    StudentSampler,
    context_of,
    student_estimates,
    student_net,
    widen,
)
from wsi_stain.translate.task import TranslateTask
from wsi_stain.translate.worker import translate_tiles

CPU = torch.device("cpu")
EYE = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
WHITE = (243.0, 243.0, 244.0)
STUDENT = SampleConfig(solver="student", batch_tiles=3)
Tiles = npt.NDArray[np.uint8]


def _randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _student(score: ScoreNet, *, sees_context: bool = True) -> ScoreNet:
    net = student_net(score.spec)
    widen(net, score.state_dict())
    if sees_context:
        with torch.no_grad():
            net.head.weight[:, 48:].copy_(0.2 * _randn(*net.head.weight[:, 48:].shape))
    return net.eval().requires_grad_(False)


def _with_student(folder: Path, score: ScoreNet, steps: int = 1) -> Path:
    """Write a bundle of a score net and a student."""
    spec = BundleSpec(
        name="taught",
        marker="Ki-67",
        tile_px=96,
        net=score.spec,
        student=StudentSpec(steps=steps, start_step=200),
    )
    nets = {"score": score, "student": _student(score)}
    save_nets(folder, spec, {part: dict(net.named_parameters()) for part, net in nets.items()})
    return folder


def _task(bundle: Path, seed: int = 5) -> TranslateTask:
    stain = StainTransform(
        method="macenko",
        white=WHITE,
        target_white=WHITE,
        od_map=EYE,
        stain_od=(EYE[0], EYE[1]),
        stain_c99=(1.0, 1.0),
        n_stained=0,
    )
    start = StartTransform(kind="stain", stain=stain, target_white=WHITE, rows=EYE)
    return TranslateTask(Path("store"), str(bundle), STUDENT, start, WHITE, 0.4, seed, "cpu", "key")


def test_estimate_is_the_score_nets_when_widened(tiny_score: ScoreNet) -> None:
    y_t, alpha, sigma = _randn(2, 3, 64, 64), torch.tensor([0.9, 0.8]), torch.tensor([0.43, 0.6])
    student = _student(tiny_score, sees_context=False)
    expected = tiny_score.denoise(y_t, alpha, sigma)
    for seed in (1, 2):
        found = student.denoise(y_t, alpha, sigma, 5.0 * _randn(2, 4, 64, 64, seed=seed))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_fresh_net_ignores_its_context_when_made(tiny_score: ScoreNet) -> None:
    student = student_net(tiny_score.spec)
    assert not student.head.weight[:, 48:].any()
    assert not student.bypass.weight[:, 16 + 48 :].any()
    assert bool(student.head.weight[:, :48].any())


def test_every_channel_of_the_context_counts_when_its_weights_do(tiny_score: ScoreNet) -> None:
    student, y_t = _student(tiny_score), _randn(1, 3, 64, 64)
    ones, context = torch.ones(1), _randn(1, 4, 64, 64, seed=1)
    base = student.denoise(y_t, 0.9 * ones, 0.43 * ones, context)
    for channel in range(4):
        changed = context.clone()
        changed[:, channel] += 1.0
        moved = student.denoise(y_t, 0.9 * ones, 0.43 * ones, changed)
        assert float((moved - base).abs().max()) > 1e-3


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_sampler_gives_the_trained_estimate_when_run(
    tiny_score: ScoreNet, schedule: Schedule, steps: int
) -> None:
    spec = StudentSpec(steps=steps, start_step=150)
    net = _student(tiny_score)
    x_0, source = _randn(2, 3, 64, 64).tanh(), _randn(2, 3, 64, 64, seed=1).tanh()
    e = _randn(2, 3, 64, 64, seed=2)
    sampler = StudentSampler(schedule, net, spec, GuidanceSpec())
    made = sampler(x_0, lambda step: e if step == START_NOISE_STEP else torch.nan * e, 1.0, source)
    y_t = sampler.start(x_0, lambda _: e)
    context = context_of(x_0, edge_map(source))
    estimates = student_estimates(net, schedule, step_grid(spec), y_t, context)
    assert len(estimates) == steps
    torch.testing.assert_close(made, estimates[-1].clamp(-1, 1), rtol=0, atol=1e-6)
    # One level of the plain sampler with the same net is the same function.
    if steps == 1:
        bound = Sampler(
            schedule, lambda y, a, s: net.denoise(y, a, s, context), None, spec, GuidanceSpec()
        )
        torch.testing.assert_close(bound(x_0, lambda _: e, 1.0), made, rtol=0, atol=1e-6)


def test_no_gradient_flows_between_levels_when_estimated(
    tiny_score: ScoreNet, schedule: Schedule
) -> None:
    net = _student(tiny_score).requires_grad_(True)
    grid = step_grid(StudentSpec(steps=2, start_step=150))
    y_t, context = _randn(1, 3, 64, 64), _randn(1, 4, 64, 64)
    first, second = student_estimates(net, schedule, grid, y_t, context)
    alone = student_estimates(net, schedule, [grid[0], 0], y_t, context)[0]
    torch.testing.assert_close(first, alone)
    (both,) = torch.autograd.grad(first.sum() + 0.0 * second.sum(), net.head.weight)
    (own,) = torch.autograd.grad(alone.sum(), net.head.weight)
    torch.testing.assert_close(both, own, rtol=1e-4, atol=1e-4)


def test_bundle_gives_the_student_when_it_has_one(tmp_path: Path, tiny_score: ScoreNet) -> None:
    folder = _with_student(tmp_path / "b", tiny_score)
    bundle = load_bundle(str(folder), CPU)
    solver, guidance = resolve_sampling(bundle.spec, STUDENT)
    assert (solver, guidance) == (bundle.spec.student, None)
    assert isinstance(bundle.sampler(solver, guidance), StudentSampler)
    assert not isinstance(bundle.sampler(bundle.spec.solver, None), StudentSampler)
    assert read_spec(folder).files.keys() == {"score.safetensors", "student.safetensors"}


def test_student_is_refused_when_damaged(tmp_path: Path, tiny_score: ScoreNet) -> None:
    folder = _with_student(tmp_path / "b", tiny_score)
    path = folder / "student.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(BundleError, match=r"student\.safetensors is damaged"):
        load_bundle(str(folder), CPU)
    path.unlink()
    with pytest.raises(BundleError, match=r"lacks student\.safetensors"):
        load_bundle(str(folder), CPU)


def test_bundle_without_student_names_the_verb_when_asked(tiny_bundle: Path) -> None:
    bundle = load_bundle(str(tiny_bundle), CPU)
    with pytest.raises(BundleError, match="wsi-stain distill"):
        resolve_sampling(bundle.spec, STUDENT)
    with pytest.raises(BundleError, match="wsi-stain distill"):
        bundle.sampler(StudentSpec(), None)


@pytest.mark.parametrize(
    ("default", "asked", "runs"),
    [
        ("student", {}, "student"),
        ("student", {"seeds": 3, "batch_tiles": 2}, "student"),
        ("student", {"solver": "teacher"}, "teacher"),
        ("student", {"steps": 3}, "solver"),
        ("student", {"start_step": 100}, "solver"),
        ("student", {"guided": False}, "solver"),
        ("student", {"guidance": GuidanceSpec()}, "solver"),
        ("teacher", {"steps": 3}, "teacher"),
        ("solver", {}, "solver"),
        ("solver", {"solver": "student"}, "student"),
    ],
)
def test_bundle_names_the_solver_where_nobody_asks_for_one(
    default: SolverName, asked: dict[str, object], runs: SolverName
) -> None:
    spec = BundleSpec(
        name="taught", marker="x", student=StudentSpec(start_step=77), default_solver=default
    )
    sample = structs.replace(SampleConfig(), **asked)
    settled = settle_solver(spec, sample)
    assert settled == structs.replace(sample, solver=runs)
    assert resolve_sampling(spec, sample) == resolve_sampling(spec, settled)
    assert (resolve_sampling(spec, sample)[0] == spec.student) == (runs == "student")


def test_default_student_that_is_not_there_is_refused_when_read() -> None:
    spec = BundleSpec(name="untaught", marker="x", default_solver="student")
    with pytest.raises(BundleError, match="default_solver is the student, and there is none"):
        decode_bundle_spec(msgspec.json.encode(spec), "bundle.json")


@pytest.mark.parametrize(
    "asked", [{"steps": 3}, {"start_step": 100}, {"guided": False}, {"guidance": GuidanceSpec()}]
)
def test_student_runs_no_other_way_when_asked_to(asked: dict[str, object]) -> None:
    spec = BundleSpec(name="taught", marker="x", student=StudentSpec())
    with pytest.raises(ConfigError, match="runs no other way"):
        resolve_sampling(spec, structs.replace(STUDENT, **asked))
    assert isinstance(resolve_sampling(spec, SampleConfig())[0], SolverSpec)


def test_tile_depends_on_itself_and_the_seed_alone_when_translated(
    tmp_path: Path, tiny_score: ScoreNet
) -> None:
    folder = _with_student(tmp_path / "b", tiny_score)
    bundle = load_bundle(str(folder), CPU)
    he = np.random.default_rng(0).integers(60, 190, (5, 96, 96, 3)).astype(np.uint8)
    places = np.array([[64 * i, 0] for i in range(5)], np.int64)
    together = translate_tiles(bundle, _task(folder), he, places).ihc
    for i in range(5):
        alone = translate_tiles(bundle, _task(folder), he[i : i + 1], places[i : i + 1]).ihc
        assert np.array_equal(alone[0], together[i])
    other = [
        translate_tiles(bundle, _task(folder, seed), he[:1], places[:1]).ihc for seed in range(3)
    ]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert float(np.mean(other[a] != other[b])) > 0.2


def test_glass_stays_white_when_the_student_paints(tmp_path: Path, tiny_score: ScoreNet) -> None:
    folder = _with_student(tmp_path / "b", tiny_score)
    bundle = load_bundle(str(folder), CPU)
    glass = np.full((1, 96, 96, 3), WHITE, np.uint8)
    made = translate_tiles(bundle, _task(folder), glass, np.zeros((1, 2), np.int64)).ihc
    assert (made == np.round(bundle.spec.color.white).astype(np.uint8)).all()


def test_student_of_unknown_level_is_refused_when_read(
    tmp_path: Path, tiny_score: ScoreNet
) -> None:
    folder = _with_student(tmp_path / "b", tiny_score)
    spec = structs.replace(read_spec(folder), timesteps=310)
    assert spec.student is not None
    late = structs.replace(spec, student=structs.replace(spec.student, start_step=311))
    save_nets(folder, late, {})
    with pytest.raises(BundleError, match="start_step 311 lies above the 310"):
        read_spec(folder)


def test_bundle_can_lose_its_student_when_replaced(tmp_path: Path, tiny_score: ScoreNet) -> None:
    bundle = load_bundle(str(_with_student(tmp_path / "b", tiny_score)), CPU)
    with pytest.raises(BundleError, match="carries no student"):
        replace(bundle, student=None).sampler(StudentSpec(), None)


def test_pull_on_edges_sharpens_where_the_slide_has_edges(
    tiny_score: ScoreNet, schedule: Schedule
) -> None:
    """The closed form lifts what output and H&E know of each other's edges; 0 leaves it out."""
    net, guidance = _student(tiny_score), GuidanceSpec(edges="gaussian", edges_scale=10.0)
    x_0, source = _randn(2, 3, 64, 64).tanh(), _randn(2, 3, 64, 64, seed=1).tanh()
    e = _randn(2, 3, 64, 64, seed=2)
    made, nats = [], []
    for push in (0.0, 0.02, 0.1):
        spec = StudentSpec(start_step=150, edges_push=push)
        y = StudentSampler(schedule, net, spec, guidance)(x_0, lambda _: e, 1.0, source)
        made.append(y)
        nats.append(float(local_information(edge_map(source), edge_map(y), 2.5).mean()))
    assert nats[0] < nats[1] < nats[2]
    moved = float((made[1] - made[0]).abs().max())
    assert 0.0 < moved <= 0.02 * float(schedule.sigma[150] / schedule.alpha[150]) + 1e-5
    alone = StudentSampler(schedule, net, StudentSpec(start_step=150, edges_push=0.1), guidance)
    single = alone(x_0[:1], lambda _: e[:1], 1.0, source[:1])
    torch.testing.assert_close(single, made[2][:1], rtol=0, atol=1e-5)
