"""The command line: every verb, one good run, each documented exit code."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pytest
from click.shell_completion import ShellComplete

from wsi_stain import verbs
from wsi_stain.cli import SECTIONS, cli, main
from wsi_stain.config import BundleSpec
from wsi_stain.files import sha256_any, size_bytes
from wsi_stain.manifest import RunManifest
from wsi_stain.translate.bundle import save_nets

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Give the function that runs a command line: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["wsi-stain", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="module")
def identity_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundle without nets: fast, and the picture stays."""
    folder = tmp_path_factory.mktemp("bundles") / "identity"
    save_nets(folder, BundleSpec(name="identity", marker="Test", start_image="source"), {})
    return folder


def test_every_verb_has_a_section_and_a_help(run: Run) -> None:
    listed = [name for names in SECTIONS.values() for name in names]
    modules = {path.stem for path in Path(verbs.__file__).parent.glob("*.py")}
    assert sorted(listed) == sorted(modules - {"__init__", "options"})
    code, out, _ = run("--help")
    assert code == 0
    for name in listed:
        assert f"  {name} " in out
        code, text, _ = run(name, "--help")
        assert code == 0
        assert text.startswith("Usage: wsi-stain")


@pytest.mark.parametrize("name", [name for names in SECTIONS.values() for name in names])
def test_help_of_a_verb_is_short_and_its_examples_can_be_typed(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert not command.get_short_help_str(60).endswith("...")
    lines = (command.help or "").splitlines()
    examples = [line.strip() for line in lines if line.strip().startswith(f"wsi-stain {name}")]
    assert examples
    for example in examples:
        words = shlex.split(re.split(r" >>? ", example)[0])[2:]
        command.make_context(name, words)  # click refuses unknown flags and missing arguments


def test_help_of_translate_lists_flags_by_what_they_are_about(run: Run) -> None:
    _, out, _ = run("translate", "--help")
    headings = [line for line in out.splitlines() if re.fullmatch(r"[A-Z][a-z ]+:", line)]
    assert headings == ["Slide and tiles:", "Model:", "Output:", "Machine:", "More:"]
    command = cli.get_command(click.Context(cli), "translate")
    assert command is not None
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert f"  {parameter.opts[0]}" in out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_of_the_shell(run: Run, tmp_path: Path, shell: str) -> None:
    code, out, _ = run("completion", shell)
    assert code == 0
    assert "_WSI_STAIN_COMPLETE" in out
    if shell == "bash":
        script = tmp_path / "complete.sh"
        script.write_text(out)
        bash = shutil.which("bash")
        assert bash is not None
        subprocess.run([bash, "-n", script], check=True)


def test_completion_offers_verbs_and_flags() -> None:
    found = ShellComplete(cli, {}, "wsi-stain", "_WSI_STAIN_COMPLETE")
    assert "translate" in [item.value for item in found.get_completions([], "tr")]
    flags = [item.value for item in found.get_completions(["translate"], "--o")]
    assert flags == ["--out", "--overlap-px", "--overwrite"]
    formats = [item.value for item in found.get_completions(["translate", "--format"], "")]
    assert formats == ["ome-tiff", "ome-zarr"]


def test_ome_zarr_is_made_validated_and_reported(
    run: Run,
    tmp_path: Path,
    identity_bundle: Path,
    synthetic_slide: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('[cluster]\nexecutor = "serial"\n')
    flags = ["--bundle", identity_bundle, "--recipe", recipe, "--format", "ome-zarr"]
    code, out, err = run("translate", synthetic_slide, "--out", tmp_path / "out", *flags)
    assert code == 0
    assert err.splitlines()[1].startswith("slide  generic-tiff, 1403 x 1101 px")
    output = tmp_path / "out" / "synthetic_test.ome.zarr"
    page = tmp_path / "out" / "synthetic_test.run" / "report" / "index.html"
    assert page.is_file()
    assert f"report       {page}" in out
    assert f"next         wsi-stain quantify {output}" in out
    assert run("validate", output)[0] == 0
    assert run("report", output)[0] == 0
    shown: list[str] = []
    monkeypatch.setattr(click, "launch", shown.append)
    monkeypatch.chdir(tmp_path)
    assert run("report", "out/synthetic_test.run", "--open")[0] == 0
    assert shown == [page.resolve().as_uri()]
    (record,) = RunManifest.load(
        output.with_name("synthetic_test.run") / "manifest.json"
    ).content.outputs
    assert (record.name, record.bytes, record.sha256) == (
        output.name,
        size_bytes(output),
        sha256_any(output),
    )
    (output / "0" / "c" / "0" / "0" / "0").unlink()
    code, _, err = run("validate", output)
    assert code == 8
    assert "shard 0/0/0 is missing" in err


def test_translate_validate_and_plan_agree(
    run: Run, tmp_path: Path, identity_bundle: Path, synthetic_slide: Path
) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('[cluster]\nexecutor = "serial"\n')
    flags = ["--bundle", identity_bundle, "--recipe", recipe, "--json"]
    code, out, _ = run("plan", synthetic_slide, *flags)
    assert code == 0
    planned = json.loads(out)
    place = ("--out", tmp_path / "out", "--no-report")
    code, out, err = run("translate", synthetic_slide, *place, *flags)
    assert (code, err) == (0, "")
    made = json.loads(out)
    assert not (Path(made["run folder"]) / "report").exists()
    assert made["size"] == planned["output size"]
    code, out, _ = run("validate", made["output"], "--json")
    assert code == 0
    assert json.loads(out)["ok"] is True
    code, out, err = run("translate", synthetic_slide, "--out", tmp_path / "out", *flags)
    assert code == 8
    assert "--overwrite" in err


def test_plain_output_is_aligned_lines(run: Run, synthetic_slide: Path) -> None:
    code, out, _ = run("info", synthetic_slide)
    assert code == 0
    assert "1403 x 1101 px" in out
    assert "pixel size from" in out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["info", "{tmp}/none.svs"], 3, "none.svs"),
        (["plan", "{tmp}/text.svs", "--bundle", "{bundle}"], 3, "text.svs"),
        (["plan", "{glass}", "--bundle", "{bundle}"], 4, "tissue"),
        (["plan", "{glass}", "--bundle", "none"], 6, "No bundle none"),
        (["plan", "{glass}", "--bundle", "{bundle}", "--mpp", "0.001"], 2, "mpp"),
        (["plan", "{glass}", "--recipe", "{tmp}/none.toml"], 2, "none.toml"),
        (["plan", "{no_mpp}", "--bundle", "{bundle}"], 3, "--mpp"),
        (["validate", "{tmp}/text.svs"], 8, "not sound"),
        (["validate", "{tmp}/none.tiff"], 8, "there is no such file. Give a pyramid"),
        (["validate", "{tmp}"], 8, "no zarr.json"),
        (["report", "{tmp}"], 8, "run"),
        (["translate"], 2, "Missing argument"),
        (["translate", "{glass}", "--format", "ome-zarr", "--lossless"], 2, "always lossless"),
        (["translate", "{glass}", "--quality", "80", "--lossless"], 2, "--quality is for JPEG"),
        (["plan", "{glass}", "--recipe", "{tmp}/flat.toml"], 2, "`overlap_px` under [tiles]?"),
        (["plan", "{glass}", "--recipe", "{tmp}/near.toml"], 2, "Did you mean `overlap_px`?"),
        (["validate", "{glass}"], 8, "wsi-stain info shows any slide"),
        (["train", "score", "--recipe", "r", "--run", "r", "--samples", "-1"], 2, "--samples"),
        (["distill", "--recipe", "r", "--run", "r", "--bundle", "b", "--samples", "0"], 2, "x>=1"),
        (["train", "score", "--recipe", "{tmp}/none.toml", "--run", "{tmp}/r"], 2, "none.toml"),
        (["unknown"], 2, "No such command"),
        (["transalte"], 2, "Did you mean translate?"),
        (["plan", "x.svs", "--mpp", "300"], 2, "That is slide.mpp in a recipe, and the flag --mpp"),
    ],
)
def test_error_is_one_line_and_its_own_code(
    run: Run,
    tmp_path: Path,
    identity_bundle: Path,
    write_slide: Callable[..., Path],
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    (tmp_path / "text.svs").write_text("this is no slide")
    (tmp_path / "flat.toml").write_text("overlap = 32\n")
    (tmp_path / "near.toml").write_text("[tiles]\noverlap = 32\n")
    white = np.full((400, 500, 3), 243, np.uint8)
    glass = write_slide(tmp_path / "glass.tiff", white, 0.5)
    no_mpp = write_slide(tmp_path / "no_mpp.tiff", white, None)
    names = {"tmp": tmp_path, "bundle": identity_bundle, "glass": glass, "no_mpp": no_mpp}
    found, _, err = run(*[argument.format(**names) for argument in arguments])
    assert found == code, err
    assert words in err
    assert "Traceback" not in err
    if code != 2:
        assert err.count("\n") == 1


def test_every_error_class_has_the_documented_code(run: Run) -> None:
    import wsi_stain.errors as errors  # noqa: PLC0415 - the module itself is what is tested

    codes = {
        name: getattr(errors, name).exit_code for name in errors.__all__ if name.endswith("Error")
    }
    assert sorted(set(codes.values())) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert all(issubclass(getattr(errors, name), errors.WsiStainError) for name in codes)


def test_doctor_and_versions_name_the_packages(run: Run) -> None:
    code, out, _ = run("doctor", "--json")
    facts = json.loads(out)
    assert code == (0 if facts["ok"] else 7)
    assert facts["versions"]["zarr"] != "missing"
    code, out, _ = run("doctor")
    assert code == (0 if facts["ok"] else 7)
    assert ("Nothing is wrong with this machine." in out) == facts["ok"]
    code, out, _ = run("--versions")
    assert code == 0
    assert "openslide-bin" in out
