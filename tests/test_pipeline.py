"""The whole road on slides that the tests write: identity bundle, tiny nets, kill and resume."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
import torch

from wsi_stain.config import BundleSpec, NetSpec, RunConfig, resolve_run_config
from wsi_stain.dispatch import SerialExecutor
from wsi_stain.errors import NoTissueError, OutputError, PlanError, SlideError
from wsi_stain.evaluate.report import write_report
from wsi_stain.layout import RunFiles, find_run
from wsi_stain.lock import OutputLock
from wsi_stain.manifest import Event, RunManifest
from wsi_stain.pipeline import translate_slide
from wsi_stain.planning import plan_slide, shard_size
from wsi_stain.slides.store import PatchStore
from wsi_stain.stages import beside, picture
from wsi_stain.stages.tiles import flag_texts
from wsi_stain.stain.density import dab_od
from wsi_stain.translate.bundle import save_nets
from wsi_stain.translate.networks import ScoreNet
from wsi_stain.write.validate import validate

Pixels = npt.NDArray[np.uint8]
Write = Callable[..., Path]


@pytest.fixture(scope="session")
def identity_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundle without nets whose start image is the slide itself: the road, and nothing else."""
    folder = tmp_path_factory.mktemp("bundles") / "identity"
    save_nets(folder, BundleSpec(name="identity", marker="Test", start_image="source"), {})
    return folder


