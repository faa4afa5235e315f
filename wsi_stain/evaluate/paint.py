"""Ways to paint one image: the model as a variant runs it, and the null rows it must beat.

In: a `Subject`. Out: uint8 RGB of its crop, and how it was made. Not here: metrics, files.

The model's way is that of a slide: color fitted once on the whole image, tiles that share their
edges, noise by place, feathered. Only the store and the workers between are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from wsi_stain.config import Rgb, resolve_sampling
from wsi_stain.errors import NoTissueError
from wsi_stain.evaluate.metrics_null import fit_recolor, null_blur, null_mean, null_recolor
from wsi_stain.evaluate.metrics_seam import BorderLines
from wsi_stain.evaluate.pairs import Subject
from wsi_stain.evaluate.recipe import EvaluateConfig, NullRow, Variant, vary_spec
from wsi_stain.geometry import Scale
from wsi_stain.slides.mask import TissueMask
from wsi_stain.slides.plan import TileGrid, plan_tiles
from wsi_stain.stain.density import is_stained, lay_glass
from wsi_stain.stain.spread import OD_PER_LEVEL, spread_levels
from wsi_stain.translate.bundle import ModelBundle
from wsi_stain.translate.fit import ColorFit, fit_pictures, map_looked_at
from wsi_stain.translate.task import TranslateTask
from wsi_stain.translate.worker import choose_batch, translate_tiles
from wsi_stain.write.stitch import stitch_bands

__all__ = ["ModelPainter", "NullPainter", "Painted", "Painter", "translate_picture"]

Rgb8 = NDArray[np.uint8]

NULL_FIT_PIXELS = 100_000


class Painted(NamedTuple):
    """A painted crop, before JPEG.

    Attributes
    ----------
    picture
        uint8 (h, w, 3).
    bare
        The same before glass was laid over it.
    seams
        Where tiles meet: the lines where their strips begin, and where they end. Empty for a
        single tile.
    sd
        float32 (h, w), sd of DAB OD over seeds; None where there was one.
    """

    picture: Rgb8
    bare: Rgb8
    seams: tuple[BorderLines, ...] = ()
    sd: NDArray[np.float32] | None = None


class Painter(Protocol):
    """One row of the table: a way to turn a subject into a picture."""

    @property
    def name(self) -> str:
        """Name in the table."""

    @property
    def kind(self) -> str:
        """ "variant" or "null"."""

    def white(self, subject: Subject) -> Rgb:
        """Give the grey levels of the glass in what is painted."""

    def facts(self) -> dict[str, Any]:
        """Tell all settings that decide the picture, as plain JSON types."""

    def paint(self, subject: Subject) -> Painted:
        """Paint the crop."""


@dataclass(frozen=True)
class ModelPainter:
    """The model, run as a variant asks.

    Attributes
    ----------
    variant
        Which.
    bundle
        Loaded model; its spec is the variant's.
    config
        The evaluation's settings.
    """

    variant: Variant
    bundle: ModelBundle
    config: EvaluateConfig
    kind = "variant"

    @classmethod
    def of(cls, variant: Variant, bundle: ModelBundle, config: EvaluateConfig) -> ModelPainter:
        """Prepare a variant; refuse at once what this bundle cannot do.

        Raises
        ------
        BundleError
            The variant asks for a term whose net the bundle does not carry.
        """
        painter = cls(variant, replace(bundle, spec=vary_spec(bundle.spec, variant)), config)
        painter.bundle.sampler(*resolve_sampling(painter.bundle.spec, variant.sample))
        return painter

    @property
    def name(self) -> str:
        """Name in the table."""
        return self.variant.name

    @property
    def seed(self) -> int:
        """Seed of the noise."""
        return self.config.seed if self.variant.seed is None else self.variant.seed

    def white(self, subject: Subject) -> Rgb:
        """Give the white of the bundle's output."""
        return self.bundle.spec.color.output_white

    def facts(self) -> dict[str, Any]:
        """Tell solver, guidance, start image, seed, device and tiling."""
        spec = self.bundle.spec
        solver, guidance = resolve_sampling(spec, self.variant.sample)
        return {
            "seed": self.seed,
            "seeds": self.variant.sample.seeds,
            "start_image": self.variant.sample.start_image or spec.start_image,
            "solver": msgspec.to_builtins(solver),
            "guidance": msgspec.to_builtins(guidance),
            "stain": msgspec.to_builtins(self.config.stain),
            "tile_px": spec.tile_px,
            "overlap_px": self.config.overlap_px,
            "device": str(self.bundle.device),
            "dtype": str(self.bundle.dtype).removeprefix("torch."),
        }

    def fit(self, subject: Subject) -> ColorFit:
        """Fit the color on the whole image, once for all variants that need the same.

        Raises
        ------
        NoTissueError
            The image shows too little stain; it is named.
        """
        spec, sample = self.bundle.spec, self.variant.sample
        kind = (sample.start_image or spec.start_image, map_looked_at(spec, sample))
        if kind not in subject.fits:
            he, glass = subject.he[None], subject.glass
            try:
                subject.fits[kind] = fit_pictures(he, glass, spec, self.config.stain, sample)
            except NoTissueError as error:
                text = f"{subject.file.path}: {error.message}"
                raise NoTissueError(text, hint="Leave this image out.") from error
        return subject.fits[kind]

    def paint(self, subject: Subject) -> Painted:
        """Translate the crop."""
        return translate_picture(self, subject, self.fit(subject))


