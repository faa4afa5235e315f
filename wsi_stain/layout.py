"""Where the files of a run lie: the pyramid, and a run folder beside it.

In: output folder, slide name, marker. Out: paths. Not here: writing (but left-overs go here).

```
out/<slide>_<marker>.ome.tiff                      or .ome.zarr
out/<slide>_<marker>_uncertainty.ome.tiff          where several seeds were asked for
out/<slide>_<marker>.geojson
out/<slide>_<marker>.run/   manifest.json  lock  store/  he/  report/  tiles.csv  qupath.groovy
                            missing.csv
out/<slide>_<marker>_quantify/                     where the picture was measured: heat.ome.tiff ...
```
"""

from __future__ import annotations

import glob
import re
import shutil
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from wsi_stain.errors import OutputError
from wsi_stain.files import OLD_SUFFIX, PART_SUFFIX, remove_any, writing

__all__ = ["RUN_SUFFIX", "Place", "RunFiles", "find_run", "is_output", "safe_name", "slug"]

OUTPUT_SUFFIX = ".ome.tiff"
OUTPUT_SUFFIXES = {"ome-tiff": OUTPUT_SUFFIX, "ome-zarr": ".ome.zarr"}  # by format
RUN_SUFFIX = ".run"
UNCERTAINTY_SUFFIX = "_uncertainty.ome.tiff"
QUANTIFY_SUFFIX = "_quantify"
HEAT_FILE = "heat.ome.tiff"
NAME_MAX_BYTES = 120
SLUG_MAX_CHARS = 40


@dataclass(frozen=True)
class Place:
    """Where a run puts its files, where that takes more than a folder to say.

    Attributes
    ----------
    out
        Output folder.
    name
        What the names of its files begin with, before the marker; empty: the slide's name.
    scratch
        Folder for the patch store alone, on a disk that all workers see; none: the run folder.
    """

    out: Path
    name: str = ""
    scratch: Path | None = None


@dataclass(frozen=True)
class RunFiles:
    """Paths of one run.

    Attributes
    ----------
    output
        The pyramid.
    folder
        The run folder: manifest, lock, patch store, H&E pictures, report.
    scratch
        Folder of the patch store, where that is not the run folder.
    """

    output: Path
    folder: Path
    scratch: Path | None = None

    @classmethod
    def of(cls, out: Path | Place, slide: Path, marker: str, pyramid: str = "ome-tiff") -> RunFiles:
        """Name the files of a run; `pyramid` is the format of the output.

        Raises
        ------
        OutputError
            The output would be the slide itself, or lie in it.
        """
        place = out if isinstance(out, Place) else Place(out)
        name = f"{place.name or safe_name(slide.name)}_{slug(marker)}"
        files = cls(
            place.out / (name + OUTPUT_SUFFIXES[pyramid]),
            place.out / (name + RUN_SUFFIX),
            place.scratch,
        )
        if files.output.exists() and slide.exists() and files.output.samefile(slide):
            raise OutputError(f"Output {files.output} is the slide itself.", hint="Use --out.")
        if slide.is_dir() and place.out.resolve().is_relative_to(slide.resolve()):
            raise OutputError(f"Output folder {place.out} lies in the slide.", hint="Use --out.")
        return files

    @property
    def name(self) -> str:
        """What all of them begin with."""
        return self.folder.name.removesuffix(RUN_SUFFIX)

    @property
    def others(self) -> list[Path]:
        """The same picture in the other formats, which would share the run folder."""
        names = [self.name + suffix for suffix in OUTPUT_SUFFIXES.values()]
        return [self.output.with_name(name) for name in names if name != self.output.name]

    @property
    def manifest(self) -> Path:
        """The record of the run."""
        return self.folder / "manifest.json"

    @property
    def lock(self) -> Path:
        """The lock file."""
        return self.folder / "lock"

    @property
    def store(self) -> Path:
        """The patch store."""
        return (self.scratch or self.folder) / "store"

    @property
    def discarded(self) -> Path:
        """The patch store while it is being removed."""
        return (self.scratch or self.folder) / "store.discarded"

    @property
    def unsound(self) -> Path:
        """A pyramid that did not pass its check."""
        return self.folder / f"unsound{self.output.name.removeprefix(self.name)}"

    @property
    def he(self) -> Path:
        """The folder of H&E pictures that the report needs."""
        return self.folder / "he"

    @property
    def uncertainty(self) -> Path:
        """The spread over seeds, as a pyramid of its own."""
        return self.output.with_name(f"{self.name}{UNCERTAINTY_SUFFIX}")

    @property
    def geojson(self) -> Path:
        """What QuPath shows over the pyramid."""
        return self.output.with_name(f"{self.name}.geojson")

    @property
    def missing(self) -> Path:
        """The table of the slide's tiles that could not be read; only where there are such."""
        return self.folder / "missing.csv"

    @property
    def qupath(self) -> Path:
        """The script that opens H&E and pyramid in QuPath."""
        return self.folder / "qupath.groovy"

    @property
    def tile_scores(self) -> Path:
        """The table of tiles, their scores and flags."""
        return self.folder / "tiles.csv"

    @property
    def report(self) -> Path:
        """The report's folder."""
        return self.folder / "report"

    def set_aside(self) -> None:
        """Take the output's name from a file that a killed run left; `sweep` removes it.

        Raises
        ------
        OutputError
            It cannot be renamed.
        """
        if self.output.exists():
            with writing(self.output):
                self.output.replace(self.output.with_name(self.output.name + OLD_SUFFIX))

    def sweep(self) -> None:
        """Remove what a killed run left half-written; only for the holder of the lock.

        Raises
        ------
        OutputError
            It cannot be removed.
        """
        try:
            if self.discarded.exists():
                shutil.rmtree(self.discarded)
            beside = [
                path
                for made in (self.output, self.geojson, self.uncertainty)
                for path in made.parent.glob(f"{glob.escape(made.name)}*{PART_SUFFIX}")
            ]
            inside = [
                path
                for folder in (self.folder, self.he, self.report)
                for path in folder.glob(f".*{PART_SUFFIX}")
            ]
            for path in (*beside, *inside, self.unsound):
                remove_any(path)
        except OSError as error:
            raise OutputError(
                f"Left-overs in {self.folder} cannot be removed: {error.strerror}.",
                hint="Choose a folder that can be written: --out DIR.",
            ) from error

    def remove_report(self) -> None:
        """Remove the page of an older picture, which a new one would be taken to show.

        Raises
        ------
        OutputError
            It cannot be removed.
        """
        with writing(self.report):
            remove_any(self.report)


