"""What this machine can do, and plain words about what is wrong and what to do about it.

In: nothing. Out: facts, problems, advice. Not here: repairs.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from wsi_stain.bundles import check_files, find_bundle, list_bundles, read_spec
from wsi_stain.cluster import available_cores
from wsi_stain.errors import WsiStainError

__all__ = [
    "Examination",
    "Remark",
    "examine",
    "machine_bytes",
    "may_have_cuda",
    "nvidia_files",
    "package_versions",
    "require_device",
]

PIXEL_PACKAGES = (
    "wsi-stain",
    "torch",
    "numpy",
    "openslide-python",
    "openslide-bin",
    "tifffile",
    "imagecodecs",
    "zarr",
    "dask",
    "distributed",
    "scikit-image",
    "opencv-python-headless",
    "pillow",
    "safetensors",
    "msgspec",
    "click",
)
LEAST_DISK_BYTES = 10e9
LEAST_WORKER_BYTES = 1.5e9  # a worker with the shipped model and its patches
LIBRARIES = ("torch", "openslide", "imagecodecs", "tifffile", "zarr", "cv2", "skimage")


class Remark(NamedTuple):
    """Something to say: what is the case, and what to do."""

    what: str
    do: str


@dataclass(frozen=True)
class Examination:
    """What was found: facts by name; problems keep `translate` from working, advice does not."""

    facts: Mapping[str, Any]
    problems: tuple[Remark, ...]
    advice: tuple[Remark, ...]
    versions: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        """All of it, for a machine."""
        return {
            "ok": not self.problems,
            **self.facts,
            "problems": [remark._asdict() for remark in self.problems],
            "advice": [remark._asdict() for remark in self.advice],
            "versions": dict(self.versions),
        }


def package_versions() -> dict[str, str]:
    """List Python and every package that touches pixels; "missing" where one is not installed."""
    versions = {"python": platform.python_version()}
    for name in PIXEL_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "missing"
    return versions


def examine() -> Examination:
    """Look at this machine: packages, libraries, codecs, devices, memory, disk, models."""
    versions = package_versions()
    problems = [*check_packages(versions), *check_libraries(LIBRARIES)]
    facts, advice = _machine(), []
    if not problems:  # without its libraries nothing more can be asked
        problems += check_codec()
        devices, cpu_dtype = _devices()
        facts |= {"CUDA devices": ", ".join(devices) or "none", "CPU precision": cpu_dtype}
        found, hints = check_devices(len(devices), len(nvidia_files()), cpu_dtype)
        problems += found
        advice += hints
    problems += check_bundles()
    problems += check_space(facts["free disk GB"] * 1e9)
    advice += check_memory(facts["memory GB"] * 1e9, facts["CPU cores"])
    return Examination(facts, tuple(problems), tuple(advice), versions)


def check_packages(versions: Mapping[str, str]) -> list[Remark]:
    """Find packages that are not installed."""
    missing = [name for name, version in versions.items() if version == "missing"]
    if not missing:
        return []
    return [
        Remark(f"Packages are missing: {', '.join(missing)}.", "pip install --upgrade wsi-stain")
    ]


def check_libraries(names: Sequence[str]) -> list[Remark]:
    """Find libraries that are installed and do not load: a wrong build, a lost system file."""
    remarks = []
    for name in names:
        try:
            importlib.import_module(name)
        except (ImportError, OSError) as error:
            what = f"{name} does not load: {' '.join(str(error).split())}."
            remarks.append(Remark(what, "pip install --force-reinstall wsi-stain"))
    return remarks


def check_codec() -> list[Remark]:
    """Encode and decode a JPEG tile, as reading and writing slides do."""
    codecs, numpy = importlib.import_module("imagecodecs"), importlib.import_module("numpy")
    tile = numpy.full((64, 64, 3), (200, 120, 90), numpy.uint8)
    try:
        seen = codecs.jpeg8_decode(codecs.jpeg8_encode(tile, level=90))
    except (RuntimeError, ValueError) as error:
        return [
            Remark(f"The JPEG codec fails: {error}.", "pip install --force-reinstall imagecodecs")
        ]
    off = int(abs(seen.astype(int) - tile).max())
    if off > 3:
        what = f"The JPEG codec is off by {off} grey levels on a tile of one color."
        return [Remark(what, "pip install --force-reinstall imagecodecs")]
    return []


def check_devices(
    n_usable: int, n_nvidia: int, cpu_dtype: str
) -> tuple[list[Remark], list[Remark]]:
    """Compare the GPUs that are there with those that torch can use.

    Returns
    -------
    tuple
        Problems, advice.
    """
    if n_usable:
        return [], []
    if n_nvidia:
        what = f"{n_nvidia} NVIDIA device(s) are in this machine, and torch can use none."
        do = (
            "Install the CUDA build of torch (https://pytorch.org/get-started), or use --device cpu"
        )
        return [Remark(what, do)], []
    advice = [
        Remark(
            "No CUDA device: translation runs on the CPU, about 0.04 s per tile and core "
            "with bfloat16 units, 0.06 s and more without; where a bundle has no student, 0.2 to "
            "1 s.",
            "Ask for the time first: wsi-stain plan slide.svs",
        )
    ]
    if cpu_dtype == "float32":
        advice.append(
            Remark(
                "This CPU has no bfloat16 units: one that has is about twice as fast.",
                "Nothing, or choose a machine whose CPU has AMX or AVX-512 BF16.",
            )
        )
    return [], advice


def check_bundles() -> list[Remark]:
    """Check that a model is installed and that its files are as they were made."""
    names = list_bundles()
    if not names:
        return [Remark("No model bundle is installed.", "pip install --force-reinstall wsi-stain")]
    remarks = []
    for name in names:
        try:
            folder = find_bundle(name)
            check_files(folder, read_spec(folder))
        except WsiStainError as error:
            remarks.append(Remark(error.message, error.hint or "Install wsi-stain again."))
    return remarks


def check_space(free_bytes: float) -> list[Remark]:
    """Say when this disk is nearly full."""
    if free_bytes >= LEAST_DISK_BYTES:
        return []
    what = f"Only {free_bytes / 1e9:.1f} GB are free on this disk; a slide needs 1 to 20 GB."
    return [Remark(what, "Free some, or write elsewhere: wsi-stain translate slide.svs --out DIR")]


def check_memory(total_bytes: float, n_cores: int) -> list[Remark]:
    """Say when one worker per core would not fit into three quarters of the memory."""
    fitting = int(0.75 * total_bytes / LEAST_WORKER_BYTES)
    if fitting >= n_cores:
        return []
    what = f"{total_bytes / 1e9:.1f} GB of memory hold {max(1, fitting)} of {n_cores} workers."
    return [Remark(what, f"wsi-stain translate slide.svs --workers {max(1, fitting)}")]


def nvidia_files() -> list[Path]:
    """List the device files of NVIDIA's driver."""
    return [path for path in Path("/dev").glob("nvidia*") if path.name[6:].isdigit()]


