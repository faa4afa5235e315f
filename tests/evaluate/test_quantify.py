"""Whole pictures measured: block by block as in one piece, planted stain found, files true."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from wsi_stain.config import QuantifyConfig, WriteConfig
from wsi_stain.errors import NoTissueError, OutputError
from wsi_stain.evaluate import cells
from wsi_stain.evaluate.cells import CellTable, measure_cells
from wsi_stain.evaluate.ground import find_ground
from wsi_stain.evaluate.metrics_nuclei import find_nuclei, stain_densities
from wsi_stain.evaluate.metrics_stain import dab_values
from wsi_stain.evaluate.quantify import Numbers, measured_folder
from wsi_stain.evaluate.quantify_files import quantify, read_numbers
from wsi_stain.evaluate.report import write_report
from wsi_stain.geometry import Size
from wsi_stain.manifest import Event
from wsi_stain.slides.image import SlideSource
from wsi_stain.write.tiff import write_pyramid
from wsi_stain.write.validate import validate

MakeRun = Callable[..., Path]
Pixels = npt.NDArray[np.uint8]
WHITE = (243.0, 243.0, 244.0)
CONFIG = QuantifyConfig()


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory, make_run: MakeRun) -> Path:
    return make_run(tmp_path_factory.mktemp("out")).with_name("S-1_ki67.ome.tiff")


@pytest.fixture(scope="module")
def measured(picture: Path) -> tuple[Numbers, Path]:
    return quantify(picture)


def features(folder: Path, kind: str) -> list[dict[str, Any]]:
    data = json.loads((folder / "S-1_ki67.geojson").read_text("utf-8"))
    return [f for f in data["features"] if f["properties"]["objectType"] == kind]


def lines(table: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(table.read_text("utf-8").splitlines()))


def test_numbers_equal_one_look_at_the_whole(picture: Path, measured: tuple[Numbers, Path]) -> None:
    numbers, _ = measured
    with SlideSource.open(picture) as source:
        ground = find_ground(source, CONFIG)
        pixels = source.thumbnail(source.mpp_l0)
    assert (ground.tissue_origin, ground.white) == ("H&E of the run", WHITE)
    height_px, width_px = pixels.shape[:2]
    rows = np.minimum((np.arange(height_px) + 0.5) / ground.mask.downsample, 1e9).astype(int)
    columns = ((np.arange(width_px) + 0.5) / ground.mask.downsample).astype(int)
    tissue = ground.mask.pixels[np.ix_(rows, columns)]
    positive = tissue & (stain_densities(pixels, WHITE)[..., 1] > 0.15)
    nuclei = find_nuclei(pixels, numbers.mpp, WHITE)
    inside = tissue[nuclei.xy_px[:, 1], nuclei.xy_px[:, 0]]
    assert numbers.tissue_mm2 == pytest.approx(tissue.sum() * (numbers.mpp / 1e3) ** 2)
    assert numbers.positive_area_percent == pytest.approx(100 * positive.sum() / tissue.sum())
    assert numbers.iod_exact == pytest.approx(dab_values(pixels)[tissue].sum(), rel=1e-5)
    assert numbers.iod_imagej == pytest.approx(dab_values(pixels, "imagej")[tissue].sum(), rel=1e-5)
    assert numbers.n_nuclei == pytest.approx(inside.sum(), abs=2)
    assert numbers.n_positive == pytest.approx((nuclei.dab_od[inside] > 0.15).sum(), abs=2)
    assert numbers.labelling_percent is not None
    assert 5.0 < numbers.labelling_percent < 95.0


def test_numbers_do_not_depend_on_the_blocks(
    picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = []
    for block_px in (10_000, 256):
        monkeypatch.setattr(cells, "BLOCK_PX", block_px)
        with SlideSource.open(picture) as source:
            tables.append(measure_cells(source, find_ground(source, CONFIG), CONFIG)[0])
    whole, parts = tables
    for name in ("tissue_px", "positive_px", "iod", "iod_imagej"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-6)
    assert np.abs(parts.nuclei - whole.nuclei).sum() <= 0.01 * whole.nuclei.sum()


def test_half_of_the_picture_is_hot(measured: tuple[Numbers, Path]) -> None:
    # The fixture's nuclei are brown on the left quarter only.
    numbers, folder = measured
    rows = lines(folder / "tiles.csv")
    left = [float(r["positive_area_percent"]) for r in rows if int(r["x_px"]) + 256 <= 350]
    right = [float(r["positive_area_percent"]) for r in rows if int(r["x_px"]) >= 351]
    assert min(left) > 2.0
    assert max(right) < 0.2
    spot = numbers.hot_spot
    assert spot is not None
    assert spot.center_xy_um[0] < 0.4 * 1403 * numbers.mpp
    assert spot.area_mm2 < 0.3
    assert "no circle of 1 mm2" in numbers.hot_spot_note


def test_tables_add_up_to_the_whole(measured: tuple[Numbers, Path]) -> None:
    numbers, folder = measured
    rows = lines(folder / "tiles.csv")
    assert sum(int(r["n_nuclei"]) for r in rows) == numbers.n_nuclei
    assert sum(int(r["n_positive"]) for r in rows) == numbers.n_positive
    total = sum(float(r["tissue_mm2"]) for r in rows)
    assert total == pytest.approx(numbers.tissue_mm2, rel=1e-3)
    [line] = lines(folder / "numbers.csv")
    assert float(line["labelling_percent"]) == numbers.labelling_percent
    assert numbers.hot_spot is not None
    assert float(line["hot_spot_area_mm2"]) == numbers.hot_spot.area_mm2
    again = msgspec.json.decode((folder / "numbers.json").read_bytes(), type=Numbers)
    assert again == numbers


def test_objects_lie_on_the_picture(picture: Path, measured: tuple[Numbers, Path]) -> None:
    numbers, folder = measured
    tiles, positives = features(folder, "tile"), features(folder, "detection")
    annotations = features(folder, "annotation")
    assert sum(t["properties"]["measurements"]["Num nuclei"] for t in tiles) == numbers.n_nuclei
    assert {a["properties"]["classification"]["name"] for a in annotations} == {
        "Tissue",
        "Hot spot",
    }
    tissue_um2 = sum(
        a["properties"]["measurements"]["Area um^2"]
        for a in annotations
        if a["properties"]["classification"]["name"] == "Tissue"
    )
    assert tissue_um2 / 1e6 == pytest.approx(numbers.tissue_mm2, rel=0.02)
    assert len(positives) > 20
    for feature in (*tiles, *positives, *annotations):
        for ring in feature["geometry"]["coordinates"]:
            points = np.asarray(ring)
            assert np.array_equal(points[0], points[-1])
            assert points.min() >= 0
            assert (points <= (1403, 1101)).all()
    right = max(np.asarray(f["geometry"]["coordinates"][0])[:, 0].max() for f in positives)
    assert right < 1403 // 4 + 8


def test_heat_map_is_a_sound_pyramid_on_the_slide(measured: tuple[Numbers, Path]) -> None:
    numbers, folder = measured
    found = validate(folder / "heat.ome.tiff")
    assert found.ok, found.problems
    with SlideSource.open(folder / "heat.ome.tiff") as heat:
        assert heat.size_l0.width_px * heat.mpp_l0 == pytest.approx(1403 * numbers.mpp, abs=130)
        tile = heat.thumbnail(heat.mpp_l0)[16::32, 16::32]
    assert (np.ptp(tile.astype(int), axis=-1) > 30).sum() > 3


def test_uncertainty_moves_the_index(
    tmp_path: Path, make_run: MakeRun, measured: tuple[Numbers, Path]
) -> None:
    picture = make_run(tmp_path).with_name("S-1_ki67.ome.tiff")
    grey = np.zeros((1101, 1403, 3), np.uint8)
    grey[:, :701] = 20  # sd of 0.1 on the left half
    write_pyramid(
        tmp_path / "S-1_ki67_uncertainty.ome.tiff",
        Size(1403, 1101),
        [grey],
        0.5,
        WriteConfig(lossless=True),
        name="sd",
    )
    numbers, folder = quantify(picture)
    plain = measured[0]
    assert plain.mean_dab_sd is None
    assert "--seeds" in plain.uncertainty_note
    assert numbers.labelling_percent == plain.labelling_percent
    assert numbers.labelling_low_percent is not None
    assert numbers.labelling_high_percent is not None
    assert numbers.labelling_low_percent < numbers.labelling_percent  # type: ignore[operator]
    assert numbers.labelling_high_percent > numbers.labelling_percent  # type: ignore[operator]
    assert numbers.mean_dab_sd is not None
    assert 0.02 < numbers.mean_dab_sd < 0.08
    sds = {
        t["properties"]["measurements"]["DAB OD sd over seeds"] for t in features(folder, "tile")
    }
    assert {0.0, 0.1} <= sds
    page = write_report(picture).read_text("utf-8")
    assert 'id="show-spread"' in page
    assert 'id="show-spot"' in page
    assert f"{numbers.n_positive:,} of {numbers.n_nuclei:,} nuclei" in page


def test_flagged_tiles_are_shown(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path)
    table = run / "tiles.csv"
    head = "tile,x_px_out,y_px_out,size_px,structure,dab_sd,flags\n"
    table.write_text(head + "0,256,256,256,0.1,,structure\n1,512,256,256,0.9,0.1,\n")
    _, folder = quantify(run.with_name("S-1_ki67.ome.tiff"))
    flagged = [f["properties"] for f in features(folder, "annotation") if "Flagged" in str(f)]
    [tile] = flagged
    assert tile["name"] == "Tile 0: structure"
    assert tile["measurements"] == {"Left um": 128.0, "Top um": 128.0, "Structure kept": 0.1}
    assert "[256, 256, 256, 256]" in write_report(run).read_text("utf-8")
    table.write_text(head + "0,256,oops,256,0.1,,structure\n")
    with pytest.raises(OutputError, match=r"tiles\.csv, line 2, cannot be read"):
        quantify(run.with_name("S-1_ki67.ome.tiff"))


def test_numbers_of_another_picture_are_not_taken(
    picture: Path, measured: tuple[Numbers, Path]
) -> None:
    numbers, folder = measured
    assert folder == measured_folder(picture)
    assert read_numbers(picture, numbers.digest) == numbers
    assert numbers.picture_bytes == picture.stat().st_size
    assert read_numbers(picture, "0" * 64) is None
    assert read_numbers(picture.with_name("other.ome.tiff"), numbers.digest) is None


def test_damaged_numbers_are_named(tmp_path: Path) -> None:
    picture = tmp_path / "a.ome.tiff"
    measured_folder(picture).mkdir()
    (measured_folder(picture) / "numbers.json").write_text("{}")
    with pytest.raises(OutputError, match=r"numbers\.json cannot be read"):
        read_numbers(picture, "")


def test_coarse_pixels_are_measured_without_nuclei(picture: Path, tmp_path: Path) -> None:
    numbers, folder = quantify(picture, tmp_path, config=QuantifyConfig(mpp=1.0))
    assert (numbers.n_nuclei, numbers.labelling_percent, numbers.hot_spot) == (None, None, None)
    assert "too large to see nuclei" in numbers.nuclei_error
    assert numbers.positive_area_percent > 0
    rows = lines(folder / "tiles.csv")
    assert {row["n_nuclei"] for row in rows} == {""}


def test_picture_as_scanned_at_ten_fold_is_not_enlarged_to_see_nuclei(
    synthetic_slide: Path, tmp_path: Path
) -> None:
    with SlideSource.open(synthetic_slide, mpp=1.0) as source:
        ground = find_ground(source, CONFIG)
        assert (ground.scale.factor, ground.detail_um) == (1.0, 1.0)
        table, _ = measure_cells(source, ground, CONFIG)
    assert table.totals()["nuclei"] == 0
    assert table.totals()["tissue_px"] > 0


def test_nuclei_of_an_enlarged_he_are_not_counted(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path, slide_mpp=1.0)
    numbers, _ = quantify(run.with_name("S-1_ki67.ome.tiff"))
    assert (numbers.measured_mpp, numbers.n_nuclei) == (0.5, None)
    assert numbers.nuclei_error == "Not counted: pixels of 1 um are too large to see nuclei."
    page = write_report(run).read_text("utf-8")
    assert "Not counted: pixels of 1 um are too large to see nuclei." in page


def test_scan_is_no_virtual_picture_though_a_run_of_its_name_lies_beside(
    picture: Path, synthetic_slide: Path, tmp_path: Path
) -> None:
    scan = picture.with_name("S-1_ki67.tiff")
    shutil.copy(synthetic_slide, scan)
    try:
        numbers, folder = quantify(scan)
        assert numbers.statement == "as scanned"
        assert numbers.tissue_origin == "this picture"
        assert folder.name == "S-1_ki67_tiff_quantify"
        assert numbers.doubts[0].startswith("Is this picture an IHC?")
        assert numbers.facts()["doubt"] == numbers.doubts[0]
    finally:
        scan.unlink()


def test_he_in_place_of_its_virtual_stain_is_doubted(
    picture: Path, synthetic_slide: Path, tmp_path: Path
) -> None:
    def said(path: Path, folder: str) -> list[str]:
        heard = list[Event]()
        quantify(path, tmp_path / folder, listener=heard.append)
        return [event.text for event in heard if event.kind == "note"]

    (doubt,) = said(synthetic_slide, "he")
    assert doubt.startswith("Is this picture an IHC?")
    assert said(picture, "ihc") == []


def test_glass_alone_is_an_error(tmp_path: Path, write_slide: Callable[..., Path]) -> None:
    glass = write_slide(tmp_path / "glass.tiff", np.full((400, 500, 3), 243, np.uint8), 0.5)
    with pytest.raises(NoTissueError, match="No tissue found"):
        quantify(glass, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_picture_of_another_size_than_its_run_is_refused(tmp_path: Path, make_run: MakeRun) -> None:
    picture = make_run(tmp_path).with_name("S-1_ki67.ome.tiff")
    pixels = np.full((600, 600, 3), 200, np.uint8)
    overwrite = WriteConfig(overwrite=True)
    write_pyramid(picture, Size(600, 600), [pixels], 0.5, overwrite, name="x")
    with pytest.raises(OutputError, match="the run beside it made"):
        quantify(picture)


def test_coarse_table_sums_squares() -> None:
    table = CellTable.empty(5, 7)
    table.nuclei[:] = 1
    np.testing.assert_array_equal(table.coarse(4).nuclei, [[16, 12], [4, 3]])


@pytest.mark.slide
def test_two_scans_of_one_ki67_field_agree(shared_data: Path, tmp_path: Path) -> None:
    found = [
        quantify(shared_data / "slides" / f"OS-2-{kind}.ome.tif", tmp_path / kind)[0]
        for kind in ("ndpi", "vsi")
    ]
    first, second = (numbers.labelling_percent for numbers in found)
    assert first is not None
    assert second is not None
    assert 10.0 < first < 25.0
    assert math.isclose(first, second, abs_tol=3.0)
    assert found[0].statement == "as scanned"
    assert found[0].uncertainty_note == "A real stain: no seeds."
    assert found[0].tissue_mm2 == pytest.approx(found[1].tissue_mm2, rel=0.05)
