"""Settings: bounds, unknown keys, origins, recipes."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from wsi_stain.config import (
    BUNDLE_SCHEMA,
    BundleSpec,
    RunConfig,
    Settings,
    TrainConfig,
    decode_bundle_spec,
    load_recipe,
    resolve_run_config,
)
from wsi_stain.errors import BundleError, ConfigError
from wsi_stain.evaluate.recipe import EvaluateConfig

REPOSITORY = Path(__file__).resolve().parents[1]


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_beat_the_recipe_and_the_recipe_beats_defaults(tmp_path: Path) -> None:
    recipe = write(tmp_path, 'seed = 5\n[write]\nquality = 70\nsubsampling = "4:4:4"\n')
    config, origins = resolve_run_config({"write.quality": 80, "bundle": None}, recipe)
    assert (config.write.quality, config.write.subsampling) == (80, "4:4:4")
    assert (config.seed, config.write.tile_px) == (5, 512)
    assert origins == {"seed": "recipe", "write.subsampling": "recipe", "write.quality": "flag"}


def test_unknown_key_names_the_nearest_known_one(tmp_path: Path) -> None:
    recipe = write(tmp_path, "[tiles]\noverlap = 32\n")
    with pytest.raises(ConfigError, match=r"recipe\.toml.*overlap.*`overlap_px`"):
        resolve_run_config({}, recipe)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("write.quality", 101),
        ("write.tile_px", 500),
        ("slide.mpp", 0.001),
        ("tiles.overlap_px", 33),
        ("sample.solver", "euler"),
        ("seed", -1),
        ("cluster.workers", "two"),
    ],
)
def test_value_out_of_bounds_is_refused_with_its_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name.split(".")[-1]):
        resolve_run_config({name: value})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sample.solver", "One of solver, teacher, student."),
        ("write.subsampling", "One of 4:2:0, 4:4:4."),
        ("cluster.device", "One of auto, cuda, cpu."),
    ],
)
def test_word_that_is_none_of_a_few_is_refused_with_those(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match="Invalid enum value") as caught:
        resolve_run_config({name: "studnet"})
    assert caught.value.hint.startswith(words)


def test_broken_toml_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_recipe(write(tmp_path, "a = = 1"), RunConfig)


def test_missing_recipe_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_recipe(tmp_path / "none.toml", RunConfig)


def test_later_bundle_schema_asks_for_a_newer_version() -> None:
    text = msgspec.json.encode({"schema": BUNDLE_SCHEMA + 1, "name": "x", "marker": "y", "new": 1})
    with pytest.raises(BundleError, match="newer wsi-stain"):
        decode_bundle_spec(text, "bundle.json")


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"schema": 1}', b"\xff\xfe"])
def test_damaged_bundle_spec_is_a_bundle_error(text: bytes) -> None:
    with pytest.raises(BundleError, match=r"bundle\.json"):
        decode_bundle_spec(text, "bundle.json")


def test_bundle_spec_survives_json() -> None:
    spec = BundleSpec(name="a", marker="Ki-67", licences=("CC0",), files={"x": "y"})
    assert decode_bundle_spec(msgspec.json.encode(spec), "bundle.json") == spec


@pytest.mark.parametrize("path", sorted((REPOSITORY / "pipelines").rglob("*.toml")), ids=str)
def test_every_recipe_in_the_repository_loads(path: Path) -> None:
    kinds: dict[str, type[Settings]] = {
        "train": TrainConfig,
        "evaluate": EvaluateConfig,
        "cluster": RunConfig,
        "translate": RunConfig,
    }
    kind = kinds[path.relative_to(REPOSITORY / "pipelines").parts[0]]
    settings, raw = load_recipe(path, kind)
    assert raw
    assert isinstance(settings, kind)


def test_default_recipe_writes_out_the_defaults() -> None:
    settings, _ = load_recipe(REPOSITORY / "pipelines/translate/he-to-ki67.toml", RunConfig)
    assert settings == RunConfig()


def test_every_recipe_stands_in_the_table() -> None:
    table = (REPOSITORY / "pipelines/README.md").read_text(encoding="utf-8")
    for path in (REPOSITORY / "pipelines").rglob("*.toml"):
        assert f"`{path.relative_to(REPOSITORY / 'pipelines')}`" in table
