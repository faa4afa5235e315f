"""What is kept of the H&E: small, true, enough."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_stain.errors import OutputError
from wsi_stain.geometry import Region, Scale, Size, choose_scale
from wsi_stain.slides.image import SlideSource
from wsi_stain.slides.mask import TissueMask
from wsi_stain.slides.tissue import find_tissue
from wsi_stain.write.overview import (
    FIELD_PX,
    MOST_FIELDS,
    OVERVIEW_MAX_PX,
    HeFolder,
    HeRecord,
    choose_fields,
    choose_reduction,
    keep_he,
)

MASK_MPP = 8.0


@pytest.fixture
def source(synthetic_slide: Path) -> Iterator[SlideSource]:
    with SlideSource.open(synthetic_slide) as opened:
        yield opened


def mask_of(source: SlideSource) -> TissueMask:
    thumbnail = source.thumbnail(MASK_MPP)
    return find_tissue(thumbnail, mpp=MASK_MPP, downsample=MASK_MPP / source.mpp_l0)


def keep(source: SlideSource, folder: Path, mpp_model: float = 0.5) -> tuple[HeRecord, Scale]:
    scale = choose_scale(source.size_l0, source.mpp_l0, mpp_model, 0.1)
    return keep_he(source, scale, mask_of(source), folder, marker="Ki-67"), scale


def test_kept_pixels_are_the_slides_when_read_back(source: SlideSource, tmp_path: Path) -> None:
    record, scale = keep(source, tmp_path / "he")
    kept = HeFolder(tmp_path / "he")
    assert kept.record() == record
    assert record.size_out == source.size_l0
    assert record.mask_step == 16.0
    for number, region in enumerate(record.fields):
        np.testing.assert_array_equal(kept.field(number), source.read_out(region, scale))
    np.testing.assert_array_equal(kept.tissue(), mask_of(source).pixels)
    whole = source.read_out(Region(0, 0, *scale.size_out), scale)
    difference = np.abs(kept.overview().astype(np.int16) - whole)
    assert difference.mean() < 2.0


def test_overview_covers_the_out_frame_when_scale_is_a_fraction(
    source: SlideSource, tmp_path: Path
) -> None:
    record, scale = keep(source, tmp_path / "he", mpp_model=0.73)
    assert scale.factor == pytest.approx(1.46, abs=0.01)
    height_px, width_px = HeFolder(tmp_path / "he").overview().shape[:2]
    assert (width_px, height_px) == record.size_out == scale.size_out


def test_nothing_is_written_again_when_kept_already(source: SlideSource, tmp_path: Path) -> None:
    keep(source, tmp_path / "he")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "he").iterdir()}
    keep(source, tmp_path / "he")
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "he").iterdir()} == before
    (tmp_path / "he/record.json").write_text("{}")
    record, _ = keep(source, tmp_path / "he")
    assert HeFolder(tmp_path / "he").record() == record


@pytest.mark.parametrize("damage", ["record.json", "overview.jpg", "tissue.png", "field_00.png"])
def test_damage_is_an_error_when_read(source: SlideSource, tmp_path: Path, damage: str) -> None:
    keep(source, tmp_path)
    (tmp_path / damage).write_bytes(b"no such thing")
    kept = HeFolder(tmp_path)
    with pytest.raises(OutputError, match=damage.replace(".", r"\.")) as caught:
        _ = kept.record(), kept.overview(), kept.tissue(), kept.field(0)
    assert "--slide" in caught.value.hint


@given(st.integers(1, 400_000), st.integers(1, 400_000))
def test_reduction_is_the_least_that_fits_when_chosen(width_px: int, height_px: int) -> None:
    def fits(reduction: int) -> bool:
        area_px = math.ceil(width_px / reduction) * math.ceil(height_px / reduction)
        return area_px <= OVERVIEW_MAX_PX and max(width_px, height_px) <= 32_768 * reduction

    reduction = choose_reduction(Size(width_px, height_px))
    assert fits(reduction)
    assert reduction == 1 or not fits(reduction // 2)


def test_fields_lie_in_tissue_when_there_is_enough() -> None:
    pixels = np.zeros((400, 500), bool)
    pixels[100:300, 50:450] = True  # at 16 out px per mask px: x 800 to 7200, y 1600 to 4800
    mask = TissueMask(pixels, mpp=8.0, downsample=16.0)
    fields = choose_fields(Scale(1.0, 0.5, Size(8000, 6400)), mask)
    assert len(fields) == MOST_FIELDS == len(set(fields))
    assert all(field.size == (FIELD_PX, FIELD_PX) for field in fields)
    assert min(mask.fraction(field) for field in fields) >= 0.5
    assert min(field.x_px for field in fields) < 1500 < 6000 < max(f.x_px for f in fields)
    assert min(field.y_px for field in fields) < 2100 < 4000 < max(f.y_px for f in fields)


@pytest.mark.parametrize("size", [Size(300, 200), Size(512, 3000), Size(5000, 100)])
def test_fields_are_inside_when_picture_or_tissue_is_small(size: Size) -> None:
    pixels = np.zeros((-(-size.height_px // 16), -(-size.width_px // 16)), bool)
    pixels[0, 0] = True
    fields = choose_fields(Scale(1.0, 0.5, size), TissueMask(pixels, mpp=8.0, downsample=16.0))
    assert len(fields) == 1
    assert fields[0] == Region(0, 0, min(512, size.width_px), min(512, size.height_px))
