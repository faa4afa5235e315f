"""From a recipe to a bundle that loads: three stages, one folder."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest
import torch
from msgspec import structs

from wsi_stain.bundles import find_bundle, read_spec
from wsi_stain.config import BundleSpec, GuidanceSpec, SolverSpec, TrainConfig, load_recipe
from wsi_stain.errors import BundleError, ConfigError, OutputError
from wsi_stain.manifest import Event, ignore
from wsi_stain.stain.reference import measure_reference
from wsi_stain.train.checkpoint import load_average
from wsi_stain.train.data import ImageSet
from wsi_stain.train.images import load_images
from wsi_stain.train.run import export, run_stage, train_stage
from wsi_stain.train.score import settle_net
from wsi_stain.translate.bundle import load_bundle

CPU = torch.device("cpu")
RECIPES = Path(__file__).parents[2] / "pipelines" / "train"

DATA = """
[data]
root = "{root}"
where = {{ stain = ["IHC"] }}
crop_px = 144
mpp = 0.7
[net]
channels = [16, 16]
blocks = 1
[critic]
channels = [8, 8, 8]
embed = 4
negatives = 4
[heads]
embed = 4
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tissue: ImageSet) -> Path:
    """Drawn images of two sources with licences, and a manifest."""
    folder = tmp_path_factory.mktemp("data")
    rows = [("path", "stain", "licence", "split")]
    for i, (source, split, licence) in enumerate(
        [("a", "train", "CC0"), ("a", "train", "CC0"), ("b", "train", "by: B"), ("a", "val", "X")]
    ):
        path = folder / "ihc" / source / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = np.rot90(tissue.images[i % 3].rgb, i)[:, :, ::-1]
        assert cv2.imwrite(str(path), np.ascontiguousarray(picture))
        rows.append((path.relative_to(folder).as_posix(), "IHC", licence, split))
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return folder


def _recipe(folder: Path, root: Path, stage: str) -> Path:
    head = f'stage = "{stage}"\nbundle = "unset"\nname = "mine"\nmarker = "PR"\nsamples = 4\n'
    extra = 'batch = 2\nmap_floor_step = 33\ngradient_map = "ngf"\nfocus_step = 100\n'
    path = folder / f"{stage}.toml"
    path.write_text(head + extra + DATA.format(root=root), encoding="utf-8")
    return path


def _train(folder: Path, root: Path, stage: str, listener: list[Event] | None = None) -> Path:
    recipe, bundle = _recipe(folder, root, stage), folder / "bundle"
    hear = ignore if listener is None else listener.append
    train_stage(stage, recipe, folder / f"run-{stage}", bundle, hear, threads=1)
    return bundle


def test_bundle_grows_and_runs_when_three_stages_are_trained(tmp_path: Path, root: Path) -> None:
    for stage in ("score", "mine", "refine"):
        bundle = _train(tmp_path, root, stage)
    loaded = load_bundle(str(bundle), CPU, torch.float32)
    nets = {"score": loaded.score, "mine": loaded.critic, "refine": loaded.heads}
    for stage, net in nets.items():
        assert net is not None
        average, samples = load_average(tmp_path / f"run-{stage}", stage)
        assert samples == 4
        for name, p in net.named_parameters():
            torch.testing.assert_close(p, average[name].bfloat16().float(), rtol=0, atol=0)
    sampler = loaded.sampler(SolverSpec(steps=3), loaded.spec.guidance)
    assert sampler is not None
    noise = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    y_0 = sampler(torch.zeros(1, 3, 96, 96), lambda _: noise, 0.3)
    assert float(y_0.std()) > 0.01


def test_spec_says_what_was_trained_when_exported(tmp_path: Path, root: Path) -> None:
    for stage in ("score", "mine"):
        bundle = _train(tmp_path, root, stage)
    config, _ = load_recipe(_recipe(tmp_path, root, "score"), TrainConfig)
    images = load_images(config.data, "train")
    spec = read_spec(bundle)
    assert (spec.name, spec.marker, spec.mpp, spec.tile_px) == ("mine", "PR", 0.7, 256)
    assert spec.trained_samples == 4
    assert spec.net == settle_net(config.net, ImageSet(images, config.data))
    white = config.data.white_target
    sources = [im.source for im in images]
    assert spec.color == measure_reference([im.rgb for im in images], white, laboratories=sources)
    assert spec.color.white == white
    assert spec.critic == config.critic
    assert spec.licences == ("CC0", "by: B")
    line = "4 crops of 3 images: 2 of ihc/a (CC0); 1 of ihc/b (by: B)."
    assert spec.data_statement == f"score: {line}\nmine: {line}"
    assert spec.created_by.startswith("wsi-stain ")
    # The critic knows only the maps that it was trained on.
    assert spec.guidance.gradient_map == "ngf"
    assert spec.guidance.map_floor_step == 33
    default = structs.replace(spec.guidance, gradient_map="sobel", map_floor_step=20)
    assert default == GuidanceSpec()


def test_users_fields_stay_when_a_stage_is_exported_again(tmp_path: Path, root: Path) -> None:
    bundle = _train(tmp_path, root, "score")
    spec = structs.replace(
        read_spec(bundle), use="teaching", solver=SolverSpec(steps=9), tile_px=96
    )
    (bundle / "bundle.json").write_bytes(_json(spec))
    _train(tmp_path, root, "mine")
    _train(tmp_path, root, "score")
    after = read_spec(bundle)
    assert (after.use, after.solver.steps, after.tile_px) == ("teaching", 9, 96)
    assert after.critic is not None
    assert after.data_statement.count("score: ") == 1