def slug(text: str) -> str:
    """Lower-case letters and digits only: "Ki-67" becomes "ki67"."""
    return re.sub(r"[^a-z0-9]+", "", text.lower())[:SLUG_MAX_CHARS] or "ihc"


def safe_name(file_name: str) -> str:
    """Make a slide's stem fit for a file name anywhere: no odd characters, not too long."""
    stem = file_name.encode("utf-8", "replace").decode()
    for suffix in (".tiff", ".tif", ".ome", ".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".dcm"):
        if stem.lower().endswith(suffix) and len(stem) > len(suffix):
            stem = stem[: -len(suffix)]
    plain = unicodedata.normalize("NFC", stem)
    kept = "".join(c if c.isalnum() or c in "-_.+ " else "_" for c in plain).strip(" .")
    while len(kept.encode()) > NAME_MAX_BYTES:
        kept = kept[:-1]
    return kept or "slide"


def is_output(path: Path) -> bool:
    """Tell whether a file is one that we made of a slide: picture, spread over seeds, heat map.

    A picture or spread has its run folder beside it.
    """
    if path.name == HEAT_FILE and path.parent.name.endswith(QUANTIFY_SUFFIX):
        return True
    return any(
        path.with_name(path.name.removesuffix(end) + RUN_SUFFIX).is_dir()
        for end in (UNCERTAINTY_SUFFIX, *OUTPUT_SUFFIXES.values())
        if path.name.endswith(end)
    )


def find_run(path: Path) -> RunFiles:
    """Find a run from its folder, its pyramid, or an output folder that holds just one.

    Raises
    ------
    OutputError
        Nothing there, nothing that may be looked at, or more than one run.
    """
    try:
        return _find_run(path)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"No run at {path}: {error.strerror}.", hint="Give a .run folder or its pyramid."
        ) from error


def _find_run(path: Path) -> RunFiles:
    asked = next((end for end in OUTPUT_SUFFIXES.values() if path.name.endswith(end)), "")
    if asked:
        path = path.with_name(path.name.removesuffix(asked) + RUN_SUFFIX)
    if not path.name.endswith(RUN_SUFFIX) and path.is_dir():
        runs = sorted(path.glob(f"*{RUN_SUFFIX}"))
        if len(runs) != 1:
            raise OutputError(
                f"{path} holds {len(runs)} runs; name one of them."
                if runs
                else f"{path} holds no run.",
                hint="Give a .run folder or its pyramid.",
            )
        path = runs[0]
    if not (path / "manifest.json").is_file():
        raise OutputError(
            f"No run at {path}: it has no manifest.json.",
            hint="Give the .run folder that translate wrote.",
        )
    stem = path.name.removesuffix(RUN_SUFFIX)
    outputs = [
        path.with_name(stem + end) for end in ([asked] if asked else [*OUTPUT_SUFFIXES.values()])
    ]
    there = [output for output in outputs if output.exists()]
    return RunFiles((there or outputs)[0], path)
