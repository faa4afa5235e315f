"""Where a person should look: tiles that the run flagged, places that the report found.

In: flagged tiles, doubts. Out: rows with their boxes. Not here: what is doubtful, HTML.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from wsi_stain.evaluate.report_numbers import Doubt
from wsi_stain.geometry import Region
from wsi_stain.write.annotations import TileRow, titled
from wsi_stain.write.overview import HeRecord

__all__ = ["MOST_PLACES", "Place", "places"]

MOST_PLACES = 40  # that the page lists by name; the picture shows all
DOUBT_WORDS = {"lost": "tissue lost", "invented": "stain on glass"}


class Place(NamedTuple):
    """Where a person should look.

    Attributes
    ----------
    name, reason
        Which tile or place, and why.
    box
        Px of the virtual slide, inside of it.
    scores
        Name and value, for a person; may be empty.
    """

    name: str
    reason: str
    box: Region
    scores: str


def places(doubts: Sequence[Doubt], tiles: Sequence[TileRow], he: HeRecord) -> list[Place]:
    """List what to look at: tiles that the run flagged, then places that the report found.

    Parameters
    ----------
    doubts
        In px of the reduced picture.
    tiles
        In px of the virtual slide; what reaches over its edge is cut.
    he
        Reduction and size.
    """
    frame = Region(0, 0, *he.size_out)
    flagged = [
        Place(
            f"Tile {tile.name}",
            tile.flags.replace(";", ", ").replace("_", " "),
            tile.box.intersect(frame),
            ", ".join(f"{name} {value:.2g}" for name, value in titled(tile.scores).items()),
        )
        for tile in tiles
    ]
    found = [
        Place(
            f"Place {number}",
            DOUBT_WORDS[doubt.reason],
            Region(*(at * he.reduction for at in doubt.region)).intersect(frame),
            "",
        )
        for number, doubt in enumerate(doubts, start=1)
    ]
    return flagged + found
