"""What this machine can do: versions, devices, codecs, and plain words about what is wrong.

In: nothing. Out: facts. Not here: repairs.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from importlib import metadata
from typing import Any

from wsi_stain.bundles import list_bundles

__all__ = ["examine", "package_versions"]

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


def package_versions() -> dict[str, str]:
    """List Python and every package that touches pixels; "missing" where one is not installed."""
    versions = {"python": platform.python_version()}
    for name in PIXEL_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "missing"
    return versions


def examine() -> dict[str, Any]:
    """Look at this machine.

    Returns
    -------
    dict
        Fact to value; "problems" and "advice" are lists of plain sentences.
    """
    torch = importlib.import_module("torch")
    dtype = importlib.import_module("wsi_stain.translate.bundle").fast_dtype
    problems, advice = [], []
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if not devices:
        advice.append(
            "No CUDA device: translation runs on the CPU, about a second per tile and core."
        )
    cpu_dtype = str(dtype(torch.device("cpu"))).removeprefix("torch.")
    if cpu_dtype == "float32" and not devices:
        advice.append("This CPU has no bfloat16 units: a newer one is about twice as fast.")
    disk = shutil.disk_usage(os.getcwd())
    if disk.free < 10e9:
        problems.append(f"Only {disk.free / 1e9:.1f} GB free on this disk; a slide needs 1-20 GB.")
    missing = [name for name, version in package_versions().items() if version == "missing"]
    if missing:
        problems.append(f"Missing packages: {', '.join(missing)}. Install wsi-stain again.")
    if not list_bundles():
        problems.append("No model bundle is installed.")
    return {
        "ok": not problems,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu cores": len(os.sched_getaffinity(0)),
        "memory GB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "free disk GB": round(disk.free / 1e9, 1),
        "CUDA devices": ", ".join(devices) or "none",
        "CPU precision": cpu_dtype,
        "bundles": ", ".join(list_bundles()) or "none",
        "problems": problems,
        "advice": advice,
        "versions": package_versions(),
    }
