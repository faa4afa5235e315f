"""The documents are true: verbs, flags, targets, exit codes, links, recipes they name."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

import wsi_stain
from wsi_stain.bundles import find_bundle, list_bundles, read_spec
from wsi_stain.cli import cli
from wsi_stain.config import RunConfig
from wsi_stain.slides.sample import SAMPLE_NAME

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path
    for path in [
        *REPOSITORY.glob("*.md"),
        *REPOSITORY.glob("docs/*.md"),
        *REPOSITORY.glob("pipelines/*.md"),
        *REPOSITORY.glob("wsi_stain/**/*.md"),
    ]
)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def code_lines(text: str) -> list[str]:
    """Lines of all fenced blocks."""
    blocks = re.findall(r"```[a-z]*\n(.*?)```", text, re.DOTALL)
    return [line.strip() for block in blocks for line in block.splitlines()]


def options_of(verb: click.Command) -> set[str]:
    return {name for p in verb.params if isinstance(p, click.Option) for name in p.opts} | {
        "--help",
        "-h",
    }


def all_verbs() -> dict[str, click.Command]:
    context = click.Context(cli)
    found = {name: cli.get_command(context, name) for name in cli.list_commands(context)}
    return {name: command for name, command in found.items() if command is not None}


VERBS = all_verbs()


def commands() -> list[tuple[str, str]]:
    found = []
    for path in DOCUMENTS:
        for line in code_lines(read(path)):
            if line.startswith("wsi-stain "):
                found.append((path.name, line.split("#")[0].strip()))
    return found


def test_readme_table_lists_every_verb() -> None:
    rows = re.findall(r"^\| `([a-z]+)` \|", read(REPOSITORY / "README.md"), re.MULTILINE)
    verbs = [row for row in rows if row not in list_bundles()]
    assert sorted(verbs) == sorted(VERBS)


@pytest.mark.parametrize(("document", "line"), commands())
def test_command_in_a_document_exists_with_its_flags(document: str, line: str) -> None:
    words = shlex.split(line.split("->")[0])
    if words[1].startswith("-"):
        assert words[1] in options_of(cli), f"{document}: {line}"
        return
    assert words[1] in VERBS, f"{document}: {line}"
    flags = {word.split("=")[0] for word in words[2:] if word.startswith("-")}
    assert flags <= options_of(VERBS[words[1]]), f"{document}: {line}"


def test_make_targets_in_documents_exist() -> None:
    makefile = read(REPOSITORY / "Makefile")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for path in DOCUMENTS:
        for target in re.findall(r"`make ([a-z-]+)", read(path)):
            assert target in targets, f"{path.name}: make {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_files_that_a_document_names_exist(path: Path) -> None:
    for name in re.findall(r"`((?:wsi_stain|pipelines|tests|examples|docs)/[\w./-]+)`", read(path)):
        assert (REPOSITORY / name).exists(), f"{path.name} names {name}"
    for name in re.findall(r"\]\((?!https?:|#)([^)]+)\)", read(path)):
        assert (path.parent / name.split("#")[0]).exists(), f"{path.name} links to {name}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_document_says_nothing_of_a_machine(path: Path) -> None:
    assert not re.search(r"/(?:home|work|root|tmp)/", read(path))


def test_exit_codes_are_documented() -> None:
    text = read(REPOSITORY / "README.md")
    for code in (*range(10), 130):
        assert re.search(rf"^\| {code} \| [a-zC]", text, re.MULTILINE), f"exit code {code}"


def test_every_shipped_bundle_has_a_model_card() -> None:
    for name in list_bundles():
        card = read(REPOSITORY / "wsi_stain/bundles" / name / "README.md")
        for heading in ("Training data", "Licence", "Limits", "Must not be used for"):
            assert heading in card, f"{name}: {heading}"


def test_page_of_the_command_line_is_what_the_code_says() -> None:
    # In a process of its own: click remembers the help flags of the first context it met.
    path = str(REPOSITORY / "docs/reference.py")
    code = f"import runpy; print(runpy.run_path({path!r})['reference'](), end='')"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert read(REPOSITORY / "docs/cli.md") == found.stdout, "run: make docs"


def find(dotted: str) -> object:
    """Import the module a dotted name begins with, and follow the rest."""
    words = dotted.split(".")
    for cut in range(len(words), 0, -1):
        try:
            found: object = importlib.import_module(".".join(words[:cut]))
        except ModuleNotFoundError:
            continue
        for word in words[cut:]:
            found = getattr(found, word)
        return found
    raise AssertionError(dotted)


def test_every_equation_lives_where_the_method_page_says() -> None:
    names = re.findall(r"`(wsi_stain(?:\.\w+)+)`", read(REPOSITORY / "docs/method.md"))
    assert len(names) > 25
    for name in names:
        assert find(name) is not None, name
    with pytest.raises(AttributeError):
        find("wsi_stain.translate.noise.Schedule.lambda_t")


def test_constants_of_the_method_page_are_those_of_the_shipped_bundle() -> None:
    text = read(REPOSITORY / "docs/method.md")
    spec = read_spec(find_bundle("ki67"))
    assert f"beta linear from {spec.beta_first:.0e}".replace("e-0", "e-") in text
    assert f"to {spec.beta_last}" in text
    assert f"S is {spec.solver.start_step} where the paper has 300" in text
    assert spec.teacher.steps == spec.teacher.start_step, "the teacher takes unit steps"
    assert f"only for t <= {spec.guidance.contrast_below_step}" in text
    assert f"tiles of {spec.tile_px} px overlap by {RunConfig().tiles.overlap_px} px" in text


def test_words_at_the_head_of_a_question_are_printed_by_the_program() -> None:
    source = "".join(read(path) for path in sorted((REPOSITORY / "wsi_stain").rglob("*.py")))
    text = read(REPOSITORY / "docs/faq.md")
    words = [
        word
        for heading in re.findall(r"^### (.*)$", text, re.MULTILINE)
        for word in re.findall(r"`([^`]+)`", heading)
    ]
    assert len(words) > 6
    for word in words:
        assert word in source, word
    flags = {flag for verb in VERBS.values() for flag in options_of(verb)}
    for flag in re.findall(r"(--[a-z-]+)", text):
        assert flag in flags, flag


def test_data_statement_counts_what_the_bundle_says() -> None:
    spec = read_spec(find_bundle("ki67"))
    counted = re.search(r"of (\d+) images", spec.data_statement)
    assert counted is not None
    text = read(REPOSITORY / "docs/data.md")
    assert f"saw {counted[1]} fields" in text
    raw = json.loads((find_bundle("ki67") / "bundle.json").read_text())
    assert {"licences", "data_statement"} <= set(raw)
    assert SAMPLE_NAME in text


def test_readme_lists_every_example_and_has_a_place_for_figures() -> None:
    text = read(REPOSITORY / "README.md")
    there = {path.name for path in (REPOSITORY / "examples").glob("*.py")}
    assert set(re.findall(r"^\| `examples/(\w+\.py)` \|", text, re.MULTILINE)) == there
    assert text.index("<!-- bench -->") < text.index("<!-- /bench -->")


def test_python_of_the_readme_uses_the_six_names() -> None:
    text = read(REPOSITORY / "README.md")
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(block, "README.md", "exec")
        for names in re.findall(r"from wsi_stain import (.*)", block):
            assert {name.strip() for name in names.split(",")} <= set(wsi_stain.__all__)
    assert len(wsi_stain.__all__) == 6
    for name in wsi_stain.__all__:
        assert callable(getattr(wsi_stain, name))
