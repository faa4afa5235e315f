"""The contact sheet: one line an image, one column a method, H&E first and the reference last.

In: rows, and the pictures beside them. Out: `sheet.png`. Not here: numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from wsi_stain.errors import OutputError
from wsi_stain.evaluate.rows import Row, picture_path
from wsi_stain.files import atomic_write_bytes

__all__ = ["draw_sheet", "read_picture", "write_picture"]

Rgb8 = NDArray[np.uint8]

GAP_PX = 4
HEAD_PX = 22
PAPER = 255
_FONT = cv2.FONT_HERSHEY_SIMPLEX


def draw_sheet(rows: Sequence[Row], out: Path, cell_px: int, max_rows: int) -> Rgb8:
    """Draw the sheet from the pictures on the disk.

    Parameters
    ----------
    rows
        Results; methods in the order of the recipe.
    out
        Folder of the evaluation.
    cell_px
        Side of a cell; larger pictures are reduced to it, smaller ones stay.
    max_rows
        Lines of the sheet, evenly spread over the images where there are more.

    Returns
    -------
    ndarray
        uint8 (h, w, 3).
    """
    methods = list(dict.fromkeys(row.method for row in rows))
    images = list(dict.fromkeys(row.image for row in rows))
    picks = np.linspace(0, len(images) - 1, min(max_rows, len(images))).round().astype(int)
    paired = {row.image for row in rows if row.paired}
    columns = ["he", *methods, *(["reference"] if paired else [])]
    step_px = cell_px + GAP_PX
    shape = (HEAD_PX + len(picks) * (step_px + HEAD_PX), len(columns) * step_px, 3)
    sheet = np.full(shape, PAPER, np.uint8)
    for column, name in enumerate(columns):
        _write(sheet, name, column * step_px, HEAD_PX, cell_px)
    for line, image in enumerate(images[i] for i in picks):
        top_px = HEAD_PX + line * (step_px + HEAD_PX)
        _write(sheet, image, 0, top_px + HEAD_PX, len(columns) * step_px)
        for column, name in enumerate(columns):
            if name != "reference" or image in paired:
                cell = _fit(read_picture(picture_path(out, image, name)), cell_px)
                y_px, x_px = top_px + HEAD_PX, column * step_px
                sheet[y_px : y_px + cell.shape[0], x_px : x_px + cell.shape[1]] = cell
    return sheet


def read_picture(path: Path) -> Rgb8:
    """Read a picture of this evaluation.

    Raises
    ------
    OutputError
        Missing or damaged.
    """
    data = np.fromfile(path, np.uint8) if path.is_file() else np.empty(0, np.uint8)
    bgr = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    if bgr is None:
        raise OutputError(
            f"Picture {path} is missing or damaged.",
            hint="Delete results.jsonl and run wsi-stain evaluate again.",
        )
    return np.ascontiguousarray(np.asarray(bgr, np.uint8)[:, :, ::-1])


def write_picture(path: Path, rgb: Rgb8) -> None:
    """Write a PNG, whole or not at all; its folder is made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path.parent} cannot be made: {error.strerror}.") from error
    _, data = cv2.imencode(".png", np.ascontiguousarray(rgb[:, :, ::-1]))
    atomic_write_bytes(path, data.tobytes())


def _fit(picture: Rgb8, cell_px: int) -> Rgb8:
    longer = max(picture.shape[:2])
    if longer <= cell_px:
        return picture
    width_px, height_px = (max(1, round(n * cell_px / longer)) for n in picture.shape[1::-1])
    small = cv2.resize(picture, (width_px, height_px), interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.uint8)


def _write(sheet: Rgb8, text: str, x_px: int, bottom_px: int, room_px: int) -> None:
    """Write a label, smaller where it would not fit."""
    (width_px, _), _ = cv2.getTextSize(text, _FONT, 0.45, 1)
    scale = 0.45 * min(1.0, (room_px - 4) / max(1, width_px))
    cv2.putText(sheet, text, (x_px + 2, bottom_px - 6), _FONT, scale, (0, 0, 0), 1, cv2.LINE_AA)
