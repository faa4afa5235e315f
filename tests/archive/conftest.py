"""Archives of small slides: whole ones, broken ones, one without a pixel size, one of glass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from wsi_stain.archive.jobs import WHOLE, Part, make_jobs
from wsi_stain.archive.lanes import Orders
from wsi_stain.archive.record import ArchiveFiles
from wsi_stain.archive.run import run_archive
from wsi_stain.archive.source import find_entries
from wsi_stain.archive_record import ArchiveRecord
from wsi_stain.config import ArchiveConfig, BundleSpec, RunConfig, resolve_run_config
from wsi_stain.manifest import Event
from wsi_stain.translate.bundle import save_nets

Pixels = npt.NDArray[np.uint8]
Write = Callable[..., Path]
Settle = Callable[..., RunConfig]
RunOver = Callable[..., ArchiveRecord]


@pytest.fixture(scope="session")
def identity_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundle without nets, of small tiles: the road, and nothing else."""
    folder = tmp_path_factory.mktemp("bundles") / "identity"
    spec = BundleSpec(name="identity", marker="Test", tile_px=128, start_image="source")
    save_nets(folder, spec, {})
    return folder


@pytest.fixture(scope="session")
def small_slide(
    tmp_path_factory: pytest.TempPathFactory, write_slide: Write, he_pixels: Pixels
) -> Path:
    """One slide of a few tiles."""
    path = tmp_path_factory.mktemp("small") / "small.tiff"
    return write_slide(path, he_pixels[300:520, 250:530], 0.5)


@pytest.fixture(scope="session")
def archive_folder(
    tmp_path_factory: pytest.TempPathFactory, write_slide: Write, he_pixels: Pixels
) -> Path:
    """Twelve slides: eight whole, two broken, one without a pixel size, one of glass; and a file.

    Numbers of sound slides are not those of their sizes.
    """
    folder = tmp_path_factory.mktemp("archive")
    for index in range(8):
        top_px, side_px = 250 + 30 * index, 200 + 20 * (index % 4)
        pixels = he_pixels[top_px : top_px + 200, 250 : 250 + side_px]
        write_slide(folder / f"s{index}.tiff", pixels, 0.5)
    whole = (folder / "s0.tiff").read_bytes()
    (folder / "cut.tiff").write_bytes(whole[: len(whole) // 3])
    (folder / "empty.svs").write_bytes(b"")
    write_slide(folder / "no_mpp.tiff", he_pixels[300:520, 250:530], None)
    glass = np.full((300, 300, 3), 243, np.uint8)
    write_slide(folder / "glass.tiff", glass, 0.5)
    (folder / "notes.txt").write_text("no slide")
    return folder


@pytest.fixture
def settle(identity_bundle: Path) -> Settle:
    """Give the function that makes settings: serial unless told otherwise."""

    def settings(**flags: Any) -> RunConfig:
        base: dict[str, Any] = {"bundle": str(identity_bundle), "cluster.executor": "serial"}
        base |= {"tiles.shard_tiles": 4}
        return resolve_run_config(base | {k.replace("__", "."): v for k, v in flags.items()})[0]

    return settings


@pytest.fixture
def run_over(settle: Settle) -> RunOver:
    """Give the function that runs an archive: source, output folder, settings of both kinds."""

    def run(
        source: Path | str,
        out: Path,
        *,
        listener: Callable[[str, Event], None] = lambda name, event: None,
        part: Part = WHOLE,
        scratch: Path | None = None,
        base: RunConfig | None = None,
        **archive: Any,
    ) -> ArchiveRecord:
        config = ArchiveConfig(**{"attempts": 1, "retry_wait_s": 0.0} | archive)
        base = base or settle()
        jobs = make_jobs(find_entries(str(source), out), base)
        jobs = [job for job in jobs if part.holds(job.name)]
        orders = Orders(ArchiveFiles(out, part), config, base, {}, scratch)
        return run_archive(jobs, orders, listener)

    return run


@pytest.fixture
def states() -> Callable[[ArchiveRecord], dict[str, str]]:
    """Give the function that tells name and state of each slide."""
    return lambda record: {slide.name: slide.state for slide in record.slides}
