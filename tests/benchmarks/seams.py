"""Seams of the virtual stain: where tiles meet, is it rougher than it would be without a border?

    python tests/benchmarks/seams.py --solver student

Steps across a line depend on the nuclei that happen to lie there, far more than on any seam. So
each site is translated twice, on the same noise: as 2 x 2 tiles that meet in its middle, and as one
tile that has this middle inside. The ratio is the mean step of luma across the lines where the
strip that tiles share begins and ends, first picture over second, before JPEG: 1 is seamless.
Prints one JSON line per kind of tissue; intervals are over sites.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from wsi_stain.config import SampleConfig, StainConfig
from wsi_stain.evaluate.metrics import luma
from wsi_stain.geometry import Region, Scale, Size, choose_scale
from wsi_stain.slides.image import SlideSource
from wsi_stain.slides.mask import TissueMask
from wsi_stain.slides.plan import TileGrid, plan_tiles
from wsi_stain.stain.density import is_stained
from wsi_stain.stain.white import WhitePoint, estimate_white
from wsi_stain.translate.bundle import ModelBundle, load_bundle, pick_device
from wsi_stain.translate.fit import fit_pictures
from wsi_stain.translate.task import TranslateTask
from wsi_stain.translate.worker import translate_tiles
from wsi_stain.write.stitch import stitch_bands

Rgb8 = NDArray[np.uint8]
Bools = NDArray[np.bool_]
OVERLAP_PX = 32
MOST_SITES = 9  # of one picture: more of one slide would speak for it alone
LEAST_TISSUE = 0.3  # of the middle
NEAR_PX, SPECK_PX, LOCAL_PX = 32, 7, 15
BOOTSTRAPS = 2000
# Folder or slide, its pixel size where the files do not say.
PICTURES = (
    ("he/cmu1", 0.499),
    ("he/gastric_1", 0.5),
    ("he/gastric_2", 0.5),
    ("he/openslide_os1", 0.5),
    ("he/tcga_hnsc", 0.5),
    ("pairs/bci/he", 0.46),
    ("slides/CMU-1-Small-Region.svs", 0.0),
)


class Picture(NamedTuple):
    """H&E at the model's pixel size, uint8 (h, w, 3), and its glass."""

    name: str
    he: Rgb8
    glass: WhitePoint


