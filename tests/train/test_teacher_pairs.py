"""Teacher pairs: what the teacher makes, kept on disk, cut with the noise that made them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import structs

from wsi_stain.bundles import read_spec
from wsi_stain.config import BundleSpec, GuidanceSpec, StudentSpec, TrainConfig
from wsi_stain.errors import BundleError, ConfigError, NoTissueError
from wsi_stain.manifest import Event, Listener, ignore
from wsi_stain.stain.white import WhitePoint
from wsi_stain.train.he_fields import HeField, load_fields
from wsi_stain.train.images import TrainImage
from wsi_stain.train.teacher_pairs import Pairs, make_pairs, teacher_of
from wsi_stain.translate.bundle import load_bundle, save_nets
from wsi_stain.translate.noise import NoiseField
from wsi_stain.translate.pixels import to_model, to_rgb
from wsi_stain.translate.student import student_net

CPU = torch.device("cpu")


def _make(
    config: TrainConfig, folder: Path, split: str = "train", listener: Listener = ignore
) -> Pairs:
    bundle = load_bundle(config.bundle, CPU, torch.float32)
    return make_pairs(bundle, config, load_fields(config, split), split, folder, listener)


def _files(folder: Path) -> list[Path]:
    return sorted((folder / "pairs").rglob("*.safetensors"))


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, distill_config: TrainConfig
) -> tuple[Path, Pairs]:
    """Run folder with the training pairs."""
    folder = tmp_path_factory.mktemp("run")
    return folder, _make(distill_config, folder)


def test_target_is_the_teachers_picture_when_made(
    run: tuple[Path, Pairs], distill_config: TrainConfig
) -> None:
    pairs = run[1]
    assert len(pairs) == 8
    assert pairs.he.shape == pairs.start.shape == pairs.target.shape == (8, 96, 96, 3)
    teacher = teacher_of(load_bundle(distill_config.bundle, CPU, torch.float32), distill_config)
    for i in (0, 5):
        noise = functools.partial(NoiseField(0).at, torch.tensor([[96 * i, 0]]), size_px=96)
        x_0, source = to_model(pairs.start[i : i + 1]), to_model(pairs.he[i : i + 1])
        scale = float(pairs.map_scale[i])
        made = teacher(x_0, noise, scale, source)
        assert np.array_equal(to_rgb(made)[0], pairs.target[i])
    assert float(np.abs(pairs.target.astype(int) - pairs.start).mean()) > 1.0


def test_file_is_made_again_and_equal_when_lost(
    tmp_path: Path, run: tuple[Path, Pairs], distill_config: TrainConfig
) -> None:
    more = structs.replace(distill_config.distill, pairs=11)
    config = structs.replace(distill_config, distill=more)
    first = _make(config, tmp_path)
    assert len(first) == 11
    paths = _files(tmp_path)
    assert len(paths) == 2
    kept = paths[1].stat().st_mtime_ns
    data = paths[0].read_bytes()
    paths[0].unlink()
    again = _make(config, tmp_path)
    assert paths[0].read_bytes() == data
    assert paths[1].stat().st_mtime_ns == kept
    assert np.array_equal(first.target, again.target)
    # More pairs are the same pairs and some more.
    assert np.array_equal(first.target[:8], run[1].target)


def test_pairs_are_others_when_what_they_depend_on_changes(
    tmp_path: Path,
    run: tuple[Path, Pairs],
    distill_config: TrainConfig,
    save_teacher: Callable[[Path], Path],
) -> None:
    folder, _ = run
    known = set(_files(folder))
    bundle = save_teacher(tmp_path / "other")
    spec = read_spec(bundle)
    same = structs.replace(distill_config, bundle=str(bundle))
    save_nets(
        bundle,
        structs.replace(spec, student=StudentSpec(), data_statement="x"),
        {"student": dict(student_net(spec.net).named_parameters())} if spec.net else {},
    )
    _make(same, folder)
    assert set(_files(folder)) == known  # a student beside the teacher changes no pair
    save_nets(
        bundle,
        structs.replace(spec, guidance=GuidanceSpec(structure_scale=0.0, contrast="none")),
        {},
    )
    _make(same, folder)
    assert len(_files(folder)) == len(known) + 1
    _make(structs.replace(distill_config, seed=1), folder)
    assert len(_files(folder)) == len(known) + 2


def test_held_out_pairs_share_no_noise_with_the_others(
    run: tuple[Path, Pairs], distill_config: TrainConfig, tmp_path: Path
) -> None:
    held_out = _make(distill_config, tmp_path, "val")
    assert len(held_out) == 2
    one, two = (p.whole(np.array([0]), CPU).view.noise(0) for p in (run[1], held_out))
    assert abs(float((one * two).mean())) < 0.03


@pytest.mark.parametrize("seed", range(4))
def test_picture_and_noise_are_cut_at_one_place_when_drawn(
    run: tuple[Path, Pairs], seed: int
) -> None:
    pairs = run[1]
    batch = pairs.batch(1, 64, np.random.default_rng(seed), CPU)
    # Find the crop by brute force: pair, offset, turn and flip.
    found = []
    field = NoiseField(0)
    for i in range(len(pairs)):
        for y in (0, 16, 32):
            for x in (0, 16, 32):
                start = to_model(pairs.start[i : i + 1, y : y + 64, x : x + 64])
                noise = field.at(torch.tensor([[96 * i + x, y]]), 0, 64)
                target = to_model(pairs.target[i : i + 1, y : y + 64, x : x + 64])
                for turns in range(4):
                    for flip in ((), (3,)):
                        three = [
                            torch.rot90(t, turns, (2, 3)).flip(flip) for t in (start, noise, target)
                        ]
                        if torch.equal(three[0], batch.view.x_0):
                            found.append(
                                torch.equal(three[1], batch.view.noise(0))
                                and torch.equal(three[2], batch.target)
                            )
    assert found == [True]


def test_progress_is_told_when_pairs_are_made(
    run: tuple[Path, Pairs], distill_config: TrainConfig
) -> None:
    events: list[Event] = []
    _make(distill_config, run[0], listener=events.append)
    assert [(e.stage, e.kind, e.done) for e in events] == [
        ("pairs", "start", 0),
        ("pairs", "advance", 8),
        ("pairs", "finish", 8),
    ]


def test_damaged_file_is_named_when_read(tmp_path: Path, distill_config: TrainConfig) -> None:
    _make(distill_config, tmp_path, "val")
    (path,) = _files(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ConfigError, match=path.name):
        _make(distill_config, tmp_path, "val")


def test_bare_glass_is_refused_by_name_when_drawn(
    tmp_path: Path, distill_config: TrainConfig
) -> None:
    glass = np.full((160, 160, 3), 243, np.uint8)
    image = TrainImage(Path("he/glass.png"), "he", "CC0", glass)
    white = WhitePoint(rgb=(243.0, 243.0, 243.0), origin="glass", glass_fraction=1.0)
    bundle = load_bundle(distill_config.bundle, CPU, torch.float32)
    with pytest.raises(NoTissueError, match=r"glass\.png"):
        make_pairs(bundle, distill_config, [HeField((image,), white)], "train", tmp_path, ignore)


def test_bundle_without_score_net_cannot_teach(tmp_path: Path, distill_config: TrainConfig) -> None:
    save_nets(tmp_path / "b", BundleSpec(name="empty", marker="x"), {})
    bundle = load_bundle(str(tmp_path / "b"), CPU)
    with pytest.raises(BundleError, match="no score net"):
        teacher_of(bundle, distill_config)
