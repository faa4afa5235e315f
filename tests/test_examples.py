"""Every example runs, and stays short."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from wsi_stain.config import BundleSpec
from wsi_stain.translate.bundle import save_nets
from wsi_stain.write.validate import validate

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, *arguments: object) -> list[str]:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_one_slide_makes_a_sound_pyramid(tmp_path: Path, synthetic_slide: Path) -> None:
    bundle = tmp_path / "identity"
    save_nets(bundle, BundleSpec(name="identity", marker="Test", start_image="source"), {})
    lines = run("one_slide.py", synthetic_slide, tmp_path / "out", bundle)
    assert validate(Path(lines[-1])).ok


def test_plan_only_tells_tiles_and_time(synthetic_slide: Path) -> None:
    lines = run("plan_only.py", synthetic_slide)
    assert lines[0].endswith("shards")
    assert "minutes" in lines[1]


def test_write_pyramid_lists_its_levels(tmp_path: Path) -> None:
    out = tmp_path / "ramp.ome.tiff"
    assert run("write_pyramid.py", out) == ["3000 x 2000", "1500 x 1000", "750 x 500"]
    assert validate(out).ok


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_example_is_short_and_tested(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    assert f'run("{path.name}"' in Path(__file__).read_text(encoding="utf-8")