class Site(NamedTuple):
    """Steps across the lines of a site, by kind of tissue: 2 x 2 tiles, and one tile."""

    seamed: dict[str, NDArray[np.float64]]
    single: dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Bench:
    """The model, run as it is asked for."""

    bundle: ModelBundle
    sample: SampleConfig

    @property
    def tile_px(self) -> int:
        """Side of a tile."""
        return self.bundle.spec.tile_px

    @property
    def grid(self) -> TileGrid:
        """Four tiles that meet in the middle."""
        side_px = 2 * self.tile_px - OVERLAP_PX
        scale = Scale(1.0, self.bundle.spec.mpp, Size(side_px, side_px))
        everywhere = TissueMask(np.ones((1, 1), np.bool_), scale.mpp_out, 1e9)
        return plan_tiles(
            scale,
            everywhere,
            tile_px=self.tile_px,
            overlap_px=OVERLAP_PX,
            tissue_min_fraction=0.0,
            shard_tiles=4,
        )

    def sites(self, picture: Picture) -> Iterator[Site]:
        """Measure at places spread over a picture, where its middle holds tissue."""
        height_px, width_px = picture.he.shape[:2]
        side_px = self.grid.scale.size_out.width_px
        fit = fit_pictures(
            picture.he[None], picture.glass, self.bundle.spec, StainConfig(), self.sample
        )
        task = TranslateTask(
            Path(), "", self.sample, fit.start, fit.white, fit.map_scale, 0, "cpu", ""
        )
        stained = is_stained(picture.he, picture.glass.rgb)
        places = [
            (x_px, y_px)
            for y_px in _spread(height_px, side_px)
            for x_px in _spread(width_px, side_px)
            if stained[y_px : y_px + side_px, x_px : x_px + side_px].mean() > LEAST_TISSUE
        ]
        step = max(1, -(-len(places) // MOST_SITES))
        for x_px, y_px in places[::step]:
            he = picture.he[y_px : y_px + side_px, x_px : x_px + side_px]
            yield self._site(task, he, (x_px, y_px), stained[y_px:, x_px:][:side_px, :side_px])

    def _site(self, task: TranslateTask, he: Rgb8, at_xy: tuple[int, int], stained: Bools) -> Site:
        grid, tile_px = self.grid, self.tile_px
        inner = (grid.scale.size_out.width_px - tile_px) // 2
        regions = [grid.region_out(i) for i in range(grid.n_tiles)]
        regions.append(Region(inner, inner, tile_px, tile_px))
        tiles = np.stack([he[r.y_px : r.bottom_px, r.x_px : r.right_px] for r in regions])
        places = np.array([r[:2] for r in regions], np.int64) + np.array(at_xy)
        made = translate_tiles(self.bundle, task, tiles, places).ihc
        stitched = np.concatenate(list(stitch_bands(grid, lambda i: made[i], (0, 0, 0))))
        middle = slice(inner, inner + tile_px)
        kinds = _kinds(luma(he), stained)
        lines = [grid.stride_px - inner, grid.stride_px + grid.overlap_px - inner]
        seamed, single = luma(stitched[middle, middle]), luma(made[-1])
        return Site(
            {name: _steps(seamed, kind[middle, middle], lines) for name, kind in kinds.items()},
            {name: _steps(single, kind[middle, middle], lines) for name, kind in kinds.items()},
        )


def _kinds(grey: NDArray[np.float64], tissue: Bools) -> dict[str, Bools]:
    """Tell kinds of tissue apart on the H&E: beside glass, flat, both, dense."""
    local = (LOCAL_PX, LOCAL_PX)
    mean = cv2.blur(grey, local)
    spread = np.sqrt(np.maximum(cv2.blur(grey * grey, local) - mean**2, 0.0))
    speck, reach = (np.ones((side, side), np.uint8) for side in (SPECK_PX, 2 * NEAR_PX + 1))
    glass = cv2.morphologyEx((~tissue).astype(np.uint8), cv2.MORPH_OPEN, speck)
    near = tissue & (cv2.dilate(glass, reach) > 0)
    flat = tissue & (spread <= np.quantile(spread[tissue], 1 / 3))
    dense = tissue & (mean <= np.quantile(mean[tissue], 0.4))
    return {
        "tissue": tissue,
        "flat": flat,
        "beside glass": near,
        "flat, beside glass": flat & near,
        "dense": dense,
    }


def _steps(grey: NDArray[np.float64], kind: Bools, lines: list[int]) -> NDArray[np.float64]:
    """List |step| across columns and rows where both pixels are of a kind."""
    found = []
    for plane, mask in ((grey, kind), (grey.T, kind.T)):
        for at in lines:
            both = mask[:, at] & mask[:, at - 1]
            found.append(np.abs(plane[:, at] - plane[:, at - 1])[both])
    return np.concatenate(found)


def _spread(length_px: int, side_px: int) -> list[int]:
    """Place windows over a length, as many as fit side by side."""
    n_windows = length_px // side_px
    return np.linspace(0, length_px - side_px, n_windows).astype(int).tolist() if n_windows else []


def pictures(root: Path, mpp: float) -> Iterator[Picture]:
    """Read what there is, each at the model's pixel size."""
    for name, stated_mpp in PICTURES:
        if not stated_mpp:
            yield _from_slide(root / name, mpp)
            continue
        for path in sorted((root / name).glob("*.jpg")):
            he = cv2.cvtColor(np.asarray(cv2.imread(str(path)), np.uint8), cv2.COLOR_BGR2RGB)
            scale = choose_scale(Size(he.shape[1], he.shape[0]), stated_mpp, mpp, 0.02)
            if scale.factor != 1.0:
                how = cv2.INTER_AREA if scale.factor > 1.0 else cv2.INTER_CUBIC
                he = cv2.resize(he, tuple(scale.size_out), interpolation=how)
            rgb = np.asarray(he, np.uint8)
            yield Picture(f"{name}/{path.name}", rgb, estimate_white(rgb, (255, 255, 255)))


def _from_slide(path: Path, mpp: float) -> Picture:
    with SlideSource.open(path) as slide:
        scale = choose_scale(slide.size_l0, slide.mpp_l0, mpp, 0.02)
        rgb = slide.read_out(Region(0, 0, *scale.size_out), scale)
        return Picture(path.name, rgb, estimate_white(rgb, slide.background))


def summarize(sites: list[Site], kind: str) -> dict[str, object]:
    """Pool a kind of tissue over sites; the interval is that of resampled sites."""
    sums = np.array(
        [[s.seamed[kind].sum(), s.single[kind].sum(), s.seamed[kind].size] for s in sites]
    )
    sums = sums[sums[:, 2] > 0]
    rng = np.random.default_rng(0)
    draws = sums[rng.integers(0, len(sums), (BOOTSTRAPS, len(sums)))].sum(axis=1)
    low, high = np.quantile(draws[:, 0] / draws[:, 1], (0.025, 0.975))
    seamed, single, n_pairs = sums.sum(axis=0)
    return {
        "where": kind,
        "ratio": round(seamed / single, 4),
        "interval": [round(float(low), 4), round(float(high), 4)],
        "sites": len(sums),
        "pairs": int(n_pairs),
        "step": round(single / n_pairs, 3),
    }


def main() -> int:
    """Measure one solver."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("../shared/data"))
    parser.add_argument("--bundle", default="ki67")
    parser.add_argument("--solver", choices=["solver", "student", "teacher"], default="solver")
    arguments = parser.parse_args()
    bundle = load_bundle(arguments.bundle, pick_device("cpu"))
    bench = Bench(bundle, SampleConfig(solver=arguments.solver, batch_tiles=5))
    sites: list[Site] = []
    for picture in pictures(arguments.root, bundle.spec.mpp):
        here = list(bench.sites(picture))
        sites += here
        sys.stderr.write(f"{picture.name}: {len(here)} sites\n")
    for kind in sites[0].seamed:
        line = {"solver": arguments.solver, "bundle": arguments.bundle, **summarize(sites, kind)}
        sys.stdout.write(json.dumps(line) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