@dataclass(frozen=True, eq=False)
class NullPainter:
    """A baseline that knows no biology (EVALUATION, section 4).

    Attributes
    ----------
    row
        "source": the H&E. "null-recolor": the H&E in the colors of training IHC, by one map of
        the image. "null-blur": the same, blurred. "null-mean": one flat color.
    palette
        uint8 (n, 3), stained pixels of training IHC; empty where only the source is asked for.
    palette_digest
        SHA-256 of the palette.
    target_white
        Glass of the IHC, grey levels.
    blur_px
        Sigma of "null-blur".
    """

    row: NullRow
    palette: Rgb8
    palette_digest: str
    target_white: Rgb
    blur_px: float
    kind = "null"

    @property
    def name(self) -> str:
        """Name in the table."""
        return self.row

    def white(self, subject: Subject) -> Rgb:
        """Give the H&E's own white for the source, else that of the IHC."""
        return subject.glass.rgb if self.row == "source" else self.target_white

    def facts(self) -> dict[str, Any]:
        """Tell palette and blur, where they matter."""
        facts: dict[str, Any] = {}
        if self.row != "source":
            facts |= {"palette": self.palette_digest, "white": list(self.target_white)}
        if self.row == "null-blur":
            facts["blur_px"] = self.blur_px
        return facts

    def paint(self, subject: Subject) -> Painted:
        """Paint the crop; glass is laid over it as over the model's output."""
        he = subject.cut(subject.he)
        if self.row == "source":
            return Painted(he.copy(), he)
        bare = self._bare(subject, he)
        return Painted(lay_glass(bare, he, subject.glass.rgb, self.target_white), bare)

    def _bare(self, subject: Subject, he: Rgb8) -> Rgb8:
        if self.row == "null-mean":
            return null_mean(he.shape, self.palette)
        white = subject.glass.rgb
        pixels = subject.he[is_stained(subject.he, white)]
        if len(pixels) < 4:
            raise NoTissueError(
                f"{subject.file.path}: {len(pixels)} stained pixels are too few to recolor.",
                hint="Leave this image out.",
            )
        pixels = pixels[:: max(1, len(pixels) // NULL_FIT_PIXELS)]
        recolor = fit_recolor(pixels, self.palette, white, self.target_white)
        picture = null_recolor(he, recolor)
        return null_blur(picture, self.blur_px) if self.row == "null-blur" else picture


def translate_picture(painter: ModelPainter, subject: Subject, fit: ColorFit) -> Painted:
    """Translate a subject's crop in overlapping tiles, as a slide is.

    Parameters
    ----------
    painter
        Model and settings.
    subject
        Image. Tiles see what lies around the crop; beyond the image it is mirrored.
    fit
        Color of the whole image.

    Returns
    -------
    Painted
        The crop.
    """
    spec, crop = painter.bundle.spec, subject.crop
    grid = _all_tiles(subject, spec.tile_px, painter.config.overlap_px)
    offset = np.array([crop.x_px, crop.y_px], np.int64)
    regions = [grid.region_out(i) for i in range(grid.n_tiles)]
    places_xy = np.array([region[:2] for region in regions], np.int64) + offset
    picture = _mirrored(subject.he, places_xy.max(axis=0) + spec.tile_px)
    tiles = np.stack([picture[y : y + spec.tile_px, x : x + spec.tile_px] for x, y in places_xy])
    asked = choose_batch(painter.variant.sample.batch_tiles, painter.bundle.device, grid.n_tiles)
    batch = min(asked, grid.n_tiles)  # short batches are filled up
    task = TranslateTask(
        store=Path(),  # tiles come from memory
        bundle=spec.name,
        sample=msgspec.structs.replace(painter.variant.sample, batch_tiles=batch),
        start=fit.start,
        white=fit.white,
        map_scale=fit.map_scale,
        seed=painter.seed,
        device=painter.config.device,
        key="",
    )
    made = translate_tiles(painter.bundle, task, tiles, places_xy)
    spread = None
    if made.sd is not None:
        levels = np.repeat(spread_levels(made.sd)[..., None], 3, axis=-1)
        spread = _stitch(grid, levels)[..., 0].astype(np.float32) * np.float32(OD_PER_LEVEL)
    return Painted(_stitch(grid, made.ihc), _stitch(grid, made.bare), _seams(grid), spread)


def _stitch(grid: TileGrid, tiles: Rgb8) -> Rgb8:
    """Feather the tiles of a grid that has no gap."""
    return np.concatenate(list(stitch_bands(grid, lambda index: tiles[index], (0, 0, 0))))


def _seams(grid: TileGrid) -> tuple[BorderLines, ...]:
    """List where the strips that two tiles share begin, and where they end."""
    rows, columns = (sorted(set(side[side > 0].tolist())) for side in grid.rc.T)
    if not rows and not columns:
        return ()
    stride_px = grid.stride_px
    return tuple(
        BorderLines(
            columns=tuple(column * stride_px + shift_px for column in columns),
            rows=tuple(row * stride_px + shift_px for row in rows),
            stride_px=stride_px,
        )
        for shift_px in (0, grid.overlap_px)
    )


def _all_tiles(subject: Subject, tile_px: int, overlap_px: int) -> TileGrid:
    """Plan tiles over the whole crop, glass too."""
    scale = Scale(subject.scale.factor, subject.scale.mpp_out, subject.crop.size)
    everything = TissueMask(np.ones((1, 1), np.bool_), scale.mpp_out, 1e9)
    return plan_tiles(
        scale,
        everything,
        tile_px=tile_px,
        overlap_px=overlap_px,
        tissue_min_fraction=0.0,
        shard_tiles=1,
    )


def _mirrored(picture: Rgb8, reach_xy: NDArray[np.int64]) -> Rgb8:
    """Mirror a picture over its right and bottom edge until it reaches far enough."""
    height_px, width_px = picture.shape[:2]
    more_x = max(0, int(reach_xy[0]) - width_px)
    more_y = max(0, int(reach_xy[1]) - height_px)
    return np.pad(picture, ((0, more_y), (0, more_x), (0, 0)), mode="reflect")
