"""Recipes of evaluations: checked key by key, changes relative to the bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from wsi_stain.bundles import find_bundle, read_spec
from wsi_stain.config import (
    BundleSpec,
    GuidanceSpec,
    SolverSpec,
    StudentSpec,
    load_recipe,
    resolve_sampling,
)
from wsi_stain.errors import ConfigError
from wsi_stain.evaluate.recipe import EvaluateConfig, Variant, vary_spec

RECIPES = sorted((Path(__file__).resolve().parents[2] / "pipelines/evaluate").glob("*.toml"))
GROUP = '[[images]]\nname = "a"\nmpp = 0.5\nfolder = "he"\n'
SPEC = BundleSpec(
    name="b",
    marker="Test",
    solver=SolverSpec(steps=7, eta=0.5),
    guidance=GuidanceSpec(contrast="none", entropy_scale=0.3),
)


def load(tmp_path: Path, text: str) -> EvaluateConfig:
    path = tmp_path / "r.toml"
    path.write_text(text)
    return load_recipe(path, EvaluateConfig)[0]


def test_variant_changes_single_fields_and_leaves_the_bundles_others() -> None:
    variant = Variant(name="v", guidance={"weight": 0.25}, solver={"order": 1})
    spec = vary_spec(SPEC, variant)
    assert spec.guidance == msgspec.structs.replace(SPEC.guidance, weight=0.25)
    assert spec.solver == msgspec.structs.replace(SPEC.solver, order=1)
    assert spec.teacher == SPEC.teacher


def test_variant_of_the_teacher_changes_the_teacher() -> None:
    sample: dict[str, Any] = {"solver": "teacher", "steps": 9}
    variant = msgspec.convert(
        {"name": "v", "sample": sample, "solver": {"start_step": 200}}, Variant
    )
    spec = vary_spec(SPEC, variant)
    assert spec.solver == SPEC.solver
    solver, _ = resolve_sampling(spec, variant.sample)
    assert (solver.steps, solver.start_step, solver.eta) == (9, 200, 1.0)


def test_variant_of_the_student_changes_what_only_a_student_has() -> None:
    raw = {"name": "v", "sample": {"solver": "student"}, "solver": {"edges_push": 0.5}}
    variant = msgspec.convert(raw, Variant)
    taught = msgspec.structs.replace(SPEC, student=StudentSpec(start_step=33))
    spec = vary_spec(taught, variant)
    assert spec.student == StudentSpec(start_step=33, edges_push=0.5)
    assert spec.solver == SPEC.solver


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({}, "student"),
        ({"guidance": {"weight": 0.25}}, "solver"),
        ({"solver": {"order": 1}}, "solver"),
    ],
)
def test_variant_that_changes_the_guided_solver_runs_it(
    changes: dict[str, Any], taken: str
) -> None:
    student = StudentSpec(start_step=33)
    taught = msgspec.structs.replace(SPEC, student=student, default_solver="student")
    variant = msgspec.convert({"name": "v"} | changes, Variant)
    spec = vary_spec(taught, variant)
    solver, guidance = resolve_sampling(spec, variant.sample)
    assert solver == getattr(spec, taken)
    assert (guidance is None) == (taken == "student")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{ name = "v", solver = { edges_push = 1.0 } }', "SolverSpec has no `edges_push`"),
        ('{ name = "v", guidance = { wieght = 0.5 } }', "did you mean `weight`"),
        ('{ name = "v", guidance = { weight = 2.0 } }', r"GuidanceSpec\.weight.*variants"),
        ('{ name = "v", solver = { order = 3 } }', r"SolverSpec\.order.*variants"),
        ('{ name = "v", sample = { guidance = { weight = 0.5 } } }', "not of its sample"),
        (
            '{ name = "v", sample = { solver = "student" }, guidance = { weight = 0.5 } }',
            "v: the student has learned its guidance",
        ),
        ('{ name = "../v" }', "name"),
        ('{ name = "v" }, { name = "v" }', "two variants of one name: v"),
        ('{ name = "source" }', "two variants of one name: source"),
    ],
)
def test_bad_variant_is_refused_when_the_recipe_is_read(
    tmp_path: Path, line: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        load(tmp_path, f'nulls = ["source"]\nvariants = [{line}]\n{GROUP}')


def test_solver_of_the_recipe_is_that_which_its_variants_change(tmp_path: Path) -> None:
    lines = (
        'solver = "student"\nnulls = ["source"]\n',
        'variants = [{ name = "v", solver = { edges_push = 0.5 } }]\n',
    )
    (variant,) = load(tmp_path, "".join((*lines, GROUP))).runs
    assert variant.sample.solver == "student"
    guided = lines[1].replace("solver", "guidance").replace("edges_push", "weight")
    with pytest.raises(ConfigError, match="v: the student has learned its guidance"):
        load(tmp_path, "".join((lines[0], guided, GROUP)))


@pytest.mark.parametrize(
    ("head", "tail", "words"),
    [
        ("", "", "add .palette."),
        ('nulls = ["source"]\n', 'group_pattern = "("\n', "group_pattern"),
        ('nulls = ["source"]\n', 'group_pattern = "x"\n', "no .group."),
        ('nulls = ["source"]\n', GROUP, "two images of one name"),
        ('nulls = ["source"]\ncrop = 3\n', "", "crop_px"),
    ],
)
def test_bad_recipe_is_refused_in_one_line(
    tmp_path: Path, head: str, tail: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        load(tmp_path, f'{head}variants = [{{ name = "v" }}]\n{GROUP}{tail}')
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_loads_and_every_variant_differs(path: Path) -> None:
    config, _ = load_recipe(path, EvaluateConfig)
    made = set()
    for variant in config.runs:
        shipped = read_spec(find_bundle(config.bundle))
        spec = vary_spec(msgspec.structs.replace(shipped, student=StudentSpec()), variant)
        sampling = resolve_sampling(spec, variant.sample)
        start = variant.sample.start_image or spec.start_image
        made.add(msgspec.json.encode([*sampling, start, variant.seed or config.seed]))
    assert len(made) == len(config.variants)
    assert not Path(config.root).is_absolute()


def test_recipe_names_the_solver_of_variants_that_name_none(tmp_path: Path) -> None:
    variants = '{ name = "a" }, { name = "b", sample = { solver = "teacher", seeds = 2 } }'
    head = f'nulls = ["source"]\nsolver = "student"\nvariants = [{variants}]\n'
    named = [variant.sample.solver for variant in load(tmp_path, head + GROUP).runs]
    assert named == ["student", "teacher"]
    bare = load(tmp_path, head.replace('solver = "student"\n', "") + GROUP)
    assert bare.runs == bare.variants


def test_recipes_are_there() -> None:
    assert {path.stem for path in RECIPES} >= {"quick", "ablations"}
