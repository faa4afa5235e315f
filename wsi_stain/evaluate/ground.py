"""What a picture is measured on: its frame, its tissue, its glass, its uncertainty.

In: a picture, virtual or real, and what a run left beside it. Out: a `Ground`. Not here: measuring.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wsi_stain.config import QuantifyConfig, Rgb
from wsi_stain.errors import OutputError
from wsi_stain.geometry import Region, Scale, choose_scale
from wsi_stain.layout import OUTPUT_SUFFIXES, RUN_SUFFIX, UNCERTAINTY_SUFFIX, RunFiles, safe_name
from wsi_stain.manifest import RunManifest, RunRecord
from wsi_stain.slides.image import SlideSource
from wsi_stain.slides.mask import TissueMask
from wsi_stain.slides.openslide_read import open_backend
from wsi_stain.slides.slide_facts import Level
from wsi_stain.slides.tissue import find_tissue
from wsi_stain.stain.spread import OD_PER_LEVEL
from wsi_stain.stain.white import estimate_white
from wsi_stain.write.overview import HeFolder

__all__ = ["Ground", "Uncertainty", "find_ground", "open_uncertainty", "picture_name", "run_beside"]

PALEST_PERCENT = 2.0
CACHE_MB = 16


@dataclass(frozen=True)
class Uncertainty:
    """The spread over noise seeds, beside the picture; its level 0 lies over the picture's.

    Attributes
    ----------
    path
        The file: grey levels of `OD_PER_LEVEL` each. Opened for each read.
    levels
        Of that file.
    """

    path: Path
    levels: tuple[Level, ...]

    def read(self, region: Region, level: int = 0) -> NDArray[np.float32]:
        """Read a region of level px that lies inside: float32 (h, w), sd of DAB OD, log10."""
        # Not a SlideSource: that refuses a black picture, and most of this one should be black.
        with closing(open_backend(self.path, CACHE_MB)) as backend:
            grey = backend.read(level, region)[..., 0]
        return grey.astype(np.float32) * np.float32(OD_PER_LEVEL)

    def overview(self, most_px: int) -> tuple[NDArray[np.float32], float]:
        """Read the largest level of at most `most_px`, or the smallest: sd, level-0 px per px."""
        fitting = [i for i, level in enumerate(self.levels) if level.size.area_px <= most_px]
        index = fitting[0] if fitting else len(self.levels) - 1
        level = self.levels[index]
        return self.read(Region(0, 0, *level.size), index), level.downsample


@dataclass(frozen=True)
class Ground:
    """What a picture is measured on.

    Attributes
    ----------
    scale
        The frame in which pixels are measured, over the picture's level 0; never finer than it.
    detail_um
        Pixel size of the coarsest picture on the way: this frame, or the H&E that a run enlarged.
        What is smaller was seen by nobody.
    mask
        Tissue.
    white
        Grey levels of the glass.
    tissue_origin, white_origin
        Where both come from, for a person.
    is_virtual
        Whether a run lies beside the picture.
    uncertainty
        None where there is none.
    """

    scale: Scale
    detail_um: float
    mask: TissueMask
    white: Rgb
    tissue_origin: str
    white_origin: str
    is_virtual: bool
    uncertainty: Uncertainty | None


def picture_name(path: Path) -> str:
    """Name a picture without its ending: what its files beside it begin with.

    A scan beside a run of the same name keeps its ending: that name is taken by the run's picture.
    """
    for suffix in OUTPUT_SUFFIXES.values():
        if path.name.endswith(suffix):
            return path.name.removesuffix(suffix)
    name = safe_name(path.name)
    is_taken = path.with_name(name + RUN_SUFFIX).is_dir()
    return f"{name}_{path.suffix.lstrip('.')}" if is_taken else name


def run_beside(path: Path) -> RunFiles | None:
    """Find the run that made a picture, if its folder lies beside."""
    if not path.name.endswith(tuple(OUTPUT_SUFFIXES.values())):
        return None  # a scan, whatever lies beside it
    files = RunFiles(path, path.with_name(picture_name(path) + RUN_SUFFIX))
    return files if files.manifest.is_file() else None


def find_ground(source: SlideSource, config: QuantifyConfig) -> Ground:
    """Settle frame, tissue and glass of a picture.

    Of a run's picture the tissue is that of its H&E and the glass that of its model; of any other
    both are found in the picture itself.

    Parameters
    ----------
    source
        The opened picture.
    config
        Settings.

    Raises
    ------
    OutputError
        The run beside the picture has another size, or its record is damaged.
    """
    mpp = max(config.mpp, source.mpp_l0)
    scale = choose_scale(source.size_l0, source.mpp_l0, mpp, config.mpp_tolerance)
    run = run_beside(source.path)
    record = None if run is None else RunManifest.load(run.manifest).content
    kept = None if run is None else HeFolder(run.he)
    thumbnail = source.thumbnail(config.mask_mpp)
    if kept is not None and kept.exists:
        he = kept.record()
        if he.size_out != source.size_l0:
            raise OutputError(
                f"{source.path} has {source.size_l0}, the run beside it made {he.size_out}.",
                hint="Move the picture away from that run, or translate again.",
            )
        mask_mpp = he.mask_step * source.mpp_l0
        mask, tissue_origin = TissueMask(kept.tissue(), mask_mpp, he.mask_step), "H&E of the run"
    else:
        downsample = config.mask_mpp / source.mpp_l0
        mask = find_tissue(thumbnail, mpp=config.mask_mpp, downsample=downsample)
        tissue_origin = "this picture"
    white, white_origin = _run_white(record) or _picture_white(thumbnail, source)
    return Ground(
        scale=scale,
        detail_um=scale.mpp_out if record is None else record.detail_um(scale.mpp_out),
        mask=mask,
        white=white,
        tissue_origin=tissue_origin,
        white_origin=white_origin,
        is_virtual=run is not None,
        uncertainty=open_uncertainty(source),
    )


def _run_white(record: RunRecord | None) -> tuple[Rgb, str] | None:
    """Read the model's glass from the run's record; none where no color was fitted."""
    white = None if record is None else record.output_white
    return None if white is None else (white, "model of the run")


def _picture_white(thumbnail: NDArray[np.uint8], source: SlideSource) -> tuple[Rgb, str]:
    """Find the glass; where a field shows none, its palest pixels come nearest."""
    white = estimate_white(thumbnail, source.background)
    if white.origin == "glass":
        return white.rgb, "glass of this picture"
    palest = np.percentile(thumbnail.reshape(-1, 3), 100.0 - PALEST_PERCENT, axis=0)
    red, green, blue = (float(level) for level in palest)
    return (red, green, blue), f"palest {PALEST_PERCENT:g} % of this picture, no glass in view"


def open_uncertainty(source: SlideSource) -> Uncertainty | None:
    """Open the spread over seeds beside a picture; none where there is no such file.

    Raises
    ------
    OutputError
        It has another size.
    """
    path = source.path.with_name(picture_name(source.path) + UNCERTAINTY_SUFFIX)
    if not path.is_file():
        return None
    with closing(open_backend(path, CACHE_MB)) as backend:
        facts = backend.facts
    if facts.size_l0 != source.size_l0:
        raise OutputError(
            f"{path} has {facts.size_l0}, the picture beside it {source.size_l0}.",
            hint="Translate again with --seeds, or move that file away.",
        )
    return Uncertainty(path, facts.levels)
