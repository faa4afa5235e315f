"""Tables: means, intervals, paired differences and set-wide numbers from planted rows."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wsi_stain.errors import OutputError
from wsi_stain.evaluate.rows import Row, append_row, picture_path, read_rows, write_rows
from wsi_stain.evaluate.scores import MAKING, PAIRED, UNPAIRED
from wsi_stain.evaluate.sheet import GAP_PX, HEAD_PX, draw_sheet, read_picture, write_picture
from wsi_stain.evaluate.table import Cell, cells, scopes, table_csv, table_markdown


def row(method: str, image: str, slide: str, scores: dict[str, Any], paired: bool = False) -> Row:
    names = [*UNPAIRED, *MAKING]
    if paired:
        names += [*PAIRED, *(f"ref_{name}" for name in UNPAIRED)]
    return Row(
        key=f"{method} {image}",
        method=method,
        kind="variant",
        group=image.split("/")[0],
        image=image,
        slide=slide,
        paired=paired,
        aligned=False,
        metric_version=1,
        mpp=0.5,
        width_px=8,
        height_px=8,
        bundle={"name": "b", "digest": "d"},
        digests=("x",),
        settings={},
        whites={},
        seconds=1.0,
        peak_memory_mb=1.0,
        scores=dict.fromkeys(names) | scores,
    )


def find(table: list[Cell], scope: str, method: str, metric: str) -> Cell:
    (cell,) = [c for c in table if (c.scope, c.method, c.metric) == (scope, method, metric)]
    return cell


@pytest.fixture
def ten() -> list[Row]:
    """Two methods on ten images of five slides; the second is better by 0.1 on each."""
    base = [row("a", f"g/{i}", f"s{i // 2}", {"sobel_ssim": 0.05 * i}) for i in range(10)]
    better = [row("b", r.image, r.slide, {"sobel_ssim": r.scores["sobel_ssim"]}) for r in base]
    for r in better:
        r.scores["sobel_ssim"] = (r.scores["sobel_ssim"] or 0.0) + 0.1
    return base + better


def test_mean_and_interval_stand_for_images_and_slides(ten: list[Row], tmp_path: Path) -> None:
    (scope,) = scopes(ten)
    cell = find(cells(scope, tmp_path, 0), "all", "a", "sobel_ssim")
    assert cell.value.mean == pytest.approx(0.225)
    assert (cell.value.n_images, cell.value.n_groups) == (10, 5)
    assert cell.value.low is not None
    assert cell.value.high is not None
    assert cell.value.low < 0.225 < cell.value.high
    assert cell.difference is None, "the first variant is what others are compared with"


def test_difference_is_paired_so_equal_gains_have_no_spread(ten: list[Row], tmp_path: Path) -> None:
    change = find(cells(scopes(ten)[0], tmp_path, 0), "all", "b", "sobel_ssim").difference
    assert change is not None
    assert change[:3] == pytest.approx((0.1, 0.1, 0.1))


def test_under_five_slides_give_no_interval(tmp_path: Path) -> None:
    rows = [row("a", f"g/{i}", f"s{i}", {"miod": 1.0}) for i in range(4)]
    cell = find(cells(scopes(rows)[0], tmp_path, 0), "all", "a", "miod")
    assert cell.value == (1.0, None, None, 4, 4)


def test_missing_values_are_left_out_and_counted(ten: list[Row], tmp_path: Path) -> None:
    ten[0].scores["sobel_ssim"] = None
    table = cells(scopes(ten)[0], tmp_path, 0)
    assert find(table, "all", "a", "sobel_ssim").value.n_images == 9
    change = find(table, "all", "b", "sobel_ssim").difference
    assert change is not None
    assert change.n_images == 9
    assert not [c for c in table if c.metric == "hue_deg"], "no image has one"


def pair_rows(out: Path, n: int) -> list[Row]:
    rows = []
    for i in range(n):
        scores = {"iod": 3.0, "ref_iod": 2.0, "dab_p90": 0.1 * i, "ref_dab_p90": 0.1 * i + 0.2}
        rows.append(row("a", f"p/{i}", f"s{i}", scores | {"ssim": 0.5}, paired=True))
        for name, level in (("a", 100), ("reference", 100), ("he", 50)):
            picture = np.full((8, 8, 3), level, np.uint8)
            write_picture(picture_path(out, f"p/{i}", name), picture)
    return rows


def test_set_wide_numbers_follow_their_definitions(tmp_path: Path) -> None:
    table = cells(scopes(pair_rows(tmp_path, 5))[1], tmp_path, 0)
    value = {c.metric: c.value.mean for c in table}
    assert value["iod_deviation_percent"] == pytest.approx(50.0)
    assert value["dab_p90_mae"] == pytest.approx(0.2)
    assert value["dab_p90_r"] == pytest.approx(1.0)
    assert value["hist_pooled"] == pytest.approx(1.0)
    assert value["dab_kl"] == pytest.approx(0.0, abs=1e-6)


def test_a_set_is_compared_with_the_real_stain_without_pairs(tmp_path: Path) -> None:
    rows = pair_rows(tmp_path, 2)
    for method, level in (("a", 100), ("b", 180)):
        for i in range(2):
            picture = np.full((8, 8, 3), level, np.uint8)
            write_picture(picture_path(tmp_path, f"p/{i}", method), picture)
    rows += [row("b", f"p/{i}", f"s{i}", {}) for i in range(2)]
    real = [np.full((6, 6, 3), 100, np.uint8)] * 3
    table = cells(scopes(rows)[0], tmp_path, 0, real)
    assert find(table, "all", "a", "hist_real").value.mean == pytest.approx(1.0)
    assert find(table, "all", "b", "hist_real").value.mean < 0.1
    assert find(table, "all", "a", "dab_kl_real").value.mean == pytest.approx(0.0, abs=1e-6)
    assert "hist_real" not in {c.metric for c in cells(scopes(rows)[0], tmp_path, 0)}


def test_white_area_is_that_of_all_images_together(tmp_path: Path) -> None:
    rows = [
        row("a", "g/1", "s1", {"white_he": 0.4, "white_signed": 0.1}),
        row("a", "g/2", "s2", {"white_he": 0.0, "white_signed": 0.02}),
    ]
    area = find(cells(scopes(rows)[0], tmp_path, 0), "all", "a", "white_area").value
    assert area.mean == pytest.approx(0.52 / 0.4), "no image without glass decides it"
    blank = [row("a", "g/1", "s1", {"white_he": 0.0, "white_signed": 0.1})]
    assert "white_area" not in {c.metric for c in cells(scopes(blank)[0], tmp_path, 0)}


def test_correlation_of_few_images_is_not_reported(tmp_path: Path) -> None:
    table = cells(scopes(pair_rows(tmp_path, 4))[1], tmp_path, 0)
    assert "dab_p90_r" not in {c.metric for c in table}


def test_scopes_are_all_then_all_pairs_then_each_group(tmp_path: Path) -> None:
    rows = [row("a", "g/1", "s", {}), *pair_rows(tmp_path, 1)]
    assert [s.name for s in scopes(rows)] == ["all", "p"]
    rows.append(row("a", "q/1", "s", {}, paired=True))
    assert [(s.name, len(s.rows)) for s in scopes(rows)] == [
        ("all", 3),
        ("pairs", 2),
        ("p", 1),
        ("q", 1),
    ]


def test_csv_holds_every_cell(ten: list[Row], tmp_path: Path) -> None:
    table = cells(scopes(ten)[0], tmp_path, 0)
    lines = list(csv.DictReader(io.StringIO(table_csv(table))))
    assert len(lines) == len(table)
    assert float(lines[-1]["difference_mean"]) == pytest.approx(0.1)
    assert lines[0]["difference_mean"] == ""
    assert lines[0]["n_images"] == "10"


def test_markdown_shows_methods_differences_and_the_worst(ten: list[Row], tmp_path: Path) -> None:
    found = scopes(ten)
    text = table_markdown(found, cells(found[0], tmp_path, 0), "# Title\n\nWords.")
    assert text.startswith("# Title\n")
    assert "10 images of 5 slides" in text
    assert "| b | +0.1 [0.1, 0.1] |" in text
    assert "Lowest Sobel-SSIM of `a`: g/0 (0.000), g/1 (0.050), g/2 (0.100)." in text
    assert "hue of positives" not in text, "a column without a value is left out"


def test_markdown_says_that_neighbor_sections_reward_blur(tmp_path: Path) -> None:
    found = scopes(pair_rows(tmp_path, 2))
    table = [c for s in found for c in cells(s, tmp_path, 0)]
    text = table_markdown(found, table, "#")
    assert "not aligned: pixel metrics reward blur" in text
    assert "The references themselves: DAB p90 0.25." in text


def test_rows_survive_the_disk_and_a_torn_last_line(ten: list[Row], tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    assert read_rows(path) == []
    write_rows(path, ten[:2])
    append_row(path, ten[2])
    with path.open("ab") as stream:
        stream.write(b'{"key": "torn')
    assert read_rows(path) == ten[:3]
    path.write_text("{}\n")
    with pytest.raises(OutputError, match="line 1"):
        read_rows(path)


def test_sheet_puts_every_picture_in_its_place(tmp_path: Path) -> None:
    rows = pair_rows(tmp_path, 3)
    for i in range(3):
        write_picture(picture_path(tmp_path, f"p/{i}", "a"), np.full((8, 8, 3), i, np.uint8))
    sheet = draw_sheet(rows, tmp_path, cell_px=40, max_rows=2)
    step_px = 40 + GAP_PX
    assert sheet.shape == (HEAD_PX + 2 * (step_px + HEAD_PX), 3 * step_px, 3)
    for line, image in enumerate((0, 2)):
        y_px = HEAD_PX + line * (step_px + HEAD_PX) + HEAD_PX
        assert (sheet[y_px : y_px + 8, :8] == 50).all()
        assert (sheet[y_px : y_px + 8, step_px : step_px + 8] == image).all()
        assert (sheet[y_px : y_px + 8, 2 * step_px : 2 * step_px + 8] == 100).all()
        assert (sheet[y_px + 8 : y_px + 40, : 3 * step_px] == 255).all()


def test_large_pictures_are_reduced_to_the_cell(tmp_path: Path) -> None:
    rows = [row("a", "g/1", "s", {})]
    for name in ("he", "a"):
        write_picture(picture_path(tmp_path, "g/1", name), np.full((50, 100, 3), 9, np.uint8))
    sheet = draw_sheet(rows, tmp_path, cell_px=40, max_rows=5)
    dark = np.argwhere((sheet[2 * HEAD_PX :, :40] == 9).all(axis=-1))
    assert (np.ptp(dark, axis=0) + 1).tolist() == [20, 40]


def test_missing_picture_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"x\.png"):
        read_picture(tmp_path / "x.png")
