"""Room 3 of 4: all that is fitted once per slide, on pictures of its tissue.

In: H&E pictures, the slide's white, settings. Out: a `ColorFit` of plain numbers. Not here: which
pictures are taken, any fit per tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from wsi_stain.config import BundleSpec, Rgb, SampleConfig, StainConfig, resolve_sampling
from wsi_stain.stain.density import is_stained
from wsi_stain.stain.doubt import doubt_he
from wsi_stain.stain.normalize import StainTransform, fit_stain
from wsi_stain.stain.start import StartTransform, fit_nuclei_start, fit_start
from wsi_stain.stain.white import WhitePoint

__all__ = ["ColorFit", "fit_pictures", "map_looked_at"]


@dataclass(frozen=True)
class ColorFit:
    """All that is fitted once per slide.

    Attributes
    ----------
    white
        The slide's glass, grey levels.
    stain
        Normalization of the H&E.
    start
        Start image.
    output_white
        Glass of the output, grey levels.
    map_scale
        99th percentile of the gradient map over tissue; none where no term looks at the map.
    notes
        Doubts a person should hear of.
    """

    white: tuple[float, float, float]
    stain: StainTransform
    start: StartTransform
    output_white: Rgb
    map_scale: float | None
    notes: tuple[str, ...] = ()

    def numbers(self) -> dict[str, Any]:
        """Plain numbers for the manifest and for keys."""
        return {
            "white": list(self.white),
            "stain": msgspec.to_builtins(self.stain),
            "start": msgspec.to_builtins(self.start),
            "output_white": list(self.output_white),
        } | ({} if self.map_scale is None else {"map_scale": self.map_scale})


def fit_pictures(
    he: NDArray[np.uint8],
    glass: WhitePoint,
    spec: BundleSpec,
    config: StainConfig,
    sample: SampleConfig,
) -> ColorFit:
    """Fit the color of one slide on pictures of its tissue.

    Parameters
    ----------
    he
        uint8 (n, h, w, 3), H&E of the slide at the model's pixel size.
    glass
        The slide's white.
    spec, config, sample
        The bundle's spec; how to fit; what is sampled (start image, gradient map).

    Returns
    -------
    ColorFit
        For the whole slide.

    Raises
    ------
    NoTissueError
        Too few stained pixels.
    """
    tissue = is_stained(he, glass.rgb)
    pixels = he[tissue]
    step = max(1, len(pixels) // config.fit_pixels)
    stain = fit_stain(pixels[::step], glass.rgb, spec.color, config.method)
    kind = sample.start_image or spec.start_image
    if kind == "nuclei":
        start = fit_nuclei_start(he, tissue, stain, spec.color, spec.mpp)
    else:
        start = fit_start(pixels[::step], glass.rgb, stain, spec.color, kind)
    notes = [*doubt_he(pixels[::step], glass.rgb), *stain.notes]
    if glass.origin == "background":
        notes.append(f"Little bare glass in view: white {glass.rgb} is the file's own background.")
    map_kind = map_looked_at(spec, sample)
    map_scale = None
    if map_kind is not None:
        from wsi_stain.translate.maps import measure_map_scale

        map_scale = measure_map_scale(start.apply(he), tissue, map_kind)
    return ColorFit(glass.rgb, stain, start, spec.color.output_white, map_scale, tuple(notes))


def map_looked_at(spec: BundleSpec, sample: SampleConfig) -> str | None:
    """Name the gradient map that a term of the guidance looks at; none where none does."""
    _, guidance = resolve_sampling(spec, sample)
    return guidance.gradient_map if guidance is not None and guidance.sees_map else None