def _json(spec: BundleSpec) -> bytes:
    return msgspec.json.encode(spec)


def test_heads_are_removed_when_the_score_net_is_replaced(tmp_path: Path, root: Path) -> None:
    for stage in ("score", "refine"):
        bundle = _train(tmp_path, root, stage)
    assert (bundle / "heads.safetensors").is_file()
    events: list[Event] = []
    _train(tmp_path, root, "score", events)
    spec = read_spec(bundle)
    assert spec.heads is None
    assert set(spec.files) == {"score.safetensors"}
    assert not (bundle / "heads.safetensors").exists()
    assert any("train refine" in event.text for event in events)
    assert load_bundle(str(bundle), CPU).heads is None


def test_training_goes_on_when_more_samples_are_asked(tmp_path: Path, root: Path) -> None:
    recipe, run = _recipe(tmp_path, root, "score"), tmp_path / "run"
    train_stage("score", recipe, run, None, ignore)
    assert load_average(run, "score")[1] == 4
    train_stage("score", recipe, run, None, ignore, samples=8)
    assert load_average(run, "score")[1] == 8
    assert not (tmp_path / "bundle").exists()


def test_stage_is_refused_when_the_recipe_is_of_another(tmp_path: Path, root: Path) -> None:
    recipe = _recipe(tmp_path, root, "mine")
    with pytest.raises(ConfigError, match="trains stage mine, not score") as caught:
        train_stage("score", recipe, tmp_path / "run", None, ignore)
    assert "wsi-stain train mine" in caught.value.hint
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["mine", "refine"])
def test_stage_is_refused_before_work_when_there_is_no_bundle_to_add_to(
    stage: str, tmp_path: Path, root: Path
) -> None:
    with pytest.raises(BundleError, match="is no bundle yet") as caught:
        _train(tmp_path, root, stage)
    assert "train score" in caught.value.hint
    assert not (tmp_path / f"run-{stage}").exists()


def test_refine_is_refused_when_the_bundle_has_no_score_net(tmp_path: Path, root: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "bundle.json").write_bytes(_json(BundleSpec(name="bare", marker="m")))
    with pytest.raises(BundleError, match="has no score net"):
        _train(tmp_path, root, "refine")


def test_refine_reads_the_folder_that_it_writes_whatever_its_name(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ki67").mkdir()
    Path("ki67/bundle.json").write_bytes(_json(BundleSpec(name="bare", marker="m")))
    recipe = _recipe(tmp_path, root, "refine")
    with pytest.raises(BundleError, match="has no score net"):
        train_stage("refine", recipe, tmp_path / "run", Path("ki67"), ignore)


def test_export_is_refused_when_the_run_is_of_another_stage(tmp_path: Path, root: Path) -> None:
    bundle = _train(tmp_path, root, "score")
    config, _ = load_recipe(_recipe(tmp_path, root, "mine"), TrainConfig)
    before = (bundle / "bundle.json").read_bytes()
    with pytest.raises(ConfigError, match="is of stage score, not mine"):
        export(config, tmp_path / "run-score", bundle, ignore)
    assert (bundle / "bundle.json").read_bytes() == before


def test_file_in_place_of_the_run_folder_is_told(tmp_path: Path, root: Path) -> None:
    (tmp_path / "run-score").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"Folder .*run-score cannot be made: File exists"):
        _train(tmp_path, root, "score")


def test_run_stops_with_a_checkpoint_when_told(tmp_path: Path, root: Path) -> None:
    config, _ = load_recipe(_recipe(tmp_path, root, "score"), TrainConfig)
    run_stage(config, tmp_path / "run", ignore, lambda: True)
    assert load_average(tmp_path / "run", "score")[1] == 0


@pytest.mark.parametrize("name", ["1-score", "2-mine", "3-refine"])
def test_shipped_recipe_is_the_stage_of_its_name_when_loaded(name: str) -> None:
    config, _ = load_recipe(RECIPES / f"{name}.toml", TrainConfig)
    assert config.stage == name.split("-")[1]
    first, _ = load_recipe(RECIPES / "1-score.toml", TrainConfig)
    assert config.data == first.data
    assert (config.name, config.marker) == (first.name, first.marker)
    assert config.data.crop_px >= 96


@pytest.mark.parametrize(
    ("recipe", "bundle"),
    [("1-score.toml", "ki67"), ("1-score-cuda.toml", "ki67"), ("open/1-score.toml", "ki67-open")],
)
def test_bundle_of_a_shipped_recipe_runs_as_the_shipped_one(recipe: str, bundle: str) -> None:
    config, _ = load_recipe(RECIPES / recipe, TrainConfig)
    spec = read_spec(find_bundle(bundle))
    asked, settled = (
        (each.start_image, each.solver, each.teacher, each.guidance) for each in (config, spec)
    )
    assert config.veil_od == spec.color.veil_od
    # What scales a term that is off decides nothing.
    assert config.guidance.contrast == "none"
    off = spec.guidance.contrast_scale
    assert (*asked[:3], structs.replace(asked[3], contrast_scale=off)) == settled
