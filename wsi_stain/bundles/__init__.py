"""The shipped bundles, as package data; how to find a bundle and read its spec (no torch).

In: a name or a folder. Out: a folder, a `BundleSpec`, a digest. Not here: weights in memory.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

from wsi_stain.config import BundleSpec, NetSpec, decode_bundle_spec
from wsi_stain.errors import BundleError

__all__ = [
    "bundle_digest",
    "check_files",
    "find_bundle",
    "list_bundles",
    "name_anywhere",
    "read_spec",
]

SPEC_FILE = "bundle.json"


def list_bundles() -> list[str]:
    """Name the shipped bundles, sorted."""
    return sorted(path.parent.name for path in Path(__file__).parent.glob(f"*/{SPEC_FILE}"))


def find_bundle(name: str) -> Path:
    """Give the folder of a bundle.

    Parameters
    ----------
    name
        Name of a shipped bundle, or a path to a folder that holds a `bundle.json`. ``./ki67`` is
        a path also where a shipped bundle has that name.

    Raises
    ------
    BundleError
        Neither; the shipped names are listed.
    """
    shipped = [Path(__file__).parent / name] if name in list_bundles() else []
    with suppress(OSError):  # a name too long for a path names no bundle
        for folder in (*shipped, Path(name)):
            if Path(name).name and (folder / SPEC_FILE).is_file():
                return folder.resolve()
    raise BundleError(
        f"No bundle {name}: not a shipped one, and not a folder with a {SPEC_FILE}.",
        hint=f"Shipped bundles: {', '.join(list_bundles()) or 'none'}.",
    )


def name_anywhere(name: str) -> str:
    """Name a bundle so that a process in another folder finds it too: a shipped name, or a path."""
    return name if name in list_bundles() else str(find_bundle(name))


def read_spec(folder: Path) -> BundleSpec:
    """Read and check `bundle.json`."""
    path = folder / SPEC_FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}.") from error
    return decode_bundle_spec(data, str(path))


def check_files(folder: Path, spec: BundleSpec) -> None:
    """Compare the weights with the digests in `bundle.json`: 0.1 s, before any work.

    Raises
    ------
    BundleError
        A file is missing, cannot be read, differs, or is too small for the net that it is said to
        hold: memory would be taken for a lie.
    """
    for name, expected in spec.files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise BundleError(f"Bundle {spec.name} lacks {name}.", hint="Install it again.")
        try:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise BundleError(f"{path} cannot be read: {error.strerror}.") from error
        if found != expected:
            raise BundleError(
                f"{path} is damaged: SHA-256 {found[:12]}, bundle.json says {expected[:12]}.",
                hint="Install the bundle again.",
            )
        if path.stem == "score" and spec.net is not None:
            _check_size(path, spec.net)


def _check_size(path: Path, net: NetSpec) -> None:
    """Compare a file with the 3 x 3 convolutions on the way down alone, of a byte a weight."""
    n_weights = sum(2 * 9 * net.blocks * width**2 for width in net.channels)
    n_bytes = path.stat().st_size
    if n_bytes < n_weights:
        raise BundleError(
            f"{path} has {n_bytes:,} bytes: too few for a net of {n_weights:,} weights and more, "
            f"which {SPEC_FILE} describes.",
            hint="Install the bundle again.",
        )


def bundle_digest(folder: Path) -> str:
    """SHA-256 of `bundle.json`, which holds the digests of all weights."""
    return hashlib.sha256((folder / SPEC_FILE).read_bytes()).hexdigest()
