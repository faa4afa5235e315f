"""Start images: what the reverse process begins from, made from the H&E by one map per slide.

Room 2 of 4. In: the slide's `StainTransform`, its tissue pixels, a `ColorReference`. Out: a
`StartTransform` of plain numbers. Not here: noise, nets, tiles.

Slow color survives the noising, so the start image carries most of the color decision (METHOD,
section 2). Every kind is fitted once per slide; all but "nuclei" are functions of the pixel alone.
"""

from __future__ import annotations

import numpy as np
from msgspec import structs
from numpy.typing import ArrayLike, NDArray

from wsi_stain.config import ColorReference, Rgb, Settings, StartImage
from wsi_stain.errors import BundleError, ConfigError, NoTissueError
from wsi_stain.stain.curve import follow_curve, follow_curves, merge_equal, merge_light
from wsi_stain.stain.density import as_rgb, glass_alpha, is_stained, render_od
from wsi_stain.stain.normalize import MIN_STAINED_PX, StainTransform
from wsi_stain.stain.nuclei import NucleusColors, fit_nuclei, nucleus_light

__all__ = ["COLOR_VERSION", "StartTransform", "fit_nuclei_start", "fit_start"]

# Part of what shards, teacher pairs and evaluated rows are known by. Raise it where the same
# numbers begin to give another start image, or other glass.
COLOR_VERSION = 4

Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]
Rgb8 = NDArray[np.uint8]

# Direction and strength of an IHC background's faint grey-blue; eosin goes there in `palette`.
FAINT_OD = (0.64, 0.58, 0.50)
FAINT_STRENGTH_OD = 0.15
# In `ranked`, stroma takes so much mean OD per 99th percentile of eosin: without it pale tissue
# passes for glass.
STROMA_OD = 0.32
_MAX_EOSIN = 1.2
_IDENTITY = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


class StartTransform(Settings, frozen=True, kw_only=True):
    """The map from a slide's H&E to its start image.

    Attributes
    ----------
    kind
        Which start image.
    stain
        The slide's color map, applied first.
    target_white
        Grey levels of the IHC's glass.
    rows
        Acts on the normalized OD: three rows give an OD per channel, one row a density that
        `curve_in` and `curve_out` turn into one OD for all channels. Two rows: that, and the
        eosin density in units of its 99th percentile.
    curve_in, curve_out
        Knots of the monotone curve, density to OD; empty where there are three rows.
    curve_rgb
        OD per channel at the same knots, where the color follows the density too.
    stroma_rgb
        OD per channel that one unit of eosin adds.
    nuclei
        Colors of start image "nuclei", which looks around each pixel.
    """

    kind: StartImage
    stain: StainTransform
    target_white: Rgb
    rows: tuple[Rgb, ...]
    curve_in: tuple[float, ...] = ()
    curve_out: tuple[float, ...] = ()
    curve_rgb: tuple[Rgb, ...] = ()
    stroma_rgb: Rgb = (0.0, 0.0, 0.0)
    nuclei: NucleusColors | None = None

    def apply(self, rgb: Rgb8) -> Rgb8:
        """Make the start image of a picture.

        Parameters
        ----------
        rgb
            uint8 (..., 3), H&E of the slide that the map was fitted on; (..., h, w, 3) for
            "nuclei".

        Returns
        -------
        ndarray
            uint8, same shape. With a curve: neutral grey relative to `target_white`, or the color
            of `curve_rgb`, and exactly that white where the H&E shows glass.
        """
        if self.kind == "source":
            return rgb.copy()
        if not self.curve_in and self.nuclei is None:
            return self._render(rgb)
        if rgb.size == 0:
            return rgb.copy()
        densities = self.stain.project(rgb, self.rows)
        tissue = 1.0 - glass_alpha(rgb, self.stain.white, sigma_px=0.0)
        if self.nuclei is not None:
            return merge_light(nucleus_light(densities, tissue, self.nuclei), self.target_white)
        if self.curve_rgb:
            return self._render_ranked(densities, tissue)
        od = follow_curve(densities[..., 0], self.curve_in, self.curve_out)
        od *= tissue
        return merge_light([np.exp(-od)] * 3, self.target_white)

    def _render_ranked(self, densities: Floats, tissue: Floats) -> Rgb8:
        eosin = np.clip(densities[..., 1], 0.0, _MAX_EOSIN)
        channels = tuple(zip(*self.curve_rgb, strict=True))
        ods = follow_curves(densities[..., 0], self.curve_in, channels)
        lights = []
        for od, stroma in zip(ods, self.stroma_rgb, strict=True):
            od += np.float32(stroma) * eosin
            od *= tissue
            lights.append(np.exp(-od))
        return merge_light(lights, self.target_white)

    def _render(self, rgb: Rgb8) -> Rgb8:
        rows = np.array(self.rows)
        if self.stain.lab is not None:
            normal = self.stain.apply(rgb)
            return render_od(normal, self.stain.target_white, rows, self.target_white)
        od_map = rows @ np.array(self.stain.od_map)
        return render_od(rgb, self.stain.white, od_map, self.target_white)


