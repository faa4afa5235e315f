"""Stitching and pyramid writing: speed beside a peer and a ceiling, and memory at two heights.

Ours ends with the file safe on disk (fsync), libvips' does not. At Q >= 90 libvips drops
subsampling and YCbCr, so its Q89 stands beside our 4:2:0 at 90, and its Q90 beside our 4:4:4.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import imagecodecs
import numpy as np
import numpy.typing as npt
from ruler import Action, Ruler, start
from specimen import GLASS, tissue_picture

from wsi_stain.config import WriteConfig
from wsi_stain.geometry import Scale, Size
from wsi_stain.write.levels import halve
from wsi_stain.write.stitch import stitch_bands
from wsi_stain.write.tiff import write_pyramid

HAS_VIPS = importlib.util.find_spec("pyvips") is not None
if HAS_VIPS:
    import pyvips

Pixels = npt.NDArray[np.uint8]
Chroma = Literal["4:2:0", "4:4:4"]

BAND_PX = 512
SIDE_PX, QUICK_SIDE_PX = 8192, 1024
MEMORY_SIZES = ((16384, 4096), (16384, 16384))
QUICK_MEMORY_SIZES = ((2048, 1024), (2048, 4096))


@dataclass(frozen=True)
class Grid:
    """A full grid of tiles."""

    scale: Scale
    tile_px: int
    overlap_px: int
    rc: npt.NDArray[np.int32]


# ---- pyramid --------------------------------------------------------------------------------


def write_ours(path: Path, picture: Pixels, spec: WriteConfig) -> None:
    size = Size(picture.shape[1], picture.shape[0])
    bands = (picture[y_px : y_px + BAND_PX] for y_px in range(0, len(picture), BAND_PX))
    write_pyramid(path, size, bands, 0.5, spec, name="bench")


def write_vips(path: Path, picture: Pixels, quality: int) -> None:
    height_px, width_px = picture.shape[:2]
    image = pyvips.Image.new_from_memory(picture.data, width_px, height_px, 3, "uchar")
    image.tiffsave(
        str(path),
        compression="jpeg",
        Q=quality,
        tile=True,
        tile_width=512,
        tile_height=512,
        pyramid=True,
        bigtiff=True,
    )


def made_safe(path: Path, write: Action) -> None:
    write()
    with path.open("rb") as file:
        os.fsync(file.fileno())


def encode_only(picture: Pixels, subsampling: str) -> None:
    """Encode the tiles of all levels on as many threads as the writer has, and nothing else."""
    levels = [picture]
    while max(levels[-1].shape) > 1024:
        levels.append(halve(levels[-1]))
    tiles = [
        level[y_px : y_px + 512, x_px : x_px + 512]
        for level in levels
        for y_px in range(0, level.shape[0], 512)
        for x_px in range(0, level.shape[1], 512)
    ]

    def encode(tile: Pixels) -> int:
        return len(imagecodecs.jpeg8_encode(tile, level=90, subsampling=subsampling))

    with ThreadPoolExecutor(min(4, max(2, os.cpu_count() or 2))) as pool:
        list(pool.map(encode, tiles))


def bench_pyramid(ruler: Ruler, folder: Path, chroma: Chroma, vips_quality: int) -> None:
    """Our writer, the encoder alone, and libvips at the setting that makes the same picture."""
    side_px = QUICK_SIDE_PX if ruler.quick else SIDE_PX
    name, picture = tissue_picture(side_px, side_px)
    spec = WriteConfig(overwrite=True, subsampling=chroma)
    actions: dict[str, Action] = {
        "ours": partial(write_ours, folder / "ours.ome.tiff", picture, spec),
        "encode": partial(encode_only, picture, chroma.replace(":", "")),
    }
    if HAS_VIPS:
        write = partial(write_vips, folder / "vips.tiff", picture, vips_quality)
        actions |= {"vips": write, "safe vips": partial(made_safe, folder / "vips.tiff", write)}
    times = ruler.times(actions)
    megapixels = picture.shape[0] * picture.shape[1] / 1e6
    speed = {who: megapixels / time.wall_s for who, time in times.items()}
    cpu_s = {who: time.cpu_s for who, time in times.items()}
    what = f"pyramid {chroma} of {megapixels:.0f} MP ({name})"
    vips = f"libvips tiffsave Q{vips_quality}" if HAS_VIPS else None
    ruler.report(what, "MP/s", speed["ours"], vips, speed.get("vips"))
    safe = f"{vips}, then fsync" if vips else None
    ruler.report(f"{what}, safe on disk", "MP/s", speed["ours"], safe, speed.get("safe vips"))
    ruler.report(f"{what}, CPU", "s", cpu_s["ours"], vips, cpu_s.get("vips"))
    ruler.report(f"{what}, ceiling", "MP/s", speed["ours"], "encoding alone", speed["encode"])
    ours_mb = (folder / "ours.ome.tiff").stat().st_size / 1e6
    vips_mb = (folder / "vips.tiff").stat().st_size / 1e6 if HAS_VIPS else None
    ruler.report(f"{what}, file", "MB", ours_mb, vips, vips_mb)


# ---- stitching ------------------------------------------------------------------------------


def weight_image(grid: Grid, tiles: list[Pixels]) -> None:
    """Stitch as peers do, one row of tiles at a time: add weighted tiles, divide by weights."""
    tile_px, overlap_px = grid.tile_px, grid.overlap_px
    stride_px, width_px = tile_px - overlap_px, grid.scale.size_out.width_px
    side = np.ones(tile_px, np.float32)
    side[:overlap_px] = (np.arange(overlap_px) + 0.5) / overlap_px
    side[-overlap_px:] = side[:overlap_px][::-1]
    weight = np.outer(side, side)[..., None]
    total = np.zeros((tile_px, width_px + tile_px, 3), np.float32)
    weights = np.zeros((tile_px, width_px + tile_px, 1), np.float32)
    for index, (row, column) in enumerate(grid.rc):
        if column == 0 and row:
            done = total[:stride_px, :width_px] / weights[:stride_px, :width_px]
            (done + 0.5).astype(np.uint8)
            for rows in (total, weights):
                rows[:overlap_px] = rows[stride_px:]
                rows[overlap_px:] = 0
        xs = slice(column * stride_px, column * stride_px + tile_px)
        total[:, xs] += weight * tiles[index % len(tiles)]
        weights[:, xs] += weight


def full_grid(width_px: int, height_px: int, tile_px: int, overlap_px: int) -> Grid:
    stride_px = tile_px - overlap_px
    across, down = -(-width_px // stride_px), -(-height_px // stride_px)
    rc = np.array([(row, column) for row in range(down) for column in range(across)], np.int32)
    return Grid(Scale(1.0, 0.5, Size(width_px, height_px)), tile_px, overlap_px, rc)


def some_tiles(tile_px: int) -> list[Pixels]:
    _, picture = tissue_picture(tile_px, 16 * tile_px)
    return [picture[k * tile_px : (k + 1) * tile_px] for k in range(16)]


def stitched(grid: Grid, tiles: list[Pixels]) -> Iterator[Pixels]:
    return stitch_bands(grid, lambda index: tiles[index % len(tiles)], GLASS)


def bench_stitch(ruler: Ruler) -> None:
    """Our bands beside a weight image of one row of tiles, and beside a copy."""
    side_px = QUICK_SIDE_PX if ruler.quick else SIDE_PX
    grid, tiles = full_grid(side_px, side_px // 2, 256, 32), some_tiles(256)
    megapixels = grid.scale.size_out.area_px / 1e6
    source = np.zeros((side_px // 2, side_px, 3), np.uint8)

    def ours() -> None:
        for _ in stitched(grid, tiles):
            pass

    times = ruler.times(
        {"ours": ours, "weights": partial(weight_image, grid, tiles), "copy": source.copy}
    )
    speed = {who: megapixels / time.cpu_s for who, time in times.items()}
    what = "stitching, tiles of 256 px, per CPU second"
    ruler.report(what, "MP/s", speed["ours"], "weight image", speed["weights"])
    ruler.report(f"{what}, ceiling", "MP/s", speed["ours"], "memory copy", speed["copy"])


# ---- memory ---------------------------------------------------------------------------------


def memory_mb(name: str) -> float:
    """Give a field of this process, MB; not `ru_maxrss`, which a child inherits."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e6