@pytest.fixture(scope="session")
def tiny_net_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundle with a small untrained net: noise by place and batches matter, speed does not."""
    torch.manual_seed(0)
    net = NetSpec(channels=(16, 16), blocks=1)
    weights = ScoreNet(net).state_dict()
    weights["tail.weight"] = 0.05 * torch.randn_like(weights["tail.weight"])
    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    spec = BundleSpec(name="tiny", marker="Test", tile_px=128, net=net, start_image="stain")
    save_nets(folder, spec, {"score": weights})
    return folder


@pytest.fixture(scope="session")
def small_slide(
    tmp_path_factory: pytest.TempPathFactory, write_slide: Write, he_pixels: Pixels
) -> Path:
    """About 20 tiles of tissue."""
    path = tmp_path_factory.mktemp("slides") / "small.tiff"
    return write_slide(path, he_pixels[200:620, 150:700], 0.5)


def settings(bundle: Path, **flags: Any) -> RunConfig:
    base = {"bundle": str(bundle), "cluster.executor": "serial", "tiles.shard_tiles": 4}
    return resolve_run_config(base | {k.replace("__", "."): v for k, v in flags.items()})[0]


def level0(path: Path) -> Pixels:
    with tifffile.TiffFile(path) as tiff:
        pixels: Pixels = tiff.pages.first.asarray()
        return pixels


def dark_coordinates(x_px: int, y_px: int, width_px: int, height_px: int) -> Pixels:
    """Every pixel tells its place, and none looks like glass."""
    ys, xs = np.mgrid[y_px : y_px + height_px, x_px : x_px + width_px]
    blue = 60 + (xs // 100 % 8) + 8 * (ys // 100 % 8)
    return np.stack([xs % 100, ys % 100, blue], axis=-1).astype(np.uint8)


def test_coordinate_slide_lands_pixel_exact(
    tmp_path: Path, identity_bundle: Path, write_slide: Write
) -> None:
    width_px, height_px = 611, 523
    pixels = dark_coordinates(0, 0, width_px, height_px)
    slide = write_slide(tmp_path / "c.tiff", pixels, 0.5)
    config = settings(identity_bundle, tiles__tissue_min_fraction=0.0, write__lossless=True)
    result = translate_slide(slide, tmp_path / "out", config)
    made = level0(result.files.output)
    # The right and bottom rims blur against the glass outside: the mask smooths over 5 px.
    np.testing.assert_array_equal(made[:-6, :-6], pixels[:-6, :-6])


def test_output_lies_in_the_slides_frame(
    tmp_path: Path, identity_bundle: Path, synthetic_slide: Path, he_pixels: Pixels
) -> None:
    result = translate_slide(synthetic_slide, tmp_path, settings(identity_bundle))
    found = validate(result.files.output)
    assert found.ok, found.problems
    made = level0(result.files.output)
    assert made.shape == he_pixels.shape
    stained = he_pixels.min(axis=-1) < 150
    difference = np.abs(made.astype(int) - he_pixels)[stained].mean()
    assert difference < 6, "JPEG twice over, nothing more"
    assert found.facts["mpp"] == pytest.approx(0.5, rel=1e-3)


def test_who_hands_out_work_loads_no_torch(
    tmp_path: Path, identity_bundle: Path, small_slide: Path
) -> None:
    arguments = ["translate", str(small_slide), "--out", str(tmp_path / "out"), "--json"]
    arguments += ["--bundle", str(identity_bundle), "--device", "cpu", "--workers", "1"]
    arguments += ["--unguided"]  # no term looks at a gradient map, which torch would measure
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\n"
        "from wsi_stain.cli import cli\n"
        "if __name__ == '__main__':\n"
        f"    cli({arguments!r}, standalone_mode=False)\n"
        "    print(sorted({'distributed', 'torch', 'safetensors'} & set(sys.modules)))\n"
    )
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['distributed']"
    assert find_run(tmp_path / "out").report.is_dir(), "the report was written, without torch too"


def test_finer_slide_is_reduced_to_the_models_pixel_size(
    tmp_path: Path, identity_bundle: Path, write_slide: Write, he_pixels: Pixels
) -> None:
    fine = he_pixels.repeat(2, axis=0).repeat(2, axis=1)
    slide = write_slide(tmp_path / "fine.svs", fine, 0.25, kind="aperio")
    plan = plan_slide(slide, settings(identity_bundle))
    plan.source.close()
    assert plan.scale.factor == 2.0
    assert plan.scale.size_out == (he_pixels.shape[1], he_pixels.shape[0])
    assert plan.scale.mpp_out == pytest.approx(0.5)


def test_manifest_tells_what_was_done_and_no_path(
    tmp_path: Path, identity_bundle: Path, synthetic_slide: Path
) -> None:
    events: list[Event] = []
    result = translate_slide(
        synthetic_slide, tmp_path, settings(identity_bundle), listener=events.append
    )
    record = RunManifest.load(result.files.manifest).content
    assert record.state == "finished"
    assert [s.name for s in record.stages] == ["fill", "translate", "write"]
    assert {s.state for s in record.stages} == {"finished"}
    assert record.outputs[0].name == result.files.output.name
    assert str(synthetic_slide.parent) not in result.files.manifest.read_text()
    assert not result.files.store.exists()
    assert record.tiles["tiles"] == len(result.files.tile_scores.read_text().splitlines()) - 1
    assert record.tiles["median"]["structure"] > 0.6, "what is copied keeps its nuclei"
    assert record.flags == flag_texts(record.tiles)
    assert str(result.files.tile_scores) in result.summary["to look at"]
    ended = {event.stage for event in events if event.kind == "finish"}
    before, after = {"plan", "fit", "overview"}, {"validate", "annotate"}
    assert ended == before | {"fill", "translate", "write"} | after


class Stop(Exception):
    """Stands for a kill."""


def stopping_at(stage: str, kind: str) -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        if (event.stage, event.kind) == (stage, kind):
            raise Stop

    return listen


@pytest.mark.parametrize(
    ("stage", "kind"),
    [
        ("fill", "advance"),
        ("fit", "finish"),
        ("translate", "advance"),
        ("translate", "finish"),
        ("write", "advance"),
        ("validate", "start"),
    ],
)
def test_stopped_run_goes_on_to_the_same_bytes(
    tmp_path: Path, tiny_net_bundle: Path, small_slide: Path, stage: str, kind: str
) -> None:
    config = settings(tiny_net_bundle, sample__steps=2, sample__guided=False)
    straight = translate_slide(small_slide, tmp_path / "a", config)
    with pytest.raises(Stop):
        translate_slide(small_slide, tmp_path / "b", config, listener=stopping_at(stage, kind))
    left = sorted(p.name for p in (tmp_path / "b").iterdir())
    assert not [name for name in left if name.endswith(".part")]
    # A stop after the rename leaves a whole file, which may be replaced.
    config = settings(tiny_net_bundle, sample__steps=2, sample__guided=False, write__overwrite=True)
    done: list[int] = []

    def watch(event: Event) -> None:
        if event.stage == "fill" and event.kind == "start":
            done.append(event.done)

    resumed = translate_slide(small_slide, tmp_path / "b", config, listener=watch)
    if stage != "fit":  # the color is fitted before the first shard is there
        assert done[0] > 0, "finished shards are not read again"
    assert resumed.files.output.read_bytes() == straight.files.output.read_bytes()
    assert resumed.files.tile_scores.read_bytes() == straight.files.tile_scores.read_bytes()


def test_changed_seed_voids_the_translated_shards_only(
    tmp_path: Path, tiny_net_bundle: Path, small_slide: Path
) -> None:
    flags: dict[str, Any] = {"sample__steps": 2, "sample__guided": False}
    with pytest.raises(Stop):
        translate_slide(
            small_slide,
            tmp_path,
            settings(tiny_net_bundle, **flags),
            listener=stopping_at("translate", "finish"),
        )
    plan = plan_slide(small_slide, settings(tiny_net_bundle, **flags, seed=1))
    plan.source.close()
    started: dict[str, int] = {}

    def watch(event: Event) -> None:
        if event.kind == "start":
            started[event.stage] = event.done

    translate_slide(
        small_slide, tmp_path, settings(tiny_net_bundle, **flags, seed=1), listener=watch
    )
    assert started["fill"] == plan.grid.n_tiles
    assert started["translate"] == 0


def test_workers_and_shard_order_do_not_change_a_byte(
    tmp_path: Path, tiny_net_bundle: Path, small_slide: Path
) -> None:
    flags: dict[str, Any] = {"sample__steps": 2, "sample__guided": False}
    serial = translate_slide(small_slide, tmp_path / "a", settings(tiny_net_bundle, **flags))
    dask = translate_slide(
        small_slide,
        tmp_path / "b",
        settings(
            tiny_net_bundle,
            **flags,
            cluster__executor="dask",
            cluster__workers=2,
            tiles__shard_tiles=3,
        ),
    )
    assert dask.files.output.read_bytes() == serial.files.output.read_bytes()


def test_existing_output_is_refused_before_work(
    tmp_path: Path, identity_bundle: Path, synthetic_slide: Path
) -> None:
    files = RunFiles.of(tmp_path, synthetic_slide, "Test")
    files.output.write_bytes(b"mine")
    with pytest.raises(OutputError, match="--overwrite"):
        translate_slide(synthetic_slide, tmp_path, settings(identity_bundle))
    assert files.output.read_bytes() == b"mine"
    assert not files.folder.exists()


def test_page_of_an_older_picture_goes_when_a_new_one_begins(
    tmp_path: Path, identity_bundle: Path, small_slide: Path
) -> None:
    files = translate_slide(small_slide, tmp_path, settings(identity_bundle)).files
    write_report(files.folder)
    anew = settings(identity_bundle, write__overwrite=True, write__quality=70)
    translate_slide(small_slide, tmp_path, anew)
    assert not files.report.exists()


def test_second_format_beside_the_first_is_refused(
    tmp_path: Path, identity_bundle: Path, small_slide: Path
) -> None:
    first = translate_slide(small_slide, tmp_path, settings(identity_bundle)).files
    before = first.manifest.read_bytes()
    for overwrite in (False, True):  # the first one's record would be gone
        config = settings(identity_bundle, write__format="ome-zarr", write__overwrite=overwrite)
        with pytest.raises(OutputError, match="there in another format") as caught:
            translate_slide(small_slide, tmp_path, config)
        assert str(first.output) in caught.value.message
    assert first.manifest.read_bytes() == before
    other = translate_slide(
        small_slide, tmp_path / "other", settings(identity_bundle, write__format="ome-zarr")
    )
    assert other.files.output.is_dir()


def test_second_run_on_the_same_output_is_refused(
    tmp_path: Path, identity_bundle: Path, synthetic_slide: Path
) -> None:
    files = RunFiles.of(tmp_path, synthetic_slide, "Test")
    files.folder.mkdir()
    with OutputLock(files.lock), pytest.raises(OutputError, match="Another run"):
        translate_slide(synthetic_slide, tmp_path, settings(identity_bundle))


def test_all_glass_slide_has_no_tissue(
    tmp_path: Path, identity_bundle: Path, write_slide: Write
) -> None:
    rng = np.random.default_rng(0)
    glass = np.clip(rng.normal(243, 1.5, (600, 700, 3)), 0, 255).astype(np.uint8)
    slide = write_slide(tmp_path / "glass.tiff", glass, 0.5)
    with pytest.raises(NoTissueError):
        plan_slide(slide, settings(identity_bundle))


def test_plan_too_large_for_memory_is_refused_early(
    tmp_path: Path, identity_bundle: Path, synthetic_slide: Path
) -> None:
    config = settings(identity_bundle, cluster__memory_limit_mb=64)
    with pytest.raises(PlanError, match="memory"):
        translate_slide(synthetic_slide, tmp_path, config)


def test_unsound_output_is_an_error_not_a_result(
    tmp_path: Path,
    identity_bundle: Path,
    synthetic_slide: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def blank(*_: object, **__: object) -> Iterator[Pixels]:
        yield np.full((1101, 1403, 3), 243, np.uint8)

    monkeypatch.setattr(picture, "stitch_bands", blank)
    with pytest.raises(OutputError, match=r"not sound.*blank"):
        translate_slide(synthetic_slide, tmp_path, settings(identity_bundle))


def test_an_overview_of_other_content_is_told_and_not_blamed_on_the_pyramid(
    identity_bundle: Path, he_pixels: Pixels, tmp_path: Path
) -> None:
    """As of a damaged tile that still decodes: glass where the overview has tissue."""
    full = he_pixels.copy()
    full[:550] = 243
    with tifffile.TiffWriter(slide := tmp_path / "slide.tiff") as tiff:
        for level, pixels in ((0, full), (1, he_pixels[::2, ::2]), (2, he_pixels[::4, ::4])):
            tiff.write(
                pixels,
                tile=(256, 256),
                photometric="rgb",
                subfiletype=int(level > 0),
                metadata=None,
                resolution=(20_000 / 2**level,) * 2,
                resolutionunit="CENTIMETER",
            )
    result = translate_slide(slide, tmp_path, settings(identity_bundle))
    notes = [note for note in result.summary["notes"] if "show different things" in note]
    assert len(notes) == 1
    assert validate(result.files.output).ok


def test_slide_that_fails_beside_the_work_leaves_no_pyramid(
    identity_bundle: Path, small_slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The H&E pictures may fail after the last shard: the pyramid has no name by then."""

    def fail(*args: object, **kwargs: object) -> None:
        deadline_s = time.monotonic() + 20.0
        while not any(tmp_path.glob("*.part")) and time.monotonic() < deadline_s:
            time.sleep(0.01)
        time.sleep(0.5)
        raise SlideError("A tile cannot be read.")

    monkeypatch.setattr(beside, "keep_he", fail)
    with pytest.raises(SlideError, match="A tile cannot be read"):
        translate_slide(small_slide, tmp_path, settings(identity_bundle))
    assert [path.suffix for path in tmp_path.iterdir()] == [".run"]
    monkeypatch.undo()
    assert translate_slide(small_slide, tmp_path, settings(identity_bundle)).files.output.is_file()


