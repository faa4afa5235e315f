"""What makes a pyramid sound: rules over facts that were read from a file.

Room 4 of 4. In: facts and pixels. Out: problems, one line each. Not here: opening files.

Every rule stands for a reader that shows too little, too large or the wrong color otherwise, or
for a writer that lost tiles without an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from wsi_stain.geometry import Region, Size
from wsi_stain.write.omexml import MICROMETER, OmeFacts, parse_ome_xml

__all__ = [
    "FileView",
    "LevelView",
    "check_frame",
    "check_glass",
    "check_layout",
    "check_level",
    "check_tiles",
    "check_tissue",
    "check_xml",
]

Pixels = npt.NDArray[np.uint8]

MPP_TOLERANCE = 1e-3  # a rational tag gives 0.499 back as 0.4989999
SANE_MPP = (0.05, 20.0)
READABLE_CODECS = {1: "none", 5: "LZW", 7: "JPEG"}  # by all of the readers that we support
JPEG, LZW = 7, 5
RGB, YCBCR = 2, 6
FLAT_SD = 0.5  # grey levels: JPEG keeps a single color exactly, and any stain varies more
WHITE_OD = 0.15  # natural log; white is what stays below in all channels
PALE_OD = 0.02  # mean over a region that is mostly tissue: no stain at all
STAINED_FRACTION = 0.05


@dataclass(frozen=True)
class LevelView:
    """One level as its IFD states it.

    Attributes
    ----------
    ifd
        Offset of the IFD in the file.
    offsets, counts
        Place and length of each tile, bytes, int64 (n,).
    heads, tails
        First and last two bytes of each tile as they are in the file; b"" outside of it.
    mpp
        Pixel size from the resolution tags, um/px; 0 where there is none.
    subsampling
        Tag 530, or `None`.
    """

    ifd: int
    size: Size
    tile_size: Size
    samples: int
    bits: int
    photometric: int
    codec: int
    mpp: float
    reduced: bool
    subsampling: tuple[int, int] | None
    offsets: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    heads: tuple[bytes, ...]
    tails: tuple[bytes, ...]

    @property
    def n_tiles(self) -> int:
        """Tiles that cover the level."""
        width_px, height_px = self.tile_size
        return -(-self.size.width_px // width_px) * -(-self.size.height_px // height_px)


@dataclass(frozen=True)
class FileView:
    """A TIFF as its structure states it; `chain` and `subifds` are IFD offsets."""

    n_bytes: int
    description: str
    chain: tuple[int, ...]
    subifds: tuple[int, ...]
    levels: tuple[LevelView, ...]


def check_layout(view: FileView) -> Iterator[str]:
    """Check that both kinds of readers find all levels, and that these halve."""
    first = view.levels[0]
    if not view.subifds and len(view.levels) > 1:
        yield (
            "IFD 0 names no SubIFDs: Bio-Formats and QuPath see 1 level of "
            f"{len(view.levels)} in the main chain"
        )
    elif view.chain != (first.ifd, *view.subifds):
        yield (
            f"the main chain has {len(view.chain)} IFDs, not IFD 0 and its {len(view.subifds)} "
            "SubIFDs: OpenSlide misses levels"
        )
    if len(view.levels) == 1 and max(first.size) > 4096:
        yield f"there is only one level, of {first.size}"
    for number, (below, level) in enumerate(pairwise(view.levels), start=1):
        half = Size(-(-below.size.width_px // 2), -(-below.size.height_px // 2))
        if level.size != half:
            yield f"level {number} is {level.size}, not {half}"
        if not level.reduced:
            yield f"level {number} is not marked as a reduced image (tag 254)"


def check_level(number: int, level: LevelView) -> Iterator[str]:
    """Check that every reader decodes this level, in the right colors."""
    if level.samples != 3 or level.bits != 8 or level.photometric not in (RGB, YCBCR):
        yield (
            f"level {number} is not 8-bit RGB ({level.samples} samples of {level.bits} bits, "
            f"photometric {level.photometric})"
        )
    if level.codec not in READABLE_CODECS:
        yield f"level {number} has codec {level.codec}, which not all readers decode"
    if 0 in level.tile_size or level.tile_size.width_px % 16 or level.tile_size.height_px % 16:
        yield f"level {number} is not tiled in multiples of 16 px ({level.tile_size})"
    full_chroma = level.photometric == YCBCR and level.subsampling == (1, 1)
    if level.codec == JPEG and full_chroma:
        yield f"level {number} states subsampling (1, 1) in tag 530: Bio-Formats shows it pink"


def check_tiles(number: int, level: LevelView, n_bytes: int) -> Iterator[str]:
    """Check that each tile is there, inside the file, and begins and ends as its codec does."""
    if 0 in level.tile_size:
        return
    if len(level.offsets) != level.n_tiles or len(level.counts) != level.n_tiles:
        yield f"level {number} lists {len(level.counts)} tiles instead of {level.n_tiles}"
        return
    empty = (level.counts <= 0) | (level.offsets <= 0)
    cut = ~empty & (level.offsets + level.counts > n_bytes)
    heads = np.array([_begins_well(head, level.codec) for head in level.heads])
    tails = np.array([level.codec != JPEG or tail == b"\xff\xd9" for tail in level.tails])
    for flags, what in (
        (empty, "is missing (no bytes)"),
        (cut, f"reaches beyond the end of the file at {n_bytes} bytes"),
        (~empty & ~cut & ~heads, "does not begin like its codec"),
        (~empty & ~cut & heads & ~tails, "has no end marker"),
    ):
        wrong = np.flatnonzero(flags)
        if wrong.size:
            yield f"level {number}: tile {wrong[0]} {what}; {wrong.size} of {level.n_tiles} so"


def _begins_well(head: bytes, codec: int) -> bool:
    if codec == JPEG:
        return head == b"\xff\xd8"
    return codec != LZW or head[:1] == b"\x80"  # the clear code


def check_xml(view: FileView) -> tuple[OmeFacts | None, list[str]]:
    """Check the OME-XML against the file; give what it says, if it can be parsed."""
    try:
        facts = parse_ome_xml(view.description)
    except ValueError as error:
        return None, [f"the OME-XML in IFD 0 cannot be used: {error}"]
    return facts, list(_xml_problems(facts, view.levels[0].size))


def _xml_problems(facts: OmeFacts, size: Size) -> Iterator[str]:
    if facts.n_images != 1:
        yield f"the OME-XML has {facts.n_images} images instead of 1"
    if facts.n_channels != 1 or facts.samples_per_pixel != "3":
        yield (
            f"the OME-XML has {facts.n_channels} channels of {facts.samples_per_pixel or '?'} "
            "samples instead of one of 3: QuPath does not show RGB"
        )
    if facts.pixel_type != "uint8":
        yield f"the OME-XML says type {facts.pixel_type!r} instead of 'uint8'"
    if facts.size != size:
        yield f"the OME-XML says {facts.size}, the TIFF {size}"
    if facts.mpp_x is None or facts.mpp_y is None:
        yield "the OME-XML lacks PhysicalSizeX or PhysicalSizeY: QuPath is not calibrated"
    if (facts.unit_x, facts.unit_y) != (MICROMETER, MICROMETER):
        yield f"the OME-XML has units {facts.unit_x!r}, {facts.unit_y!r} instead of um"


def check_frame(
    levels: tuple[LevelView, ...],
    xml: OmeFacts | None,
    size: Size | None = None,
    mpp_out: float | None = None,
) -> Iterator[str]:
    """Check size and pixel size: what each place states, and what was asked for."""
    first = levels[0]
    if size is not None and first.size != size:
        yield f"level 0 is {first.size} instead of {size}"
    if not SANE_MPP[0] <= first.mpp <= SANE_MPP[1]:
        yield f"level 0: the resolution tags say {first.mpp:.6g} um/px, no sane pixel size"
        return
    stated_mpp = (xml.mpp_x, xml.mpp_y) if xml else (None, None)
    true_mpp = mpp_out or stated_mpp[0] or first.mpp
    for number, level in enumerate(levels):
        if not close(level.mpp, true_mpp * 2**number):
            yield (
                f"level {number}: the resolution tags say {level.mpp:.6g} um/px instead of "
                f"{true_mpp * 2**number:.6g}"
            )
    for axis, value in zip("XY", stated_mpp, strict=True):
        if value is not None and not close(value, true_mpp):
            yield f"PhysicalSize{axis} is {value:.6g} um instead of {true_mpp:.6g}"


def close(mpp: float, true_mpp: float) -> bool:
    """Tell whether two pixel sizes agree as well as a rational tag allows."""
    return true_mpp > 0 and abs(mpp / true_mpp - 1) <= MPP_TOLERANCE


def check_tissue(
    region: Region, pixels: Pixels, white: tuple[float, float, float]
) -> Iterator[str]:
    """Check that a region that is mostly tissue shows some, uint8 (h, w, 3)."""
    place = _place("tissue", region)
    spread = float(pixels.reshape(-1, 3).std(axis=0).max())
    mean_od = float(_density(pixels, white).mean())
    if spread < FLAT_SD:
        yield f"{place} is blank: standard deviation {spread:.2f} grey levels"
    elif mean_od < PALE_OD:
        yield f"{place} is blank: mean optical density {mean_od:.3f}"


def check_glass(region: Region, pixels: Pixels, white: tuple[float, float, float]) -> Iterator[str]:
    """Check that a region of bare glass carries no stain, uint8 (h, w, 3)."""
    stained = float((_density(pixels, white) >= WHITE_OD).any(axis=-1).mean())
    if stained > STAINED_FRACTION:
        mean = ", ".join(f"{value:.0f}" for value in pixels.reshape(-1, 3).mean(axis=0))
        yield (
            f"{_place('glass', region)} is stained: {100 * stained:.0f} % of its pixels, "
            f"mean color ({mean})"
        )


def _place(what: str, region: Region) -> str:
    return f"{what} at x {region.x_px}, y {region.y_px}, {region.width_px} x {region.height_px} px"


def _density(pixels: Pixels, white: tuple[float, float, float]) -> npt.NDArray[np.float64]:
    """Natural-log optical density, float64 (h, w, 3); brighter than white is 0."""
    ratio: npt.NDArray[np.float64] = np.maximum(pixels, 1) / np.array(white, np.float64)
    return np.asarray(np.maximum(0.0, -np.log(ratio)))
