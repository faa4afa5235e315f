"""The documents are true: verbs, flags, targets, exit codes, links, recipes they name."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from wsi_stain.bundles import list_bundles
from wsi_stain.cli import cli

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
