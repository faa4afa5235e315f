"""What the training IHC looks like: measured once, carried by the bundle.

Room 2 of 4. In: training images. Out: a `ColorReference`. Not here: H&E, files, training.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from wsi_stain.config import ColorReference
from wsi_stain.errors import NoTissueError
from wsi_stain.stain.curve import as_deep
from wsi_stain.stain.density import (
    HDX,
    POSITIVE_OD,
    as_rgb,
    dab_od,
    is_stained,
    rgb_to_od,
    unmix,
)
from wsi_stain.stain.separate import angle_deg, sparse_vectors
from wsi_stain.stain.white import estimate_white

__all__ = ["N_QUANTILES", "measure_reference"]

Rgb8 = NDArray[np.uint8]

N_QUANTILES = 33
# Pale stroma counts, as it does on the H&E side. At 0.05 the nuclei of the start image come out
# pale, at 0.15 two in five pixels are left and DAB triples against real fields.
TISSUE_OD = 0.10
_PIXELS_PER_IMAGE = 20_000
_FIT_PIXELS = 200_000
_MIN_STAINED_PX = 200
_MIN_RANK_PX = 5
_MIN_CLASS_PX = 100
# Below this mean OD the hue of a pixel is that of the scanner's noise.
_MIN_BROWN_OD = 0.2
_MAX_CLEAR_OD = 3.0
_MAX_ODD_DEG = 25.0
_SATURATED = (255.0, 255.0, 255.0)


def measure_reference(
    images: Iterable[Rgb8],
    white: ArrayLike | None = None,
    tissue_od: float = TISSUE_OD,
    laboratories: Sequence[str] = (),
) -> ColorReference:
    """Measure the colors of the training IHC.

    Stain vectors come from all images together: a sparse fit that starts at `HDX`. A vector that
    ends more than 25 degrees away has found something else than its stain, and `HDX` is kept.
    Strengths and quantiles are the median over images of each image's own: one laboratory with
    black DAB (99th percentile 5.5 OD, where the others have 1.3) would else decide the dark end.
    Of the counterstain each laboratory counts once, however many images it sent: hematoxylin is as
    deep as its bath was long. Brown is not taken so: a laboratory of one field, and blackish, would
    count as much as one of fifty (hue of positives 19 degrees from DAB, in place of 12).

    Parameters
    ----------
    images
        uint8 (h, w, 3) each, glass brought to one white.
    white
        (3,) that common white; measured from the images' own glass where not given.
    tissue_od
        Natural-log OD from which a pixel counts as tissue.
    laboratories
        Where each image comes from; left out, all are of one.

    Returns
    -------
    ColorReference
        White, stain vectors, 99th percentiles of the densities, 33 quantiles of the mean OD over
        stained pixels and the OD of the prevailing stain there; the share of positive pixels and
        the colors of pixels with and without DAB; the H&E fields keep their defaults.

    Raises
    ------
    NoTissueError
        No image with 200 stained pixels among its at most 20,000 sampled ones.
    """
    samples = [_raster(image) for image in images]
    glass = np.asarray(white) if white is not None else _white_of(samples)
    fields = [
        rgb_to_od(stained, glass)
        for stained in (sample[is_stained(sample, glass)] for sample in samples)
        if len(stained) >= _MIN_STAINED_PX
    ]
    if not fields:
        raise NoTissueError(
            f"None of {len(samples)} training images has {_MIN_STAINED_PX} stained pixels.",
            hint="Check the training folders and the white of their images.",
        )
    stains = _stains(np.concatenate(fields))
    strong = np.median([np.percentile(unmix(od, stains), 99.0, axis=0) for od in fields], axis=0)
    places = np.linspace(0.0, 1.0, N_QUANTILES)
    names = laboratories or [""] * len(samples)
    pairs = [
        (name, rgb_to_od(sample[is_stained(sample, glass, tissue_od)], glass))
        for name, sample in zip(names, samples, strict=True)
    ]
    pairs = [(name, od) for name, od in pairs if len(od)]
    tissues = [od for _, od in pairs]
    means = [od.mean(axis=1, dtype=np.float64) for od in tissues]
    quantiles = np.median([np.quantile(mean, places) for mean in means], axis=0)
    blue, brown = _class_tables(pairs, stains)
    return ColorReference(
        white=as_rgb(glass),
        stain_od=(as_rgb(stains[0]), as_rgb(stains[1])),
        stain_c99=(float(strong[0]), float(strong[1])),
        mean_od_quantiles=tuple(float(value) for value in quantiles),
        ranked_od=tuple(as_rgb(od) for od in _ranked(tissues, stains, quantiles)),
        positive_share=float(np.median([np.mean(dab_od(s) > POSITIVE_OD) for s in samples])),
        blue_od=tuple(map(as_rgb, blue)),
        brown_od=tuple(map(as_rgb, brown)),
    )


def _class_tables(
    tissues: list[tuple[str, NDArray[np.float32]]], stains: NDArray[np.float64]
) -> tuple[list[NDArray[np.float64]], list[NDArray[np.float64]]]:
    """Give the colors of pixels where the counterstain prevails, and where DAB does.

    Both at 33 quantiles of their own mean OD, medians over images, of the counterstain over
    laboratories then; empty where no image has enough of a stain.
    """
    blues: defaultdict[str, list[NDArray[np.float64]]] = defaultdict(list)
    browns: list[NDArray[np.float64]] = []
    for laboratory, od in tissues:
        density = unmix(od, stains)
        brown = (density[:, 1] > density[:, 0]) & (od.mean(axis=1) > _MIN_BROWN_OD)
        for found, mask in ((blues[laboratory], ~brown), (browns, brown)):
            if np.count_nonzero(mask) >= _MIN_CLASS_PX:
                found.append(_colors_by_quantile(od[mask]))
    by_laboratory = [np.median(tables, axis=0) for tables in blues.values() if tables]
    blue = list(_median_depth(np.array(by_laboratory))) if by_laboratory else []
    return blue, list(np.median(browns, axis=0)) if browns else []


def _median_depth(tables: NDArray[np.float64]) -> NDArray[np.float64]:
    """Take the median of (n, 33, 3) colors, as deep as the median depth: their hues differ."""
    return as_deep(np.median(tables, axis=0), np.median(tables.mean(axis=2), axis=0))


def _colors_by_quantile(od: NDArray[np.float32]) -> NDArray[np.float64]:
    """Average the colors around 33 quantiles of the mean OD, (33, 3)."""
    order = np.argsort(od.mean(axis=1), kind="stable")
    sums = np.concatenate([np.zeros((1, 3)), np.cumsum(od[order], axis=0, dtype=np.float64)])
    middle = np.linspace(0, len(od) - 1, N_QUANTILES).astype(np.int64)
    half = len(od) // (2 * (N_QUANTILES - 1))
    first, last = np.maximum(middle - half, 0), np.minimum(middle + half + 1, len(od))
    colors: NDArray[np.float64] = (sums[last] - sums[first]) / (last - first)[:, None]
    return colors


def _ranked(
    tissues: list[NDArray[np.float32]], stains: NDArray[np.float64], quantiles: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Give the color that prevails at each rank of darkness, (n, 3) OD of mean `quantiles`.

    The mean color of a rank is no color of the stain: half blue and half brown is grey. So pixels
    are told apart by their larger density, and a rank takes the mean of those that prevail: the
    counterstain, and DAB above the last rank where the counterstain has the majority. Medians over
    images, as elsewhere here.
    """
    tables = [_rank_table(od, stains, len(quantiles)) for od in tissues]
    counts = np.array([count for _, count in tables], np.float64)  # image, stain, rank
    sums = np.array([total for total, _ in tables], np.float64)
    with np.errstate(invalid="ignore"):
        colors = sums / counts[..., None]
        share = np.nanmedian(counts[:, 1] / counts.sum(axis=1), axis=0)
    few = counts < _MIN_RANK_PX
    colors[few] = np.nan
    first_brown = 1 + int(np.flatnonzero(share <= 0.5).max(initial=-1))
    rows = [
        _median_color(colors[:, int(rank >= first_brown), rank], stains[int(rank >= first_brown)])
        for rank in range(len(quantiles))
    ]
    return as_deep(np.array(rows), quantiles)


