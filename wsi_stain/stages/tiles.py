"""What the run says of its tiles: one line each in `tiles.csv`, and a summary for the record.

In: scores that lie with finished shards, limits. Out: the table, flags. Not here: scoring
(`stain/tile_scores`), what a person sees of it (`console`, the report).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from wsi_stain.config import TrustConfig
from wsi_stain.errors import OutputError
from wsi_stain.files import atomic_write_bytes
from wsi_stain.slides.plan import TileGrid
from wsi_stain.slides.store import PatchStore
from wsi_stain.stain.tile_scores import TileScore

__all__ = [
    "Limit",
    "flag_texts",
    "flags_of",
    "limits",
    "read_scores",
    "slide_sd",
    "summarize",
    "write_table",
]

LEAST_SHARE = 1e-3  # of tissue: the mask at 8 um/px misses specks
PLACE = ("tile", "x_px_out", "y_px_out", "size_px", "x_um", "y_um")


class Limit(NamedTuple):
    """Beyond what a tile is flagged.

    Attributes
    ----------
    flag
        What the flag is called.
    score
        Field of `TileScore`.
    value
        The limit.
    lowest
        Whether it is the lowest value allowed, else the highest.
    """

    flag: str
    score: str
    value: float
    lowest: bool

    def passed_by(self, score: TileScore) -> bool:
        """Tell whether a tile lies beyond; a score without a value never does."""
        found: float | None = getattr(score, self.score)
        if found is None:
            return False
        return found < self.value if self.lowest else found > self.value


def limits(config: TrustConfig) -> tuple[Limit, ...]:
    """List the limits, in the order in which their flags are written."""
    return (
        Limit("structure", "structure", config.structure_min, True),
        Limit("edges", "sobel_ssim", config.sobel_ssim_min, True),
        Limit("white", "white_error", config.white_error_max, False),
    )


def flags_of(score: TileScore, asked: Sequence[Limit]) -> list[str]:
    """Name the limits that a tile passes."""
    return [limit.flag for limit in asked if limit.passed_by(score)]


def read_scores(store: PatchStore) -> list[TileScore]:
    """Read the scores of all tiles of a finished store, in the order of their numbers.

    Raises
    ------
    OutputError
        A shard is not finished, or what lies with it are no scores.
    """
    found: list[TileScore] = []
    for shard in range(store.grid.n_shards):
        try:
            scores = msgspec.convert(store.facts("ihc", shard), list[TileScore])
        except msgspec.ValidationError as error:
            raise _no_scores(store, shard, str(error)) from error
        if len(scores) != len(store.grid.shard(shard)):
            raise _no_scores(store, shard, f"{len(scores)} of {len(store.grid.shard(shard))}")
        found += scores
    return found


def _no_scores(store: PatchStore, shard: int, why: str) -> OutputError:
    return OutputError(
        f"Store {store.path}: shard {shard} has no sound scores: {why}.",
        hint="Delete that folder and run the same command again.",
    )


def write_table(
    path: Path, grid: TileGrid, scores: Sequence[TileScore], config: TrustConfig
) -> None:
    """Write `tiles.csv`: place in the out frame (px and um), scores, flags joined by ";".

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*PLACE, *TileScore._fields, "flags"])
    writer.writerows(_lines(grid, scores, limits(config)))
    atomic_write_bytes(path, stream.getvalue().encode())


def _lines(
    grid: TileGrid, scores: Sequence[TileScore], asked: Sequence[Limit]
) -> Iterator[list[Any]]:
    mpp = grid.scale.mpp_out
    for number, score in enumerate(scores):
        x_px, y_px = grid.region_out(number)[:2]
        place = [number, x_px, y_px, grid.tile_px, round(x_px * mpp, 2), round(y_px * mpp, 2)]
        values = ["" if value is None else f"{value:g}" for value in score]
        yield [*place, *values, ";".join(flags_of(score, asked))]


def summarize(scores: Sequence[TileScore], config: TrustConfig) -> dict[str, Any]:
    """Sum up for the record: tiles, flagged ones by flag, median and worst of each score."""
    asked = limits(config)
    flags = [flags_of(score, asked) for score in scores]
    return {
        "tiles": len(scores),
        "flagged": sum(bool(names) for names in flags),
        "by_flag": {limit.flag: sum(limit.flag in names for names in flags) for limit in asked},
        "limits": {limit.score: limit.value for limit in asked},
        "median": {name: _middle(scores, name) for name in TileScore._fields},
        "worst": {limit.score: _worst(scores, limit) for limit in asked},
    }


def slide_sd(scores: Sequence[TileScore], tissue: NDArray[np.float32]) -> float | None:
    """Average the tiles' sd of DAB OD, each by its share of tissue, float32 (N,)."""
    weighted = [
        (score.dab_sd, max(float(share), LEAST_SHARE))
        for score, share in zip(scores, tissue, strict=True)
        if score.dab_sd is not None
    ]
    if not weighted:
        return None
    sds, weights = zip(*weighted, strict=True)
    return round(float(np.average(sds, weights=weights)), 4)


def flag_texts(summary: Mapping[str, Any]) -> list[str]:
    """Word the flags of a summary, one line a kind; none where no tile is flagged."""
    return [
        f"{count} of {summary['tiles']} tiles: {flag}"
        for flag, count in summary["by_flag"].items()
        if count
    ]


def _values(scores: Sequence[TileScore], name: str) -> list[float]:
    return [value for score in scores if (value := getattr(score, name)) is not None]


def _middle(scores: Sequence[TileScore], name: str) -> float | None:
    values = _values(scores, name)
    return round(float(np.median(values)), 4) if values else None


def _worst(scores: Sequence[TileScore], limit: Limit) -> float | None:
    values = _values(scores, limit.score)
    if not values:
        return None
    return min(values) if limit.lowest else max(values)
