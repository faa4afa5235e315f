"""Cost as the work grows: `wsi-stain translate` from 1 to 10,000 tiles, time and memory.

    python tests/benchmarks/sweep.py --most 10000 --picture docs/sweep.png

Slides are tissue all over, 24 tiles wide and ever higher. The bundle is the identity, so what grows
here is the road itself: reading, storing, dispatching, stitching, encoding, checking. Memory is
the peak of the proportional set size (PSS) of all processes together, so that what they share
counts once. Prints a JSON line per size, and the line fitted through all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from PIL import Image, ImageDraw, ImageFont
from ruler import Ruler
from specimen import dense_tissue, write_svs

from wsi_stain.config import BundleSpec
from wsi_stain.translate.bundle import save_nets

SIZES = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)
WIDEST = 24
STRIDE_PX, OVERLAP_PX = 224, 32
LOOK_S = 0.25
PICTURE_PX = (900, 620)


@dataclass(frozen=True)
class Point:
    """One run: its tiles, seconds of the clock, and peak memory of all processes."""

    tiles: int
    wall_s: float
    peak_mb: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=int, default=SIZES[-1], help="largest number of tiles")
    parser.add_argument("--picture", type=Path, help="where to put the plot, PNG")
    parser.add_argument("--workers", type=int, default=0, help="as of translate")
    asked = parser.parse_args()
    ruler = Ruler("sweep", quick=False)
    points = []
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "identity"
        save_nets(bundle, BundleSpec(name="identity", marker="Test", start_image="source"), {})
        for size in (size for size in SIZES if size <= asked.most):
            point = run(Path(folder), bundle, size, asked.workers)
            points.append(point)
            ruler.report(f"{point.tiles} tiles", "s", point.wall_s)
            ruler.report(f"{point.tiles} tiles, memory of all processes", "MB", point.peak_mb)
    slope_s, start_s = fit(points)
    ruler.report("each tile", "s", slope_s)
    ruler.report("before the first tile", "s", start_s)
    if asked.picture:
        draw(points, slope_s, start_s).save(asked.picture, optimize=True)


def run(folder: Path, bundle: Path, n_tiles: int, workers: int) -> Point:
    """Translate a slide of about that many tiles in processes of its own."""
    across = min(n_tiles, WIDEST)
    down = -(-n_tiles // across)
    sides_px = [count * STRIDE_PX + OVERLAP_PX for count in (across, down)]
    slide = write_svs(folder / f"{n_tiles}.svs", dense_tissue(2048, 1024), *sides_px, gap=False)
    command = [sys.executable, "-m", "wsi_stain", "translate", str(slide), "--out", str(folder)]
    command += ["--bundle", str(bundle), "--tissue-min-fraction", "0", "--quiet"]
    command += ["--workers", str(workers)]
    began_s = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak_mb = watch(process)
    wall_s = time.perf_counter() - began_s
    if process.returncode:
        raise SystemExit(f"translate of {n_tiles} tiles ended with {process.returncode}.")
    for path in folder.glob(f"{n_tiles}[._]*"):
        if path.is_file():
            path.unlink()
    return Point(across * down, wall_s, peak_mb)


def watch(process: subprocess.Popen[bytes]) -> float:
    """Wait for the end; give the peak PSS of the process and all below it, MB."""
    peaks = [0.0]
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(LOOK_S):
            peaks.append(pss_mb(process.pid))

    thread = threading.Thread(target=look)
    thread.start()
    process.wait()
    ended.set()
    thread.join()
    return max(peaks)


def pss_mb(pid: int) -> float:
    """Proportional set size of a process and all below it, MB; 0 once it has ended."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        top = psutil.Process(pid)
        for each in [top, *top.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += each.memory_full_info().pss
    return total / 1e6


def fit(points: list[Point]) -> tuple[float, float]:
    """Fit ``wall_s = start + slope tiles``, by least squares of relative errors; slope first.

    Absolute errors would let the largest run alone decide.
    """
    tiles = np.array([point.tiles for point in points], np.float64)
    wall_s = np.array([point.wall_s for point in points])
    if len(points) == 1:
        return 0.0, float(wall_s[0])
    columns = np.stack([tiles, np.ones_like(tiles)], axis=1) / wall_s[:, None]
    solution, *_ = np.linalg.lstsq(columns, np.ones(len(points)), rcond=None)
    return float(solution[0]), float(solution[1])


# ---- the plot -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """One log-log plot: where it lies on the picture, and the range of its axes."""

    top_px: int
    bottom_px: int
    y_range: tuple[float, float]
    left_px: int = 90
    right_px: int = 870
    x_range: tuple[float, float] = (0.7, 15_000.0)

    def place(self, x: float, y: float) -> tuple[float, float]:
        across = np.log(x / self.x_range[0]) / np.log(self.x_range[1] / self.x_range[0])
        up = np.log(y / self.y_range[0]) / np.log(self.y_range[1] / self.y_range[0])
        return (
            self.left_px + across * (self.right_px - self.left_px),
            self.bottom_px - up * (self.bottom_px - self.top_px),
        )


def draw(points: list[Point], slope_s: float, start_s: float) -> Image.Image:
    """Draw time above memory, both over tiles, with the fitted line."""
    picture = Image.new("RGB", PICTURE_PX, "white")
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(15)
    walls = [point.wall_s for point in points]
    time_panel = Panel(40, 330, (min(walls) / 2, max(walls) * 2))
    memory_panel = Panel(390, 570, (100.0, 10_000.0))
    for panel, title in (
        (time_panel, f"time, s   (line: {start_s:.1f} s + {1e3 * slope_s:.1f} ms per tile)"),
        (memory_panel, "memory of all processes, peak PSS, MB"),
    ):
        _draw_axes(pen, panel, title, font)
    xs = np.geomspace(1, max(point.tiles for point in points), 100)
    line = [time_panel.place(x, start_s + slope_s * x) for x in xs]
    pen.line(line, fill=(200, 120, 60), width=2)
    for point in points:
        _draw_dot(pen, time_panel.place(point.tiles, point.wall_s))
        _draw_dot(pen, memory_panel.place(point.tiles, point.peak_mb))
    pen.text((420, 595), "tiles of 256 px", fill="black", font=font)
    return picture


def _draw_axes(
    pen: ImageDraw.ImageDraw,
    panel: Panel,
    title: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    pen.rectangle((panel.left_px, panel.top_px, panel.right_px, panel.bottom_px), outline="black")
    pen.text((panel.left_px, panel.top_px - 24), title, fill="black", font=font)
    for exponent in range(-2, 6):
        value = 10.0**exponent
        if panel.y_range[0] <= value <= panel.y_range[1]:
            _, y_px = panel.place(1.0, value)
            pen.line((panel.left_px, y_px, panel.right_px, y_px), fill=(220, 220, 220))
            pen.text((panel.left_px - 8, y_px), f"{value:g}", fill="black", font=font, anchor="rm")
        if panel.x_range[0] <= value <= panel.x_range[1]:
            x_px, _ = panel.place(value, panel.y_range[0])
            pen.line((x_px, panel.top_px, x_px, panel.bottom_px), fill=(220, 220, 220))
            label = (x_px, panel.bottom_px + 4)
            pen.text(label, f"{value:,.0f}", fill="black", font=font, anchor="ma")


def _draw_dot(pen: ImageDraw.ImageDraw, place: tuple[float, float]) -> None:
    x_px, y_px = place
    pen.ellipse((x_px - 5, y_px - 5, x_px + 5, y_px + 5), fill=(60, 90, 160))


if __name__ == "__main__":
    main()
