"""Every example runs, and stays short."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

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


def test_normalize_patch_shows_both_and_names_the_stains(
    tmp_path: Path, synthetic_slide: Path
) -> None:
    (line,) = run("normalize_patch.py", synthetic_slide, tmp_path / "patch.png")
    assert line.startswith("stains (OD): [")
    both = np.asarray(Image.open(tmp_path / "patch.png"))
    assert both.shape == (512, 1024, 3)
    assert not np.array_equal(both[:, :512], both[:, 512:])


def test_translate_array_gives_an_array_of_the_same_size(
    tmp_path: Path, he_pixels: npt.NDArray[np.uint8]
) -> None:
    bundle = tmp_path / "identity"
    save_nets(bundle, BundleSpec(name="identity", marker="Test", start_image="source"), {})
    he = he_pixels[200:800, 100:800]
    Image.fromarray(he).save(tmp_path / "he.png")
    out = tmp_path / "ihc.png"
    assert run("translate_array.py", tmp_path / "he.png", out, bundle) == ["(600, 700, 3)"]
    seen = np.asarray(Image.open(out))
    stained = he.min(axis=2) < 200  # glass gets the output's white
    assert np.abs(seen[stained].astype(float) - he[stained]).mean() < 8


def test_add_guidance_changes_what_the_term_is_about() -> None:
    lines = run("add_guidance.py")
    off = [float(line.split(" by ")[1].split()[0]) for line in lines]
    assert off[1] < off[0]


def test_compare_real_prints_a_row_per_slide(synthetic_slide: Path) -> None:
    lines = run("compare_real.py", synthetic_slide, synthetic_slide)
    assert len(lines) == 3
    assert lines[1] == lines[2]
    assert len(lines[1].split()) == 4


def test_side_by_side_shows_both_slides(tmp_path: Path, synthetic_slide: Path) -> None:
    out = tmp_path / "both.png"
    run("side_by_side.py", synthetic_slide, synthetic_slide, out)
    with Image.open(out) as both:
        assert both.size == (2 * 176 + 16, 138)


def test_capacity_plan_is_computed_from_its_inputs() -> None:
    def plan(*numbers: int) -> dict[str, float]:
        lines = [line.rsplit(maxsplit=1) for line in run("capacity_plan.py", *numbers)]
        return {name: float(value) for name, value in lines}

    one, half = plan(10_000, 100), plan(10_000, 50)
    assert one == plan()
    assert half["days"] == pytest.approx(2 * one["days"], rel=0.02)
    assert half["GPU hours"] == one["GPU hours"]
    assert one["GPU hours"] == pytest.approx(24 * 100 * one["days"], rel=0.02)
    # 200 mm2 in squares of 112 um; 40 evaluations of 0.5 ms; a tenth of the time is lost.
    hours = 10_000 * 200 / 0.112**2 * 40 * 0.0005 / 0.9 / 3600
    assert one["GPU hours"] == pytest.approx(hours, rel=0.001)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_example_is_short_and_tested(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    assert f'run("{path.name}"' in Path(__file__).read_text(encoding="utf-8")