def fit_start(
    pixels: Rgb8,
    white: ArrayLike,
    transform: StainTransform,
    reference: ColorReference,
    kind: StartImage,
) -> StartTransform:
    """Fit the start image of one slide.

    Parameters
    ----------
    pixels
        uint8 (n, 3), sampled over the slide's tissue: those that `transform` was fitted on.
    white
        (3,) grey levels of the slide's glass; must be the transform's own.
    transform
        The slide's color map.
    reference
        Colors of the training IHC.
    kind
        "ranked": hematoxylin density by rank, in the color that prevails at this rank of the
        IHC's darkness (pale, blue, brown), and a breath of counterstain where eosin is.
        "haematoxylin": the hematoxylin density alone, its quantiles over the slide's tissue
        matched to those of the IHC's mean OD. "grey": the mean OD of all channels, matched
        likewise. "palette": hematoxylin in the IHC's hematoxylin, eosin in a faint grey-blue.
        "stain": the normalized H&E. "source": the H&E untouched (a null row, and identity tests).

    Returns
    -------
    StartTransform
        Applies to any picture of this slide.

    Raises
    ------
    BundleError
        The reference holds no quantiles, and `kind` needs them.
    NoTissueError
        Fewer than `MIN_STAINED_PX` stained pixels to match.
    ConfigError
        `white` is not the transform's; `kind` is "nuclei", see `fit_nuclei_start`.
    """
    if kind == "nuclei":
        raise ConfigError("Start image 'nuclei' looks around each pixel: it is fitted on pictures.")
    if not np.allclose(np.asarray(white, dtype=np.float64), transform.white):
        raise ConfigError(
            f"White {as_rgb(white)} is not that of the color map, {transform.white}.",
            hint="Fit the color map and the start image with the same white.",
        )
    if kind in ("stain", "source"):
        return _linear(kind, transform, reference, np.eye(3))
    densities = _density_rows(reference)
    if kind == "palette":
        return _linear(kind, transform, reference, _palette(reference) @ densities)
    row = densities[0] if kind in ("ranked", "haematoxylin") else np.full(3, 1.0 / 3.0)
    matched = _matched(kind, transform, reference, pixels, row)
    return _colored(matched, densities[1], reference) if kind == "ranked" else matched


def fit_nuclei_start(
    he: Rgb8,
    tissue: NDArray[np.bool_],
    transform: StainTransform,
    reference: ColorReference,
    mpp: float,
) -> StartTransform:
    """Fit start image "nuclei": dense nuclei brown as a whole, the others blue, stroma pale.

    Parameters
    ----------
    he
        uint8 (n, h, w, 3), pictures of the slide's tissue.
    tissue
        bool (n, h, w), their stained pixels.
    transform
        The slide's color map.
    reference
        Colors of the training IHC.
    mpp
        Pixel size of the pictures, um.

    Returns
    -------
    StartTransform
        Applies to any picture of this slide.

    Raises
    ------
    BundleError
        The reference holds no colors of single stains.
    NoTissueError
        Fewer than `MIN_STAINED_PX` stained pixels.
    """
    _require_stained(int(tissue.sum()))
    hematoxylin, eosin = _density_rows(reference)
    rows = (as_rgb(hematoxylin), as_rgb(eosin / reference.he_stain_c99[1]))
    densities = transform.project(he, rows)
    return StartTransform(
        kind="nuclei",
        stain=transform,
        target_white=reference.white,
        rows=rows,
        nuclei=fit_nuclei(densities, tissue, reference, mpp),
    )


