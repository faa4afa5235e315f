"""The H&E beside the result: what a report needs once the slide is out of reach.

Room 4 of 4. In: an opened slide, its out frame, its tissue. Out: a small folder: an overview, the
tissue mask, some fields in full resolution, a record. Not here: the report.

A manifest names no slide, so the report cannot open it again; and it must work on a machine that
never saw it. Written while the slide is open, the folder is a few megabytes whatever the slide.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import msgspec
import numpy as np
import numpy.typing as npt

from wsi_stain.errors import OutputError
from wsi_stain.files import atomic_write_bytes
from wsi_stain.geometry import Region, Scale, Size
from wsi_stain.slides.image import SlideSource
from wsi_stain.slides.mask import TissueMask

__all__ = ["HeFolder", "HeRecord", "choose_fields", "choose_reduction", "keep_he"]

Pixels = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]

HE_SCHEMA = 1
OVERVIEW_MAX_PX = 16_000_000
OVERVIEW_MAX_SIDE_PX = 32_768  # JPEG's own limit is 65,535
OVERVIEW_QUALITY = 95
FIELD_PX = 512
MOST_FIELDS = 24
FIELD_TISSUE = 0.5  # least share of tissue in a field, where there are such


class HeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What lies in the folder.

    Attributes
    ----------
    slide_digest
        Which slide.
    marker
        What it was translated to.
    size_out, mpp_out
        The out frame, px and um/px.
    reduction
        Out px per overview px, a power of two.
    mask_step
        Out px per mask px.
    fields
        Left, top, width, height of each field, px of the out frame.
    """

    schema: int = HE_SCHEMA
    slide_digest: str
    marker: str
    size_out: Size
    mpp_out: float
    reduction: int
    mask_step: float
    fields: tuple[Region, ...]


class HeFolder:
    """The folder: names, and reading.

    Parameters
    ----------
    path
        The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def exists(self) -> bool:
        """Whether it was written to its end: the record comes last."""
        return self._record_path.is_file()

    def holds(self, record: HeRecord) -> bool:
        """Tell whether just this was kept already."""
        return self.exists and self._record_path.read_bytes() == _encode_record(record)

    def record(self) -> HeRecord:
        """Read the record.

        Raises
        ------
        OutputError
            Missing, damaged, or of another version.
        """
        hint = "Give the slide again: wsi-stain report RUN --slide SLIDE"
        try:
            record = msgspec.json.decode(self._record_path.read_bytes(), type=HeRecord)
        except (OSError, msgspec.DecodeError) as error:
            raise OutputError(f"{self._record_path} cannot be read: {error}.", hint=hint) from error
        if record.schema != HE_SCHEMA:
            raise OutputError(
                f"{self._record_path} has schema {record.schema}, not {HE_SCHEMA}.", hint=hint
            )
        return record

    def overview(self) -> Pixels:
        """Read the whole slide, reduced: uint8 (h, w, 3) RGB."""
        return self._read(self.path / "overview.jpg")

    def tissue(self) -> Bools:
        """Read the tissue mask: bool (h, w)."""
        return np.asarray(self._read(self.path / "tissue.png").min(axis=-1) > 0)

    def field(self, number: int) -> Pixels:
        """Read a field in the out frame's resolution, lossless: uint8 (h, w, 3) RGB."""
        return self._read(self._field_path(number))

    def write(self, record: HeRecord, overview: Pixels, tissue: Bools) -> None:
        """Write all but the fields; the record last, so that it says: complete."""
        quality = [
            cv2.IMWRITE_JPEG_QUALITY,
            OVERVIEW_QUALITY,
            cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
            cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
        ]
        bgr = np.asarray(cv2.cvtColor(overview, cv2.COLOR_RGB2BGR), np.uint8)
        _encode_to(self.path / "overview.jpg", bgr, quality)
        _encode_to(self.path / "tissue.png", tissue.astype(np.uint8) * np.uint8(255), [])
        atomic_write_bytes(self._record_path, _encode_record(record))

    def write_field(self, number: int, pixels: Pixels) -> None:
        """Write a field, uint8 (h, w, 3) RGB."""
        bgr = np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), np.uint8)
        _encode_to(self._field_path(number), bgr, [])

    @property
    def _record_path(self) -> Path:
        return self.path / "record.json"

    def _field_path(self, number: int) -> Path:
        return self.path / f"field_{number:02d}.png"

    def _read(self, path: Path) -> Pixels:
        # cv2.imread crashes on a path that is no UTF-8.
        encoded = np.fromfile(path, np.uint8) if path.is_file() else np.empty(0, np.uint8)
        pixels = cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB) if encoded.size else None
        if pixels is None:
            raise OutputError(
                f"{path} is missing or damaged.",
                hint="Give the slide again: wsi-stain report RUN --slide SLIDE",
            )
        return np.asarray(pixels, np.uint8)


