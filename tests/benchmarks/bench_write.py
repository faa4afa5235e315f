"""Stitching and pyramid writing: speed beside a peer and a ceiling, and memory at two heights.

A plain script: prints JSON lines. Read the ratios and the CPU seconds, not the wall times: they
survive a busy machine. libvips is measured where pyvips can be imported.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile

from wsi_stain.config import WriteConfig
from wsi_stain.geometry import Scale, Size, pyramid_sizes
from wsi_stain.write.levels import halve
from wsi_stain.write.stitch import stitch_bands
from wsi_stain.write.tiff import write_pyramid

if importlib.util.find_spec("pyvips"):
    import pyvips

Pixels = npt.NDArray[np.uint8]

SIDE_PX = 8192
BAND_PX = 512
ROUNDS = 3
GLASS = (243, 243, 244)
SLIDE = Path(__file__).resolve().parents[2] / "../shared/data/slides/CMU-1-Small-Region.svs"


@dataclass(frozen=True)
class Grid:
    """A full grid of tiles."""

    scale: Scale
    tile_px: int
    overlap_px: int
    rc: npt.NDArray[np.int32]


def report(bench: str, **facts: object) -> None:
    """Print one JSON line with the hardware's name."""
    row = {"bench": bench, "cpu": _cpu_name(), "cores": os.cpu_count(), **facts}
    sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(": ")[2] if names else platform.processor()


def base_picture() -> tuple[str, Pixels]:
    """Give a picture to repeat: real tissue where it lies beside the checkout, else drawn."""
    if SLIDE.is_file():
        return "CMU-1-Small-Region, mirrored", np.asarray(tifffile.imread(SLIDE, key=0))
    rng = np.random.default_rng(0)
    noise = cv2.GaussianBlur(rng.normal(0, 60, (2048, 2048, 3)), (0, 0), 2) * 4
    pixels = np.clip(190 + noise, 0, 255).astype(np.uint8)
    pixels[:1024] = GLASS
    return "drawn", pixels


