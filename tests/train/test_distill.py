"""From a bundle to its student, end to end, and what is refused on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from msgspec import structs

from wsi_stain.bundles import read_spec
from wsi_stain.cli import cli
from wsi_stain.config import BundleSpec, SampleConfig, StudentSpec, TrainConfig, resolve_sampling
from wsi_stain.errors import BundleError, ConfigError
from wsi_stain.manifest import Event, ignore
from wsi_stain.train.checkpoint import load_average
from wsi_stain.train.distill import distill_bundle, export_student, train_student
from wsi_stain.train.run import train_stage
from wsi_stain.translate.bundle import load_bundle, save_nets
from wsi_stain.translate.student import StudentSampler

CPU = torch.device("cpu")
SaveTeacher = Callable[[Path], Path]
RECIPES = Path(__file__).parents[2] / "pipelines" / "train"


def _recipe(path: Path, he_root: Path, **distill: object) -> Path:
    lines = [f"{name} = {value!r}" for name, value in distill.items()]
    text = f"""
stage = "distill"
bundle = "unset"
samples = 8
batch = 2
warmup_samples = 0
lr = 1e-3
[data]
root = "{he_root}"
folders = ["he/drawn"]
crop_px = 96
balance = false
[distill]
pairs = 8
held_out_pairs = 2
crop_px = 64
"""
    path.write_text(text + "\n".join(lines), encoding="utf-8")
    return path


def test_bundle_has_a_student_that_runs_when_distilled(
    tmp_path: Path, he_root: Path, save_teacher: SaveTeacher
) -> None:
    bundle, events = save_teacher(tmp_path / "b"), list[Event]()
    before = read_spec(bundle)
    recipe = _recipe(tmp_path / "r.toml", he_root, evaluations=2)
    distill_bundle(recipe, tmp_path / "run", bundle, events.append, samples=4, threads=1)
    spec = read_spec(bundle)
    assert spec.student == StudentSpec(steps=2, start_step=150, trained_samples=4)
    assert spec.files["score.safetensors"] == before.files["score.safetensors"]
    assert "distill: 8 teacher pairs, loss regress; 4 crops of 4 images" in spec.data_statement
    loaded = load_bundle(str(bundle), CPU, torch.float32)
    assert loaded.student is not None
    average, _ = load_average(tmp_path / "run", "distill")
    for name, p in loaded.student.named_parameters():
        torch.testing.assert_close(p, average[name].bfloat16().float(), rtol=0, atol=0)
    sampler = loaded.sampler(*resolve_sampling(spec, SampleConfig(solver="student")))
    assert isinstance(sampler, StudentSampler)
    noise = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    y_0 = sampler(torch.zeros(1, 3, 96, 96), lambda _: noise, 0.3)
    assert float(y_0.std()) > 0.01
    assert [e.kind for e in events if e.stage == "pairs"].count("finish") == 2
    # The same command again makes no pair and no step, and changes no weight.
    again: list[Event] = []
    files = read_spec(bundle).files
    distill_bundle(recipe, tmp_path / "run", bundle, again.append, samples=4, threads=1)
    assert read_spec(bundle).files.keys() == files.keys()
    assert not [e for e in again if e.stage == "train" and e.kind == "advance"]


def test_matching_starts_from_the_student_when_there_is_one(
    tmp_path: Path, he_root: Path, save_teacher: SaveTeacher
) -> None:
    bundle = save_teacher(tmp_path / "b")
    first = _recipe(tmp_path / "1.toml", he_root)
    distill_bundle(first, tmp_path / "run", bundle, ignore, threads=1)
    taught = load_bundle(str(bundle), CPU, torch.float32).student
    assert taught is not None
    weights = {name: p.clone() for name, p in taught.named_parameters()}
    second = _recipe(tmp_path / "2.toml", he_root, loss="rdmd")
    distill_bundle(second, tmp_path / "run-2", bundle, ignore, samples=2, threads=1)
    spec = read_spec(bundle)
    assert spec.student is not None
    assert (spec.student.trained_by, spec.student.trained_samples) == ("rdmd", 2)
    matched = load_bundle(str(bundle), CPU, torch.float32).student
    assert matched is not None
    # One averaged step lies nearer to the student than the student to its own start.
    moved = [float((p - weights[n]).abs().max()) for n, p in matched.named_parameters()]
    assert 0.0 < max(moved) < 0.01
    third = _recipe(tmp_path / "3.toml", he_root, loss="rdmd", evaluations=3)
    with pytest.raises(BundleError, match=r"takes 1 step\(s\) from level 150; asked are 3"):
        distill_bundle(third, tmp_path / "run-3", bundle, ignore, threads=1)


def test_student_goes_when_the_score_net_is_trained_anew(
    tmp_path: Path, he_root: Path, save_teacher: SaveTeacher
) -> None:
    bundle = save_teacher(tmp_path / "b")
    distill_bundle(_recipe(tmp_path / "r.toml", he_root), tmp_path / "run", bundle, ignore)
    save_nets(bundle, structs.replace(read_spec(bundle), default_solver="student"), {})
    text = (tmp_path / "r.toml").read_text().split("[distill]")[0].replace("distill", "score")
    score = tmp_path / "score.toml"
    score.write_text(text + "[net]\nchannels = [16, 16]\nblocks = 1\n")
    notes: list[Event] = []
    train_stage("score", score, tmp_path / "score", bundle, notes.append, samples=2, threads=1)
    spec = read_spec(bundle)
    assert (spec.student, spec.default_solver) == (None, "solver")
    assert not (bundle / "student.safetensors").exists()
    assert "student.safetensors" not in spec.files
    assert any("wsi-stain distill" in event.text for event in notes)


def test_recipe_of_another_stage_is_refused(tmp_path: Path, teacher: Path) -> None:
    with pytest.raises(ConfigError, match="trains stage mine, not distill"):
        distill_bundle(RECIPES / "2-mine.toml", tmp_path / "run", teacher, ignore)
    with pytest.raises(ConfigError, match="wsi-stain distill --recipe"):
        train_stage("score", RECIPES / "4-distill.toml", tmp_path / "run", None, ignore)


def test_bundle_that_cannot_teach_is_refused_before_any_work(
    tmp_path: Path, distill_config: TrainConfig
) -> None:
    save_nets(tmp_path / "empty", BundleSpec(name="empty", marker="x"), {})
    config = structs.replace(distill_config, bundle=str(tmp_path / "empty"))
    with pytest.raises(BundleError, match="no score net"):
        train_student(config, tmp_path / "run", ignore)
    assert not (tmp_path / "run").exists()
    with pytest.raises(BundleError, match=r"bundle\.json"):
        distill_bundle(RECIPES / "4-distill.toml", tmp_path / "run", tmp_path / "none", ignore)


def test_folder_that_is_named_like_a_shipped_bundle_is_the_one_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_nets(Path("ki67"), BundleSpec(name="empty", marker="x"), {})
    with pytest.raises(BundleError, match="Bundle empty has no score net"):
        distill_bundle(RECIPES / "4-distill.toml", tmp_path / "run", Path("ki67"), ignore)


def test_crop_larger_than_a_pair_is_refused(tmp_path: Path, distill_config: TrainConfig) -> None:
    large = structs.replace(distill_config.distill, crop_px=112)
    with pytest.raises(ConfigError, match="112 is larger than a pair"):
        train_student(structs.replace(distill_config, distill=large), tmp_path / "run", ignore)


def test_nothing_is_exported_without_a_checkpoint(
    tmp_path: Path, distill_config: TrainConfig, teacher: Path
) -> None:
    with pytest.raises(ConfigError, match="Checkpoint"):
        export_student(distill_config, tmp_path / "run", teacher, ignore)
    assert read_spec(teacher).student is None


def test_verb_distills_when_called(
    tmp_path: Path, he_root: Path, save_teacher: SaveTeacher
) -> None:
    bundle = save_teacher(tmp_path / "b")
    recipe = _recipe(tmp_path / "r.toml", he_root)
    words = ["distill", "--recipe", str(recipe), "--run", str(tmp_path / "run")]
    words += ["--bundle", str(bundle), "--samples", "2", "--threads", "1", "--quiet"]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    assert read_spec(bundle).student is not None
    rows = (tmp_path / "run/log.jsonl").read_text().splitlines()
    assert np.all(["grey" in row and "sharpness" in row for row in rows])
