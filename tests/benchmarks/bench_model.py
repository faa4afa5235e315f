"""The sampler on one core beside the speed of its own convolution, and what each term costs.

The ceiling is the 3x3 convolution that takes most of the net's operations, in the precision and
on the one thread that a worker has, measured in turn with the sampler. The terms of the guidance
are timed alone, at a level where each of them acts. Seconds are CPU seconds of that one thread,
which survive a busy machine; on CUDA they are those of the clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np
import torch
from ruler import Action, Ruler, Times, as_worker, start
from specimen import dense_tissue
from torch import nn

from wsi_stain.config import GuidanceSpec, SampleConfig, SolverSpec, resolve_sampling
from wsi_stain.translate.bundle import ModelBundle, load_bundle, pick_device
from wsi_stain.translate.cost import count_tile_flop
from wsi_stain.translate.guidance import Guidance, StepState
from wsi_stain.translate.maps import gradient_map
from wsi_stain.translate.noise import NoiseField, Schedule
from wsi_stain.translate.pixels import to_model
from wsi_stain.translate.sampler import Noise
from wsi_stain.translate.structure import edge_map

BUNDLE = "ki67"
BATCH = 4
LOW_STEP = 20  # below the level where the patch contrast begins
TEACHER_STEPS = 15  # of its 300, evenly: the same share of them lies where each term acts
CONV_REPEATS = 40
Way = Literal["solver", "teacher", "student"]
WAYS: tuple[Way, ...] = ("solver", "teacher", "student")


@dataclass(frozen=True)
class Batch:
    """Start images of one batch and its noise, drawn beforehand."""

    x_0: torch.Tensor
    noise: Noise


def main() -> None:
    as_worker()
    ruler = start("model", __doc__)
    torch.set_num_threads(1)
    bundle = load_bundle(BUNDLE, pick_device("auto"))
    batch = make_batch(bundle, 1 if ruler.quick else BATCH)
    with torch.no_grad():
        conv = conv_ceiling(bundle, batch)
        for way in WAYS if bundle.student is not None else WAYS[:2]:
            if way == "solver" or not ruler.quick:
                bench_sampler(ruler, bundle, batch, conv, way)
        bench_terms(ruler, bundle, batch)


def make_batch(bundle: ModelBundle, n_tiles: int) -> Batch:
    side_px = bundle.spec.tile_px
    picture = dense_tissue(n_tiles * side_px, side_px)
    x_0 = to_model(np.stack(np.split(picture, n_tiles, axis=1)), bundle.device)
    places = torch.tensor([[k * side_px, 0] for k in range(n_tiles)], device=bundle.device)
    field = NoiseField(0).at(places, 0, side_px)
    return Batch(x_0, lambda _: field)


# ---- the ceiling ----------------------------------------------------------------------------


def dominant_conv(bundle: ModelBundle, batch: Batch) -> tuple[nn.Conv2d, torch.Size]:
    """Find the 3x3 convolution and input shape that take most of the score net's operations."""
    cost: dict[tuple[int, int, torch.Size], float] = {}
    found: dict[tuple[int, int, torch.Size], nn.Conv2d] = {}

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], _: object) -> None:
        assert isinstance(module, nn.Conv2d)
        key = (module.in_channels, module.out_channels, inputs[0].shape)
        cost[key] = cost.get(key, 0.0) + conv_flop(module, inputs[0].shape)
        found[key] = module

    assert bundle.score is not None
    convs = [
        module
        for module in bundle.score.modules()
        if isinstance(module, nn.Conv2d)
        and module.kernel_size == (3, 3)
        and module.stride == (1, 1)
    ]
    hooks = [module.register_forward_hook(count) for module in convs]
    ones = torch.ones(len(batch.x_0), device=bundle.device)
    with torch.no_grad():
        bundle.score.denoise(batch.x_0, 0.9 * ones, 0.4 * ones)
    for hook in hooks:
        hook.remove()
    key = max(cost, key=lambda each: cost[each])
    return found[key], key[2]


def conv_flop(conv: nn.Conv2d, shape: torch.Size) -> float:
    return 2.0 * 9 * conv.in_channels * conv.out_channels * shape[0] * shape[2] * shape[3]


@dataclass(frozen=True)
class Ceiling:
    """Runs the dominant convolution.

    Attributes
    ----------
    name
        Channels, positions, precision.
    flop
        Operations of one call.
    """

    name: str
    flop: float
    run: Action


def conv_ceiling(bundle: ModelBundle, batch: Batch) -> Ceiling:
    conv, shape = dominant_conv(bundle, batch)
    x = torch.randn(shape, device=bundle.device).to(bundle.dtype)
    x = x.contiguous(memory_format=torch.channels_last)

    def run() -> None:
        for _ in range(CONV_REPEATS):
            conv(x)
        wait(bundle)

    dtype = str(bundle.dtype).removeprefix("torch.")
    name = f"3x3 convolution {conv.in_channels} to {conv.out_channels} at {shape[2]} x {shape[3]}"
    return Ceiling(f"{name}, {dtype}", CONV_REPEATS * conv_flop(conv, shape), run)