def _rank_table(
    od: NDArray[np.float32], stains: NDArray[np.float64], n_ranks: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum OD (2, n, 3) and count pixels (2, n) of one image by prevailing stain and rank."""
    order = np.argsort(np.argsort(od.mean(axis=1), kind="stable"), kind="stable")
    rank = np.round(order / max(1, len(od) - 1) * (n_ranks - 1)).astype(int)
    density = unmix(od, stains)
    brown = (density[:, 1] > density[:, 0]).astype(int)
    total, count = np.zeros((2, n_ranks, 3)), np.zeros((2, n_ranks))
    np.add.at(total, (brown, rank), od)
    np.add.at(count, (brown, rank), 1.0)
    return total, count


def _median_color(colors: NDArray[np.float64], stain: NDArray[np.float64]) -> NDArray[np.float64]:
    known = colors[np.isfinite(colors).all(axis=1)]
    return np.median(known, axis=0) if len(known) else stain


def _white_of(samples: list[Rgb8]) -> NDArray[np.float64]:
    pixels = np.concatenate(samples) if samples else np.empty((0, 3), np.uint8)
    return np.array(estimate_white(pixels, _SATURATED).rgb)


def _stains(od: NDArray[np.float32]) -> NDArray[np.float64]:
    known = HDX[:2] / np.linalg.norm(HDX[:2], axis=1, keepdims=True)
    # A channel near black has lost its depth, and the pixel its direction.
    clear = od[od.max(axis=1) < _MAX_CLEAR_OD]
    found = sparse_vectors(clear[:: max(1, len(clear) // _FIT_PIXELS)], known)
    near = [angle_deg(a, b) <= _MAX_ODD_DEG for a, b in zip(found, known, strict=True)]
    return np.where(np.array(near)[:, None], found, known)


def _raster(image: Rgb8) -> Rgb8:
    step_px = max(1, int(np.sqrt(image.shape[0] * image.shape[1] / _PIXELS_PER_IMAGE)))
    return image[::step_px, ::step_px].reshape(-1, 3)
