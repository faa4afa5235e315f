"""The files of `quantify`: numbers as JSON and CSV, tiles as CSV, heat map, GeoJSON.

In: what was measured. Out: one folder. Not here: measuring.

```
<name>_quantify/  numbers.json  numbers.csv  tiles.csv  heat.png  heat.ome.tiff  <name>.geojson
```
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from wsi_stain.config import QuantifyConfig, WriteConfig
from wsi_stain.errors import OutputError
from wsi_stain.evaluate.cells import CellTable
from wsi_stain.evaluate.ground import run_beside
from wsi_stain.evaluate.quantify import (
    NUMBERS_FILE,
    Numbers,
    Quantified,
    measure,
    measured_folder,
)
from wsi_stain.files import atomic_write_bytes, make_folder
from wsi_stain.geometry import Region, Size
from wsi_stain.layout import HEAT_FILE
from wsi_stain.manifest import Listener, ignore
from wsi_stain.slides.image import SlideSource
from wsi_stain.write.annotations import (
    flagged_features,
    positive_features,
    read_tiles,
    tissue_features,
)
from wsi_stain.write.geojson import (
    HOT_SPOT,
    TILE,
    Feature,
    box_feature,
    circle_feature,
    write_geojson,
)
from wsi_stain.write.tiff import write_pyramid

__all__ = ["geojson_name", "quantify", "read_numbers"]

Rgb8 = NDArray[np.uint8]
Floats = NDArray[np.float64]

CELL_FIELDS = tuple(f.name for f in fields(CellTable))
HEAT_TILE_PX = 32  # of the heat pyramid: its smallest levels still show tiles
FEWEST = 10  # nuclei (or pixels) that a tile needs for a color
TOO_FEW = 190
GLASS = 243


def quantify(
    picture: Path,
    out: Path | None = None,
    *,
    mpp: float | None = None,
    config: QuantifyConfig | None = None,
    listener: Listener = ignore,
) -> tuple[Numbers, Path]:
    """Measure a picture and write all about it.

    Parameters
    ----------
    picture
        Virtual or real IHC.
    out
        Folder; by default ``<name>_quantify`` beside the picture. Older files in it are replaced.
    mpp
        Pixel size, um/px, where the file says none.
    config
        Settings.
    listener
        Hears the pass over the pixels.

    Returns
    -------
    tuple
        The numbers, and the folder.

    Raises
    ------
    SlideError, MppUnknownError, NoTissueError, OutputError
        Each with the next thing to do.
    """
    config = config or QuantifyConfig()
    with SlideSource.open(picture, mpp=mpp) as source:
        folder = out or measured_folder(picture)
        found = measure(source, config, listener)
        make_folder(folder)
        step = found.tile_step(config.tile_um)
        rows = list(_tile_rows(found, step))
        _write_heat(found, step, folder)
        _write_table(folder / "tiles.csv", rows)
        write_geojson(
            folder / geojson_name(found.numbers.picture), _features(source, found, rows, config)
        )
    flat = _flat(msgspec.to_builtins(found.numbers))
    _write_table(folder / "numbers.csv", [flat])
    # Last: who finds this file finds the others too.
    text = msgspec.json.format(msgspec.json.encode(found.numbers), indent=2)
    atomic_write_bytes(folder / NUMBERS_FILE, text + b"\n")
    return found.numbers, folder


def geojson_name(name: str) -> str:
    """Name the GeoJSON of a picture."""
    return f"{name}.geojson"


def read_numbers(picture: Path, digest: str) -> Numbers | None:
    """Read what was measured of a picture earlier.

    Parameters
    ----------
    picture
        The pyramid.
    digest
        Of the pyramid as it is now.

    Returns
    -------
    Numbers or None
        None where nothing was measured, or another picture of this name was.

    Raises
    ------
    OutputError
        The file is damaged, or of another version.
    """
    path = measured_folder(picture) / NUMBERS_FILE
    if not path.is_file():
        return None
    try:
        numbers = msgspec.json.decode(path.read_bytes(), type=Numbers)
    except msgspec.DecodeError as error:
        raise OutputError(
            f"{path} cannot be read: {error}.",
            hint=f"Measure again: wsi-stain quantify {shlex.quote(str(picture))}",
        ) from error
    return numbers if numbers.digest == digest else None


def _tile_rows(found: Quantified, step: int) -> Iterator[dict[str, float | int | None]]:
    """Give the lines of `tiles.csv`: tiles with tissue, places in level-0 px of the picture."""
    tiles = found.table.coarse(step)
    scale = found.ground.scale
    side_px = found.cell_px * step
    px_mm2 = (scale.mpp_out / 1e3) ** 2
    has_seeds = found.numbers.mean_dab_sd is not None
    for row, column in zip(*np.nonzero(tiles.tissue_px), strict=True):
        at = {name: float(getattr(tiles, name)[row, column]) for name in CELL_FIELDS}
        box = _box(int(row), int(column), side_px * scale.factor)
        counted = found.numbers.n_nuclei is not None
        tissue_px = at["tissue_px"]
        yield {
            "x_px": box.x_px,
            "y_px": box.y_px,
            "width_px": box.width_px,
            "height_px": box.height_px,
            "tissue_mm2": round(tissue_px * px_mm2, 6),
            "positive_area_percent": round(100.0 * at["positive_px"] / tissue_px, 3),
            "miod_exact": round(at["iod"] / tissue_px, 5),
            "n_nuclei": round(at["nuclei"]) if counted else None,
            "n_positive": round(at["positive"]) if counted else None,
            "labelling_percent": _ratio(at["positive"], at["nuclei"]) if counted else None,
            "positive_per_mm2": round(at["positive"] / (tissue_px * px_mm2), 1)
            if counted
            else None,
            "dab_sd": round(at["sd"] / tissue_px, 5) if has_seeds else None,
        }


def _features(
    source: SlideSource,
    found: Quantified,
    rows: Sequence[Mapping[str, float | int | None]],
    config: QuantifyConfig,
) -> Iterator[Feature]:
    """Give all objects: tissue, positive regions, flagged tiles, tiles with numbers, hot spot."""
    size, mpp = source.size_l0, source.mpp_l0
    yield from tissue_features(found.ground.mask, size, 1.0, mpp)
    yield from positive_features(source, found.ground.white, config.positive_od)
    run = run_beside(source.path)
    if run is not None:
        yield from flagged_features(read_tiles(run.tile_scores), size, mpp)
    titles = {
        "tissue_mm2": "Tissue mm^2",
        "positive_area_percent": "Positive area %",
        "miod_exact": "DAB OD mean",
        "n_nuclei": "Num nuclei",
        "n_positive": "Num positive",
        "labelling_percent": "Positive nuclei %",
        "positive_per_mm2": "Num positive per mm^2",
        "dab_sd": "DAB OD sd over seeds",
    }
    for row in rows:
        box = Region(*(int(row[key] or 0) for key in ("x_px", "y_px", "width_px", "height_px")))
        numbers = {title: row[key] for key, title in titles.items()}
        yield box_feature(box, size, TILE, f"Tile {box.x_px},{box.y_px}", numbers)
    spot = found.numbers.hot_spot
    if spot is not None:
        x_um, y_um = spot.center_xy_um
        yield circle_feature(
            (x_um / mpp, y_um / mpp),
            spot.radius_um / mpp,
            size,
            HOT_SPOT,
            {
                "Area mm^2": round(spot.area_mm2, 4),
                "Num nuclei": spot.n_nuclei,
                "Num positive": spot.n_positive,
                "Num positive per mm^2": round(spot.positive_per_mm2, 1),
            },
        )


def _write_heat(found: Quantified, step: int, folder: Path) -> None:
    """Write the heat map as a picture, one dot a tile, and as a pyramid that lies on the slide."""
    tiles = found.table.coarse(step)
    counted = found.numbers.n_nuclei is not None
    part = (tiles.positive if counted else tiles.positive_px).astype(np.float64)
    whole = (tiles.nuclei if counted else tiles.tissue_px).astype(np.float64)
    colors, top = _colors(100.0 * part / np.maximum(whole, 1.0), whole)
    colors[whole < FEWEST] = TOO_FEW
    colors[tiles.tissue_px == 0.0] = GLASS
    what = "positive nuclei" if counted else "positive area"
    small = np.repeat(np.repeat(colors, 8, axis=0), 8, axis=1)
    done, data = cv2.imencode(".png", np.ascontiguousarray(small[..., ::-1]))
    if not done:
        raise OutputError(f"{folder / 'heat.png'} cannot be encoded: {small.shape}.")
    atomic_write_bytes(folder / "heat.png", data.tobytes())
    n_rows, n_columns = colors.shape[:2]
    bands = (
        np.repeat(np.repeat(row[None], HEAT_TILE_PX, axis=0), HEAT_TILE_PX, axis=1)
        for row in colors
    )
    write_pyramid(
        folder / HEAT_FILE,
        Size(n_columns * HEAT_TILE_PX, n_rows * HEAT_TILE_PX),
        bands,
        step * found.cell_um / HEAT_TILE_PX,
        WriteConfig(lossless=True, overwrite=True, tile_px=256),
        name=f"{found.numbers.picture} heat map",
        description=f"{what} per tile, viridis from 0 to {top:g} %, grey: too few; "
        f"{found.numbers.statement}",
    )


def _colors(percent: Floats, whole: Floats) -> tuple[Rgb8, float]:
    """Color percentages from 0 to the next ten over the highest one that counts: RGB, that top."""
    solid = percent[whole >= FEWEST]
    top = max(10.0, 10.0 * math.ceil(float(solid.max()) / 10.0)) if solid.size else 100.0
    codes = np.rint(255.0 * np.minimum(percent / top, 1.0)).astype(np.uint8)
    colored = np.asarray(cv2.applyColorMap(codes, cv2.COLORMAP_VIRIDIS), np.uint8)
    return np.ascontiguousarray(colored[..., ::-1]), top


def _box(row: int, column: int, side_px: float) -> Region:
    """Place a tile in level-0 px; neighbors share their rounded edges."""
    left, top = round(column * side_px), round(row * side_px)
    return Region(left, top, round((column + 1) * side_px) - left, round((row + 1) * side_px) - top)


def _ratio(part: float, whole: float) -> float | None:
    return round(100.0 * part / whole, 3) if whole else None


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested numbers for one line of CSV."""
    pairs: list[tuple[str, Any]] = []
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{name}_").items()
        elif isinstance(value, list | tuple):
            pairs += [(f"{name}_{index}", part) for index, part in enumerate(value)]
        else:
            pairs.append((name, value))
    return dict(pairs)


def _write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write CSV; an absent number is an empty field."""
    stream = io.StringIO(newline="")
    names = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write_bytes(path, stream.getvalue().encode())