def seconds(bundle: ModelBundle, times: Times) -> float:
    """Give what counts on this device."""
    return times.wall_s if bundle.device.type == "cuda" else times.cpu_s


def wait(bundle: ModelBundle) -> None:
    """Wait until the device is done: CUDA works on its own."""
    if bundle.device.type == "cuda":
        torch.cuda.synchronize(bundle.device)


# ---- the sampler ----------------------------------------------------------------------------


def bench_sampler(ruler: Ruler, bundle: ModelBundle, batch: Batch, conv: Ceiling, way: Way) -> None:
    """Useful operations of the net per second of the whole sampler, beside the ceiling."""
    steps = 1 if ruler.quick else TEACHER_STEPS if way == "teacher" else None
    solver, guidance = resolve_sampling(bundle.spec, SampleConfig(solver=way, steps=steps))
    cases = {way: guidance} if guidance is None else {way: guidance, f"{way}, unguided": None}
    actions = {name: sampler_action(bundle, batch, solver, given) for name, given in cases.items()}
    times = ruler.times(actions | {"conv": conv.run}, rounds=3)
    ceiling = conv.flop / seconds(bundle, times["conv"]) / 1e9
    for name, given in cases.items():
        cost = count_tile_flop(bundle, solver, given)
        tile_s = seconds(bundle, times[name]) / len(batch.x_0)
        what = f"{name}, {cost.evaluations} evaluations"
        ruler.report(f"{what}, one tile", "s", tile_s)
        useful = cost.net_flop / tile_s / 1e9
        ruler.report(f"{what}, the net's own work", "GFLOP/s", useful, conv.name, ceiling)


def sampler_action(
    bundle: ModelBundle, batch: Batch, solver: SolverSpec, guidance: GuidanceSpec | None
) -> Action:
    sampler = bundle.sampler(solver, guidance)
    assert sampler is not None

    def run() -> None:
        sampler(batch.x_0, batch.noise, 0.3)
        wait(bundle)

    return run


# ---- what each term of the guidance costs ---------------------------------------------------


def terms_of(bundle: ModelBundle) -> dict[str, Guidance]:
    """Build every term that the bundle has nets for, whether its own settings use it or not."""
    spec = msgspec.structs.replace(
        bundle.spec.guidance,
        structure_scale=1.0 if bundle.critic is not None else 0.0,
        structure_sign="constant",
        edges="gaussian",
        entropy="surprisal",
        entropy_scale=0.1,
        contrast="score" if bundle.heads is not None else "none",
        contrast_scale=1.0,
        contrast_below_step=LOW_STEP,
    )
    sampler = bundle.sampler(bundle.spec.solver, spec)
    assert sampler is not None
    terms: list[Guidance] = sampler.guidance.terms  # type: ignore[union-attr]
    return {type(term).__name__: term for term in terms}


def bench_terms(ruler: Ruler, bundle: ModelBundle, batch: Batch) -> None:
    """Each term at a level where it acts, beside one evaluation of the score net."""
    assert bundle.score is not None
    score, schedule = bundle.score, Schedule.of(bundle.spec)
    alpha, sigma = float(schedule.alpha[LOW_STEP]), float(schedule.sigma[LOW_STEP])
    ones = torch.ones(1, device=bundle.device)
    y_t = alpha * batch.x_0 + sigma * batch.noise(0)
    y0_hat = score.denoise(y_t, alpha * ones, sigma * ones)
    state = StepState(
        t=LOW_STEP,
        y_t=y_t,
        y0_hat=y0_hat,
        start=batch.x_0,
        edges=edge_map(batch.x_0),
        draw_eps=lambda: (y_t - alpha * y0_hat) / sigma,
        draw_x_t=lambda: y_t,
        draw_g_t=lambda: gradient_map(y_t, "sobel", 0.3),
    )
    terms = terms_of(bundle)

    def net() -> None:
        score.denoise(y_t, alpha * ones, sigma * ones)
        wait(bundle)

    def action(term: Guidance) -> Action:
        def run() -> None:
            term(state)
            wait(bundle)

        return run

    places = torch.zeros(len(batch.x_0), 2, dtype=torch.int64, device=bundle.device)
    actions = {f"guidance, {name}": action(term) for name, term in terms.items()}
    actions["noise field of one step"] = lambda: NoiseField(0).at(places, 1, bundle.spec.tile_px)
    times = ruler.times({"net": net} | actions)
    net_ms, *term_ms = (1e3 * seconds(bundle, t) / len(batch.x_0) for t in times.values())
    for name, value in zip(actions, term_ms, strict=True):
        ruler.report(name, "ms", value, "one evaluation of the net", net_ms)


if __name__ == "__main__":
    main()