@pytest.mark.parametrize(("n_tiles", "size"), [(1, 4), (64, 4), (81, 4), (1000, 32), (10**6, 64)])
def test_shards_are_whole_batches_and_many(n_tiles: int, size: int) -> None:
    assert shard_size(n_tiles) == size


def test_events_and_results_are_plain(
    tmp_path: Path, identity_bundle: Path, synthetic_slide: Path
) -> None:
    result = translate_slide(synthetic_slide, tmp_path, settings(identity_bundle))
    assert json.loads(json.dumps(result.facts()))["tiles"] > 0
    assert isinstance(SerialExecutor(1), SerialExecutor)


def levels(path: Path) -> Pixels:
    """Level 0 of a grey pyramid."""
    rgb = level0(path)
    assert np.array_equal(rgb[..., 0], rgb[..., 1])
    assert np.array_equal(rgb[..., 0], rgb[..., 2])
    grey: Pixels = rgb[..., 0]
    return grey


def test_spread_of_the_identity_is_zero_and_an_old_one_goes(
    tmp_path: Path, identity_bundle: Path, small_slide: Path
) -> None:
    several = settings(identity_bundle, sample__seeds=3, write__format="ome-zarr")
    result = translate_slide(small_slide, tmp_path, several)
    path = result.files.uncertainty
    assert path.name == "small_test_uncertainty.ome.tiff"
    assert not levels(path).any()
    record = RunManifest.load(result.files.manifest).content
    assert [output.name for output in record.outputs] == [result.files.output.name, path.name]
    assert record.tiles["uncertainty"] == {"seeds": 3, "dab_sd": 0.0, "od_per_level": 0.005}
    assert "over 3 seeds" in result.summary["uncertainty"]
    with tifffile.TiffFile(path) as tiff:
        assert "over 3 noise seeds, 0.005 per grey level" in tiff.pages.first.description
    once = settings(identity_bundle, write__format="ome-zarr")
    with pytest.raises(OutputError, match="exists already"):
        translate_slide(small_slide, tmp_path, once)
    once = settings(identity_bundle, write__format="ome-zarr", write__overwrite=True)
    assert not translate_slide(small_slide, tmp_path, once).summary["uncertainty"]
    assert not path.exists()