def may_have_cuda() -> bool:
    """Tell whether torch could find a device it calls CUDA; if so, only torch knows.

    On Linux NVIDIA's driver has a library, which torch loads too; its device files may only come
    with the first call. AMD's has a device file.
    """
    if sys.platform != "linux" or Path("/dev/kfd").exists():
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def require_device(asked: str) -> None:
    """Refuse CUDA where torch sees none; loads torch, so only where CUDA was asked for.

    Raises
    ------
    DeviceError
        There is no CUDA device.
    """
    if asked == "cuda":
        importlib.import_module("wsi_stain.translate.bundle").pick_device(asked)


def machine_bytes() -> int:
    """Measure the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _machine() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "CPU cores": available_cores(),
        "memory GB": round(machine_bytes() / 1e9, 1),
        "free disk GB": round(shutil.disk_usage(Path.cwd()).free / 1e9, 1),
        "bundles": ", ".join(list_bundles()) or "none",
    }


def _devices() -> tuple[list[str], str]:
    """Name the CUDA devices, and the precision that the CPU would work in."""
    torch = importlib.import_module("torch")
    fast_dtype = importlib.import_module("wsi_stain.translate.bundle").fast_dtype
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return devices, str(fast_dtype(torch.device("cpu"))).removeprefix("torch.")
