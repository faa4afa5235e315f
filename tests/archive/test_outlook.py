"""What an archive will take: forecasts, the machine's pace, and their product."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from wsi_stain.archive.forecast import forecast
from wsi_stain.archive.jobs import WHOLE, Job, make_jobs
from wsi_stain.archive.lanes import Orders
from wsi_stain.archive.outlook import Outlook, look_out
from wsi_stain.archive.pace import Pace
from wsi_stain.archive.record import ArchiveFiles
from wsi_stain.archive.source import find_entries
from wsi_stain.archive_record import ArchiveRecord
from wsi_stain.config import ArchiveConfig, RunConfig
from wsi_stain.manifest import ignore
from wsi_stain.planning import plan_slide, some_tiles

Pixels = npt.NDArray[np.uint8]
Settle = Callable[..., RunConfig]
RunOver = Callable[..., ArchiveRecord]


def jobs_of(source: str, base: RunConfig) -> list[Job]:
    return make_jobs(find_entries(source, Path("none")), base)


def test_forecast_says_what_is_to_do_done_and_refused(
    tmp_path: Path, archive_folder: Path, run_over: RunOver, settle: Settle
) -> None:
    run_over(archive_folder / "s1.tiff", tmp_path)
    found = forecast(jobs_of(f"{archive_folder}/[cs][u01].tiff", settle()), tmp_path)
    found += forecast(jobs_of(f"{archive_folder}/no_mpp.tiff", settle()), tmp_path)
    assert {slide.name: slide.state for slide in found} == {
        "s0_test": "to do",
        "s1_test": "done",
        "no_mpp_test": "refused",
    }
    ahead, refused = found[0], found[2]
    plan = plan_slide(archive_folder / "s0.tiff", settle())
    with plan.source:
        assert ahead.tiles == plan.grid.n_tiles
        assert ahead.scratch_bytes == plan.projection.store_bytes
    assert 0 < ahead.tissue_mm2 <= 200 * 200 * 0.5**2 / 1e6
    assert "--mpp" in refused.next


def test_forecast_refuses_what_the_batch_would(
    tmp_path: Path, archive_folder: Path, run_over: RunOver, settle: Settle
) -> None:
    source = f"{archive_folder}/s1.tiff"
    run_over(source, tmp_path)
    other = settle(write__quality=70)
    (found,) = forecast(jobs_of(source, other), tmp_path)
    assert (found.state, found.next) == ("refused", "Use --overwrite to replace it.")
    (tried,) = run_over(source, tmp_path, base=other).slides
    assert tried.state == "failed"
    assert found.error.endswith(tried.error)
    (found,) = forecast(jobs_of(source, settle(write__quality=70, write__overwrite=True)), tmp_path)
    assert found.state == "to do"


def test_dry_run_measures_this_machine_once(
    tmp_path: Path, archive_folder: Path, settle: Settle, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = settle()
    orders = Orders(ArchiveFiles(tmp_path / "out", WHOLE), ArchiveConfig(), base)
    jobs = jobs_of(f"{archive_folder}/s[01].tiff", base)
    first = look_out(jobs, orders, ignore)
    assert first.pace is not None
    assert first.pace.slide_s > 0
    assert sorted(path.name for path in orders.files.out.iterdir()) == ["forecast.csv", "pace.json"]
    monkeypatch.setattr("wsi_stain.archive.outlook.measure_pace", pytest.fail)
    assert look_out(jobs, orders, ignore).pace == first.pace


def test_time_is_start_and_slides_and_tiles() -> None:
    pace = Pace(key="", workers=4, device="cuda", start_s=10.0, slide_s=2.0, tile_s=0.01)
    assert pace.seconds(100, 50_000) == pytest.approx(710.0)
    assert pace.seconds(0, 0) == 0.0
    assert Outlook([], None, 3).facts()["tiles"] == 0


def test_trial_keeps_some_tiles_and_the_tissue_under_them(
    synthetic_slide: Path, settle: Settle
) -> None:
    plan = plan_slide(synthetic_slide, settle())
    with plan.source:
        fewer = some_tiles(plan, 6)
        assert fewer.grid.n_tiles == 6
        assert {tuple(at) for at in fewer.grid.rc} < {tuple(at) for at in plan.grid.rc}
        assert 0 < fewer.mask.pixels.sum() < plan.mask.pixels.sum()
        assert not (fewer.mask.pixels & ~plan.mask.pixels).any()
        assert some_tiles(plan, 10**6).grid.n_tiles == plan.grid.n_tiles


def test_trial_is_of_tissue_where_glass_is_worked_on_too(
    tmp_path: Path, write_slide: Callable[..., Path], he_pixels: Pixels, settle: Settle
) -> None:
    pixels = np.full((2000, 2000, 3), 243, np.uint8)
    pixels[1700:1900, 1700:1900] = he_pixels[380:580, 330:530]
    path = write_slide(tmp_path / "corner.tiff", pixels, 0.5)
    plan = plan_slide(path, settle(tiles__tissue_min_fraction=0.0))
    with plan.source:
        fewer = some_tiles(plan, 6).grid
    assert (len(fewer.rc), len(plan.grid.rc) > 200) == (6, True)
    assert (fewer.tissue > 0).any()