def keep_he(
    source: SlideSource, scale: Scale, mask: TissueMask, folder: Path, *, marker: str
) -> HeRecord:
    """Keep of the H&E what a report shows: at most 16 megapixels and 24 fields of 512 px.

    What an earlier attempt of the same run kept is left as it is.

    Parameters
    ----------
    source
        The opened slide.
    scale
        The out frame.
    mask
        Tissue.
    folder
        Where to; made if absent.
    marker
        What the slide is translated to, for the page.

    Returns
    -------
    HeRecord
        What was kept.

    Raises
    ------
    OutputError
        Not writable.

    Notes
    -----
    Memory bound: the overview (48 MB) twice, one field, and the source's cache.
    """
    reduction = choose_reduction(scale.size_out)
    record = HeRecord(
        slide_digest=source.digest,
        marker=marker,
        size_out=scale.size_out,
        mpp_out=scale.mpp_out,
        reduction=reduction,
        mask_step=mask.downsample / scale.factor,
        fields=choose_fields(scale, mask),
    )
    kept = HeFolder(folder)
    if kept.holds(record):
        return record
    _make(folder)
    for number, region in enumerate(record.fields):
        kept.write_field(number, source.read_out(region, scale))
    kept.write(record, source.thumbnail(scale.mpp_out * reduction), mask.pixels)
    return record


def choose_reduction(size_out: Size, most_px: int = OVERVIEW_MAX_PX) -> int:
    """Choose the least power of two that brings a picture under `most_px` pixels."""
    reduction = 1
    while (
        -(-size_out.width_px // reduction) * -(-size_out.height_px // reduction) > most_px
        or max(size_out) > OVERVIEW_MAX_SIDE_PX * reduction
    ):
        reduction *= 2
    return reduction


def choose_fields(scale: Scale, mask: TissueMask) -> tuple[Region, ...]:
    """Choose fields that show tissue, evenly over the slide, on a lattice of their own size.

    Parameters
    ----------
    scale
        The out frame.
    mask
        Tissue; where no field is half tissue, those with the most are taken.

    Returns
    -------
    tuple of Region
        1 to 24, px of the out frame, row by row, wholly inside; smaller only on a small picture.
    """
    width_px, height_px = (min(FIELD_PX, side_px) for side_px in scale.size_out)
    columns = np.arange(scale.size_out.width_px // width_px) * width_px
    rows = np.arange(scale.size_out.height_px // height_px) * height_px
    left, top = (axis.ravel() for axis in np.meshgrid(columns, rows))
    boxes = np.stack([left, top, left + width_px, top + height_px], axis=1)
    tissue = mask.fractions(boxes, scale.factor)
    enough = np.flatnonzero(tissue >= min(FIELD_TISSUE, float(tissue.max())))
    n_fields = min(MOST_FIELDS, len(enough))
    picks = enough[np.linspace(0, len(enough) - 1, n_fields).round().astype(int)]
    return tuple(Region(int(left[i]), int(top[i]), width_px, height_px) for i in picks)


def _encode_record(record: HeRecord) -> bytes:
    return msgspec.json.encode(record) + b"\n"


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"Folder {folder} cannot be made: {error.strerror}.") from error


def _encode_to(path: Path, pixels: npt.NDArray[np.uint8], options: list[int]) -> None:
    done, data = cv2.imencode(path.suffix, np.ascontiguousarray(pixels), options)
    if not done:
        raise OutputError(f"{path} cannot be encoded: {pixels.shape} {pixels.dtype}.")
    atomic_write_bytes(path, data.tobytes())
