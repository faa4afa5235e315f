"""The script that opens a run in QuPath: H&E and virtual IHC side by side, objects imported.

Room 4 of 4. In: names, stain vectors. Out: one Groovy script. Not here: the objects (`geojson`).

The script is `qupath.groovy` beside this module with its places filled. It holds no path: QuPath
asks for both files. QuPath's calls in it were read in its sources at 0.5.0, 0.6.0 and 0.7.0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from wsi_stain.config import ColorReference
from wsi_stain.files import atomic_write_bytes

__all__ = ["qupath_script", "write_qupath_script"]

TEMPLATE = Path(__file__).with_name("qupath.groovy")


def write_qupath_script(
    path: Path,
    name: str,
    marker: str,
    color: ColorReference,
    he_stain_od: Sequence[Sequence[float]] = (),
    he_white: Sequence[float] = (),
) -> None:
    """Write the script of a run; for the parameters see `qupath_script`.

    Raises
    ------
    OutputError
        Not writable.
    """
    text = qupath_script(name, marker, color, he_stain_od, he_white)
    atomic_write_bytes(path, text.encode())


def qupath_script(
    name: str,
    marker: str,
    color: ColorReference,
    he_stain_od: Sequence[Sequence[float]] = (),
    he_white: Sequence[float] = (),
) -> str:
    """Fill the script.

    Parameters
    ----------
    name
        Of the run: the pyramid is ``<name>.ome.tiff``.
    marker
        What the slide was translated to.
    color
        The model's H and DAB vectors and its white.
    he_stain_od, he_white
        (2, 3) hematoxylin and eosin as fitted on the slide, and its white; empty where the fit
        has no vectors.

    Returns
    -------
    str
        Groovy.
    """
    hematoxylin, dab = color.stain_od
    has_fit = len(he_stain_od) == 2 and len(he_white) == 3
    places = {
        "NAME": _plain(name),
        "MARKER": _plain(marker),
        "HEMATOXYLIN": _vector(hematoxylin, 4),
        "DAB": _vector(dab, 4),
        "WHITE": _vector(color.output_white, 1),
        "HE_STAINS": _he_stains(name, he_stain_od, he_white) if has_fit else "",
    }
    text = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"@([A-Z_]+)@", lambda place: places[place[1]], text)


def _he_stains(name: str, stain_od: Sequence[Sequence[float]], white: Sequence[float]) -> str:
    hematoxylin, eosin = stain_od
    return (
        f'{{"Name" : "{_plain(name)} H&E", "Stain 1" : "Hematoxylin", '
        f'"Values 1" : "{_vector(hematoxylin, 4)}", "Stain 2" : "Eosin", '
        f'"Values 2" : "{_vector(eosin, 4)}", "Background" : "{_vector(white, 1)}"}}'
    )


def _plain(text: str) -> str:
    """Keep what cannot end a string or a comment of the script, nor a value inside of it."""
    return "".join(c if c.isalnum() or c in "-_.+ " else "_" for c in text)


def _vector(values: Sequence[float], digits: int) -> str:
    return " ".join(f"{value:.{digits}f}" for value in values)