def _density_rows(reference: ColorReference) -> Doubles:
    """Give the (2, 3) map from normalized OD to the densities of hematoxylin and eosin."""
    rows: Doubles = np.linalg.pinv(np.array(reference.he_stain_od)).T
    return rows


def _require_stained(n_px: int) -> None:
    if n_px < MIN_STAINED_PX:
        raise NoTissueError(
            f"Only {n_px} stained pixels to match a start image on; {MIN_STAINED_PX} are needed.",
            hint="Look at the slide: is there tissue, and is its white background right?",
        )


def _colored(start: StartTransform, eosin: Doubles, reference: ColorReference) -> StartTransform:
    """Give each knot of the curve the color of its darkness."""
    if len(reference.ranked_od) != len(reference.mean_od_quantiles):
        raise BundleError(
            f"The bundle's color reference has {len(reference.ranked_od)} colors for "
            f"{len(reference.mean_od_quantiles)} OD quantiles; start image 'ranked' needs one "
            "for each.",
            hint="Choose start image 'haematoxylin', or train the bundle anew.",
        )
    table = np.array(reference.ranked_od)
    channels = [np.interp(start.curve_out, reference.mean_od_quantiles, c) for c in table.T]
    pale = table[len(table) // 4]
    return structs.replace(
        start,
        rows=(*start.rows, as_rgb(eosin / reference.he_stain_c99[1])),
        curve_rgb=tuple(as_rgb(color) for color in np.stack(channels, axis=1)),
        stroma_rgb=as_rgb(STROMA_OD * pale / pale.mean()),
    )


def _linear(
    kind: StartImage, transform: StainTransform, reference: ColorReference, rows: Doubles
) -> StartTransform:
    return StartTransform(
        kind=kind,
        stain=transform,
        target_white=reference.white,
        rows=(as_rgb(rows[0]), as_rgb(rows[1]), as_rgb(rows[2])),
    )


def _palette(reference: ColorReference) -> Doubles:
    """Give the (3, 2) map from H&E densities to IHC OD, strong pixels to strong pixels."""
    h_scale = reference.stain_c99[0] / reference.he_stain_c99[0]
    e_scale = FAINT_STRENGTH_OD / reference.he_stain_c99[1]
    faint = np.array(FAINT_OD) / np.linalg.norm(FAINT_OD)
    return np.stack([np.array(reference.stain_od[0]) * h_scale, faint * e_scale], axis=1)


def _matched(
    kind: StartImage,
    transform: StainTransform,
    reference: ColorReference,
    pixels: Rgb8,
    row: Doubles,
) -> StartTransform:
    targets = reference.mean_od_quantiles
    if len(targets) < 2:
        raise BundleError(
            f"The bundle's color reference has {len(targets)} OD quantiles; start image {kind!r} "
            "needs at least 2.",
            hint="Choose start image 'stain' or 'palette', or train the bundle anew.",
        )
    stained = pixels.reshape(-1, 3)
    stained = stained[is_stained(stained, transform.white)]
    _require_stained(len(stained))
    density = np.maximum(transform.project(stained, row[None])[:, 0], 0.0)
    knots = np.quantile(density.astype(np.float64), np.linspace(0, 1, len(targets)))
    curve_in, merged = merge_equal(knots, np.array(targets)[:, None])
    curve_out = tuple(np.maximum.accumulate(merged[:, 0]).tolist())
    return StartTransform(
        kind=kind,
        stain=transform,
        target_white=reference.white,
        rows=(as_rgb(row),),
        curve_in=curve_in,
        curve_out=curve_out,
    )