def print_memory(width_px: int, height_px: int) -> None:
    """Stitch and write in this process; print the peak above what stood before, MB."""
    grid, tiles = full_grid(width_px, height_px, 256, 32), some_tiles(256)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before_mb = memory_mb("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.ome.tiff"
        write_pyramid(
            path, Size(width_px, height_px), stitched(grid, tiles), 0.5, WriteConfig(), name="a"
        )
    sys.stdout.write(str(memory_mb("VmHWM") - before_mb))


def bench_memory(ruler: Ruler) -> None:
    """Peak of stitching and writing together, in processes of their own."""
    low_mb: float | None = None
    for size in QUICK_MEMORY_SIZES if ruler.quick else MEMORY_SIZES:
        command = [sys.executable, __file__, "--memory", *map(str, size)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peak_mb = float(done.stdout)
        what = f"memory above imports, {size[0]} x {size[1]} px"
        ruler.report(what, "MB", peak_mb, "the lower picture" if low_mb else None, low_mb)
        low_mb = peak_mb


def main() -> None:
    if sys.argv[1:2] == ["--memory"]:
        print_memory(*map(int, sys.argv[2:]))
        return
    ruler = start("write", __doc__)
    with tempfile.TemporaryDirectory() as folder:
        bench_pyramid(ruler, Path(folder), "4:2:0", 89)
        bench_pyramid(ruler, Path(folder), "4:4:4", 90)
    bench_stitch(ruler)
    if Path("/proc/self/status").exists():
        bench_memory(ruler)


if __name__ == "__main__":
    main()