def mirrored(base: Pixels, width_px: int, height_px: int) -> Pixels:
    """Repeat a picture with mirrored copies, so that no seam shows."""
    double = np.concatenate([base, base[:, ::-1]], axis=1)
    quad = np.concatenate([double, double[::-1]], axis=0)
    repeats = (-(-height_px // quad.shape[0]), -(-width_px // quad.shape[1]), 1)
    return np.ascontiguousarray(np.tile(quad, repeats)[:height_px, :width_px])


def measure(actions: dict[str, Callable[[], object]]) -> dict[str, tuple[float, float]]:
    """Run all actions in turn, several rounds: median wall and CPU seconds of each."""
    walls: dict[str, list[float]] = {name: [] for name in actions}
    cpus: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(ROUNDS):
        for name, action in actions.items():
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            action()
            walls[name].append(time.perf_counter() - wall_s)
            cpus[name].append(time.process_time() - cpu_s)
    return {name: (statistics.median(walls[name]), statistics.median(cpus[name])) for name in walls}


# ---- pyramid --------------------------------------------------------------------------------


def bands_of(picture: Pixels) -> Iterator[Pixels]:
    for y_px in range(0, len(picture), BAND_PX):
        yield picture[y_px : y_px + BAND_PX]


def write_ours(path: Path, picture: Pixels, spec: WriteConfig) -> None:
    size = Size(picture.shape[1], picture.shape[0])
    write_pyramid(path, size, bands_of(picture), 0.5, spec, name="bench")


def encode_only(picture: Pixels, subsampling: str) -> None:
    """Encode all tiles of all levels on as many threads as the writer has, and nothing else."""
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


def write_vips(path: Path, picture: Pixels, quality: int) -> None:
    image = pyvips.Image.new_from_memory(
        picture.data, picture.shape[1], picture.shape[0], 3, "uchar"
    )
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


def bench_write(folder: Path, name: str, picture: Pixels) -> None:
    """Our writer, the encoder alone, and libvips at the setting that makes the same file."""
    for chroma, quality in (("4:2:0", 89), ("4:4:4", 90)):
        spec = WriteConfig(overwrite=True, subsampling="4:2:0" if quality == 89 else "4:4:4")
        ours, vips = folder / "ours.ome.tiff", folder / "vips.tiff"
        actions: dict[str, Callable[[], object]] = {
            "ours": partial(write_ours, ours, picture, spec),
            "encode_only": partial(encode_only, picture, chroma.replace(":", "")),
        }
        if importlib.util.find_spec("pyvips"):
            actions["libvips"] = partial(write_vips, vips, picture, quality)
        seconds = measure(actions)
        for who, (wall_s, cpu_s) in seconds.items():
            path = {"ours": ours, "libvips": vips}.get(who)
            report(
                "pyramid",
                who=who,
                chroma=chroma,
                picture=name,
                near_white_fraction=round(float((picture.min(axis=-1) > 220).mean()), 2),
                mp_per_s=round(picture.shape[0] * picture.shape[1] / 1e6 / wall_s),
                cpu_s=round(cpu_s, 3),
                cpu_of_ours=round(cpu_s / seconds["ours"][1], 2),
                file_mb=round(path.stat().st_size / 1e6, 1) if path else None,
            )


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


def stitch(grid: Grid, tiles: list[Pixels]) -> None:
    for _ in stitch_bands(grid, lambda index: tiles[index % len(tiles)], GLASS):
        pass


def bench_stitch(picture: Pixels) -> None:
    """Our bands beside a weight image of one row of tiles."""
    for tile_px, overlap_px in ((512, 64), (256, 32)):
        stride_px = tile_px - overlap_px
        across, down = SIDE_PX // stride_px, SIDE_PX // 2 // stride_px
        rc = np.array([(r, c) for r in range(down) for c in range(across)], np.int32)
        size = Size(across * stride_px + overlap_px, down * stride_px + overlap_px)
        grid = Grid(Scale(1.0, 0.5, size), tile_px, overlap_px, rc)
        tiles = [
            np.ascontiguousarray(picture[k * 256 : k * 256 + tile_px, :tile_px]) for k in range(8)
        ]

        seconds = measure(
            {"ours": partial(stitch, grid, tiles), "weights": partial(weight_image, grid, tiles)}
        )
        report(
            "stitch",
            tile_px=tile_px,
            overlap_px=overlap_px,
            mp_per_cpu_s=round(size.area_px / 1e6 / seconds["ours"][1]),
            times_weight_image=round(seconds["weights"][1] / seconds["ours"][1], 1),
        )


# ---- memory ---------------------------------------------------------------------------------


def memory_mb(field: str) -> float:
    """Give a field of this process, MB; not `ru_maxrss`, which a child inherits."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6


def memory_of_one_height(width_px: int, height_px: int) -> None:
    """Stitch and write in this process; print the peak above what stood before, MB."""
    _, base = base_picture()
    tile_px, overlap_px = 256, 32
    stride_px = tile_px - overlap_px
    tiles = [np.ascontiguousarray(base[k * 64 :][:tile_px, :tile_px]) for k in range(16)]
    size = Size(width_px, height_px)
    n_rows, n_columns = -(-height_px // stride_px), -(-width_px // stride_px)
    rc = np.array([(r, c) for r in range(n_rows) for c in range(n_columns)], np.int32)
    grid = Grid(Scale(1.0, 0.5, size), tile_px, overlap_px, rc)
    before_mb = memory_mb("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        bands = stitch_bands(grid, lambda index: tiles[index % 16], GLASS)
        write_pyramid(Path(folder) / "a.ome.tiff", size, bands, 0.5, WriteConfig(), name="a")
    sys.stdout.write(str(memory_mb("VmHWM") - before_mb))


def bench_memory() -> None:
    """Peak of stitching and writing together, in processes of their own."""
    for height_px in (4096, 12288):
        command = [sys.executable, __file__, "--memory", str(height_px)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        size = {"width_px": 16384, "height_px": height_px}
        report("memory", **size, peak_above_imports_mb=round(float(done.stdout)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    asked: Any = parser.parse_args()
    if asked.memory:
        memory_of_one_height(16384, asked.memory)
        return
    name, base = base_picture()
    picture = mirrored(base, SIDE_PX, SIDE_PX)
    levels = len(pyramid_sizes(Size(SIDE_PX, SIDE_PX)))
    report("setup", picture=name, side_px=SIDE_PX, levels=levels, rounds=ROUNDS)
    with tempfile.TemporaryDirectory() as folder:
        bench_write(Path(folder), name, picture)
    bench_stitch(picture)
    bench_memory()


if __name__ == "__main__":
    main()