def test_spread_of_two_seeds_is_that_of_two_runs_also_when_stopped(
    tmp_path: Path, tiny_net_bundle: Path, small_slide: Path
) -> None:
    flags: dict[str, Any] = {"sample__steps": 2, "sample__guided": False, "write__lossless": True}
    single = [
        translate_slide(
            small_slide, tmp_path / str(seed), settings(tiny_net_bundle, seed=seed, **flags)
        )
        for seed in (4, 5)
    ]
    both = settings(tiny_net_bundle, seed=4, sample__seeds=2, **flags)
    stop = stopping_at("translate", "advance")
    with pytest.raises(Stop):
        translate_slide(small_slide, tmp_path / "both", both, listener=stop)
    assert not (tmp_path / "both" / "small_test_uncertainty.ome.tiff").exists()
    result = translate_slide(small_slide, tmp_path / "both", both, keep_store=True)
    assert np.array_equal(level0(result.files.output), level0(single[0].files.output))
    # Where two tiles overlap, the spread is the mean of theirs: one tile's own middle is exact.
    store = PatchStore.open(result.files.store)
    middle = store.grid.region_out(0)
    inner = np.s_[middle.y_px + 32 : middle.bottom_px - 32, middle.x_px + 32 : middle.right_px - 32]
    first, second = (dab_od(level0(run.files.output))[inner] for run in single)
    direct = np.abs(first - second) / np.sqrt(2.0)
    found = levels(result.files.uncertainty)[inner] * 0.005
    assert direct.mean() > 0.01
    np.testing.assert_allclose(found, np.minimum(direct, 1.275), atol=0.0026)
    table = result.files.tile_scores.read_text().splitlines()
    assert float(table[1].split(",")[-2]) == pytest.approx(direct.mean(), rel=0.3)
    # A damaged spread is made again with its shard.
    shard = store.path / "sd" / "c.0.0.0.0"
    before = result.files.uncertainty.read_bytes()
    shard.write_bytes(shard.read_bytes()[:-1000] + bytes(1000))
    again = settings(tiny_net_bundle, seed=4, sample__seeds=2, write__overwrite=True, **flags)
    result = translate_slide(small_slide, tmp_path / "both", again)
    assert result.files.uncertainty.read_bytes() == before


def test_plan_tells_the_cost_of_seeds(tiny_net_bundle: Path, small_slide: Path) -> None:
    plans = [
        plan_slide(small_slide, settings(tiny_net_bundle, sample__seeds=seeds))
        for seeds in (1, 4, 7)
    ]
    for plan in plans:
        plan.source.close()
    once, four, seven = (plan.projection for plan in plans)
    # Beyond the start and the end, which all have alike.
    assert seven.seconds - four.seconds == pytest.approx(four.seconds - once.seconds)
    assert four.seconds > once.seconds
    assert four.store_bytes > once.store_bytes
    assert "seeds" not in plans[0].facts()
    assert plans[1].facts()["seeds"].startswith("4: ")
