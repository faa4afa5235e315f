"""Reading patches from a slide, beside OpenSlide alone and beside the bare JPEG decoder.

The slide is written here: tissue, 256 px JPEG tiles at quality 90, the layout of an Aperio SVS.
Patches have the place and the overlap that `translate` asks for, row after row.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import openslide
import tifffile
from ruler import Ruler, start
from specimen import tissue_picture, write_svs

from wsi_stain.geometry import Scale, Size
from wsi_stain.slides.fill import read_tiles
from wsi_stain.slides.image import SlideSource
from wsi_stain.slides.plan import TileGrid

Pixels = npt.NDArray[np.uint8]

SIDE_PX, QUICK_SIDE_PX = 6144, 768
CACHE_MB = 64
PATCH_PX, OVERLAP_PX = 256, 32


def read_ours(source: SlideSource, grid: TileGrid) -> int:
    """Read all patches as the run's first stage does, shard by shard."""
    return sum(
        int(read_tiles(source, grid, grid.shard(i))[0, 0, 0, 0]) for i in range(grid.n_shards)
    )


def read_openslide(slide: openslide.OpenSlide, grid: TileGrid) -> int:
    """Read the same patches one by one, as everybody does."""
    total = 0
    for index in range(grid.n_tiles):
        x_px, y_px, width_px, height_px = grid.region_out(index)
        rgba = slide.read_region((x_px, y_px), 0, (width_px, height_px))
        total += int(np.asarray(rgba.convert("RGB"))[0, 0, 0])
    return total


def decode_only(path: Path) -> int:
    """Decode each of the slide's tiles once, and nothing else."""
    with tifffile.TiffFile(path) as tiff:
        segments = tiff.pages.first.segments(maxworkers=1)
        return sum(pixels is not None for pixels, *_ in segments)


def bench_way(ruler: Ruler, folder: Path, *, direct: bool) -> None:
    side_px = QUICK_SIDE_PX if ruler.quick else SIDE_PX
    _, picture = tissue_picture(side_px, side_px)
    path = write_svs(folder / f"{direct}.svs", picture, side_px, side_px, gap=not direct)
    grid = whole_grid(Scale(1.0, 0.5, Size(side_px, side_px)))
    with SlideSource.open(path, cache_mb=CACHE_MB) as source, openslide.OpenSlide(path) as slide:
        slide.set_cache(openslide.OpenSlideCache(CACHE_MB * 2**20))
        megapixels = grid.n_tiles * PATCH_PX**2 / 1e6
        times = ruler.times(
            {
                "ours": lambda: read_ours(source, grid),
                "openslide": lambda: read_openslide(slide, grid),
                **({"decode": lambda: decode_only(path)} if direct else {}),
            },
            rounds=5,
        )
    speed = {who: megapixels / time.wall_s for who, time in times.items()}
    how = "decoded directly" if direct else "through OpenSlide, a tile is missing"
    what = f"reading patches, tiled SVS {how}"
    ruler.report(what, "MP/s", speed["ours"], "openslide alone", speed["openslide"])
    if direct:
        bare = side_px**2 / 1e6 / times["decode"].wall_s
        ruler.report(f"{what}, ceiling", "MP/s", speed["ours"], "JPEG decoding alone", bare)


def whole_grid(scale: Scale) -> TileGrid:
    """Give all tiles of a slide, tissue or not."""
    stride_px = PATCH_PX - OVERLAP_PX
    across, down = (-(-(side_px - OVERLAP_PX) // stride_px) for side_px in scale.size_out)
    rc = np.array([(row, column) for row in range(down) for column in range(across)], np.int32)
    return TileGrid(scale, PATCH_PX, OVERLAP_PX, 64, rc, np.ones(len(rc), np.float32))


def main() -> None:
    ruler = start("read", __doc__)
    with tempfile.TemporaryDirectory() as folder:
        bench_way(ruler, Path(folder), direct=True)
        bench_way(ruler, Path(folder), direct=False)


if __name__ == "__main__":
    main()
