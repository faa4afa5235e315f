"""Is a slide done already, by the same settings, and is its output still sound?

In: a job, its files. Out: what an earlier run left. Not here: what is done about it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from wsi_stain.archive.jobs import Job
from wsi_stain.config import ClusterConfig, RunConfig, SlideConfig, TileConfig, TrustConfig
from wsi_stain.errors import OutputError
from wsi_stain.files import sha256_any, size_bytes
from wsi_stain.layout import RunFiles
from wsi_stain.manifest import OutputRecord, RunManifest, RunRecord
from wsi_stain.slides.identity import check_file, content_digest
from wsi_stain.write.validate import validate

__all__ = ["Past", "look_back"]


@dataclass(frozen=True)
class Past:
    """What an earlier run of the same work left.

    Attributes
    ----------
    record
        Its record, finished.
    fault
        What is wrong with its output; empty where nothing is.
    """

    record: RunRecord
    fault: str


def look_back(job: Job, files: RunFiles, *, verify: bool) -> Past | None:
    """Look for a finished run of the same slide, model and settings.

    Parameters
    ----------
    job
        The work.
    files
        Where its output would lie.
    verify
        Read the whole output and compare its SHA-256; else its size, structure and some pixels.

    Returns
    -------
    Past or None
        None where there is none, or it was stopped, or the work was another.

    Raises
    ------
    SlideError
        The slide cannot be read.
    """
    try:
        record = RunManifest.load(files.manifest).content
    except OutputError:
        return None  # none, or damaged: then the run itself says so
    if record.state != "finished" or record.bundle.get("digest") != job.bundle_digest:
        return None
    settings = _settings(record.settings)
    if settings is not None and job.config.slide.mpp is None:
        # Told for this slide alone, as a file without a pixel size asks for: it was meant so.
        slide = msgspec.structs.replace(settings.slide, mpp=None)
        settings = msgspec.structs.replace(settings, slide=slide)
    if settings is None or _that_show(settings) != _that_show(job.config):
        return None
    check_file(job.slide)
    if record.slide.get("digest") != content_digest(job.slide):
        return None
    return Past(record, _fault(files, record, verify=verify))


def _settings(raw: dict[str, Any]) -> RunConfig | None:
    # Records leave out hosts and keys, so what they hold of a cluster need not be one.
    kept = {name: value for name, value in raw.items() if name != "cluster"}
    try:
        return msgspec.convert(kept, RunConfig)
    except msgspec.ValidationError:
        return None  # of another version


def _that_show(config: RunConfig) -> RunConfig:
    """Leave out what no pixel depends on: where and in which portions the work ran, limits."""
    replace = msgspec.structs.replace
    return replace(
        config,
        bundle="",
        cluster=ClusterConfig(),
        slide=replace(config.slide, cache_mb=SlideConfig().cache_mb),
        tiles=replace(config.tiles, shard_tiles=TileConfig().shard_tiles),
        trust=TrustConfig(),
        write=replace(config.write, overwrite=False),
    )


def _fault(files: RunFiles, record: RunRecord, *, verify: bool) -> str:
    if not any(output.name == files.output.name for output in record.outputs):
        return "it is not there"
    for output in record.outputs:  # the spread over seeds is one, too
        path = files.output.with_name(output.name)
        if fault := _fault_of(path, output, verify=verify):
            return fault if path == files.output else f"{output.name}: {fault}"
    return ""


def _fault_of(path: Path, wanted: OutputRecord, *, verify: bool) -> str:
    if not path.exists():
        return "it is not there"
    if (found_bytes := size_bytes(path)) != wanted.bytes:
        return f"it has {found_bytes:,} bytes, its record says {wanted.bytes:,}"
    found = validate(path)
    if not found.ok:
        return "; ".join(found.problems)
    if verify and (found_sha256 := sha256_any(path)) != wanted.sha256:
        return f"its SHA-256 is {found_sha256[:12]}, its record says {wanted.sha256[:12]}"
    return ""
