"""Which slides: a folder, a pattern, or a list in CSV or TSV.

In: what the user typed. Out: entries, sorted. Not here: opening slides, naming outputs.
"""

from __future__ import annotations

import csv
import glob
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from wsi_stain.bundles import list_bundles
from wsi_stain.errors import ConfigError
from wsi_stain.layout import RUN_SUFFIX, is_output
from wsi_stain.slides.pixel_size import SANE_MPP

__all__ = ["COLUMNS", "Entry", "find_entries"]

COLUMNS = ("slide", "mpp", "bundle", "out")
LISTS = {".csv": ",", ".tsv": "\t"}
SUFFIXES = frozenset(
    {".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".svslide", ".vms", ".vmu", ".dcm"}
)
ZARR_FILE = "zarr.json"


@dataclass(frozen=True)
class Entry:
    """A slide that was asked for.

    Attributes
    ----------
    slide
        Its file.
    origin
        Where it was found, for messages: a file, or a line of a list.
    folders
        Names of the folders between the source and the slide; they tell apart slides of one name.
    mpp
        Pixel size, um/px, that the list gives, or none.
    bundle, out
        Model and name of the output that the list gives, or empty.
    """

    slide: Path
    origin: str
    folders: tuple[str, ...] = ()
    mpp: float | None = None
    bundle: str = ""
    out: str = ""


def find_entries(source: str, out: Path, *, recursive: bool = False) -> list[Entry]:
    """List the slides of a source.

    Parameters
    ----------
    source
        A folder: the files in it whose names end as slides' do. A pattern (``*``, ``?``, ``[``,
        ``**``): the files that match, whatever their names. A file that ends with .csv or .tsv: a
        list with a head line. Any other file: that slide.
    out
        Output folder; what lies in it is no slide of the source.
    recursive
        Look into the folder's folders too.

    Raises
    ------
    ConfigError
        Nothing there, or the list cannot be used.
    """
    try:
        entries = _entries(source, out, recursive=recursive)
    except PermissionError as error:
        raise ConfigError(
            f"{error.filename} cannot be read: {error.strerror}.",
            hint="Ask for the right to read it, or give a list of slides.",
        ) from error
    if not entries:
        raise ConfigError(f"No slides at {source}.", hint=_ASK)
    return entries


def _entries(source: str, out: Path, *, recursive: bool) -> list[Entry]:
    path = Path(source)
    if path.is_file() and path.suffix.lower() in LISTS:
        return list(_read_list(path))
    if path.exists() and not _is_folder(path):
        return [Entry(path, source)]
    if path.is_dir():
        return _from_files(path, _in_folder(path, out, recursive=recursive))
    if glob.has_magic(source):
        found = (Path(name) for name in glob.glob(source, recursive=True))
        root = Path(*_before_magic(path.parts))
        return _from_files(root, [file for file in found if not _is_folder(file)])
    raise ConfigError(f"No slides at {source}: it does not exist.", hint=_ASK)


_ASK = (
    "Give a folder (--recursive for those in it), a pattern in quotes ('slides/*.svs'), or a list "
    "in CSV or TSV with a column slide."
)


def _is_folder(path: Path) -> bool:
    """Tell whether it is a folder that is no OME-Zarr."""
    return path.is_dir() and not (path / ZARR_FILE).is_file()


def _before_magic(parts: tuple[str, ...]) -> Iterator[str]:
    for part in parts[:-1]:
        if glob.has_magic(part):
            return
        yield part


def _in_folder(folder: Path, out: Path, *, recursive: bool) -> list[Path]:
    """Find slides by their names; of a folder of DICOM files, which are one slide, the first."""
    found: list[Path] = []
    skipped = {out.resolve(), *(outer.resolve() for outer in (folder, *folder.parents))}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.resolve() in skipped or path.suffix == RUN_SUFFIX:
            continue
        if _is_folder(path):
            found += _in_folder(path, out, recursive=True) if recursive else []
        elif path.is_dir() or path.suffix.lower() in SUFFIXES:
            found.append(path)
    dicom = [path for path in found if path.parent == folder and path.suffix.lower() == ".dcm"]
    return [path for path in found if path not in dicom[1:]]


def _from_files(root: Path, files: Iterable[Path]) -> list[Entry]:
    entries = []
    for file in sorted(file for file in set(files) if not is_output(file)):
        inner = file.parent.relative_to(root) if file.is_relative_to(root) else Path()
        entries.append(Entry(file, str(file), inner.parts))
    return entries


def _read_list(path: Path) -> Iterator[Entry]:
    """Read a list; relative paths are relative to the list."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, delimiter=LISTS[path.suffix.lower()], strict=True)
            rows.fieldnames = [name.strip() for name in rows.fieldnames or ()]
            _check_columns(path, rows.fieldnames)
            for row in rows:
                values = {name: (value or "").strip() for name, value in row.items() if name}
                if None in row:
                    raise _bad_line(path, rows.line_num, "it has more fields than the head line")
                if any(values.values()):
                    yield _entry(path, rows.line_num, values)
    except OSError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"List {path} cannot be read: {error.strerror}.") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise ConfigError(
            f"List {path} is not readable as {path.suffix[1:].upper()} in UTF-8: {error}."
        ) from error


def _check_columns(path: Path, given: Sequence[str]) -> None:
    known = ", ".join(COLUMNS)
    if unknown := [name for name in given if name not in COLUMNS]:
        raise ConfigError(
            f"List {path} has unknown columns: {', '.join(unknown)}.",
            hint=f"Known columns: {known}. Take the others out.",
        )
    if "slide" not in given or len(set(given)) != len(given):
        fault = "no column slide" if "slide" not in given else "a column twice"
        raise ConfigError(f"List {path} has {fault}.", hint=f"Known columns: {known}.")


def _entry(path: Path, line: int, row: Mapping[str, str]) -> Entry:
    if not row["slide"]:
        raise _bad_line(path, line, "column slide is empty")
    if broken := [name for name, value in row.items() if "\0" in value]:
        raise _bad_line(path, line, f"column {broken[0]} has a zero byte")
    return Entry(
        slide=path.parent / row["slide"],
        origin=f"{path}, line {line}",
        mpp=_mpp(path, line, row.get("mpp", "")),
        bundle=_bundle(path, row.get("bundle", "")),
        out=row.get("out", ""),
    )


def _bundle(path: Path, name: str) -> str:
    """Name a bundle: one that is shipped, or a folder, relative to the list as slides are."""
    return name if not name or name in list_bundles() else str(path.parent / name)


def _mpp(path: Path, line: int, text: str) -> float | None:
    if not text:
        return None
    try:
        mpp = float(text)
    except ValueError:
        mpp = float("nan")
    if not SANE_MPP[0] <= mpp <= SANE_MPP[1]:
        low, high = SANE_MPP
        raise _bad_line(path, line, f"mpp {text} is no number from {low:g} to {high:g} um/px")
    return mpp


def _bad_line(path: Path, line: int, what: str) -> ConfigError:
    return ConfigError(f"List {path}, line {line}: {what}.")
