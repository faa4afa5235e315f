"""Verb `batch`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wsi_stain.verbs.options import (
    PATH,
    GroupedCommand,
    json_option,
    quiet_option,
    settings_flags,
    settle,
    show_facts,
)
from wsi_stain.verbs.translate import refuse_unused, translate

if TYPE_CHECKING:
    from wsi_stain.archive.jobs import Job
    from wsi_stain.archive.lanes import Orders
    from wsi_stain.archive.record import ArchiveFiles
    from wsi_stain.archive_record import ArchiveRecord
    from wsi_stain.config import RunConfig

__all__ = ["batch"]


@click.command(cls=GroupedCommand, params=settings_flags(translate))
@click.argument("source")
@click.option("--out", type=PATH, required=True, help="Output folder of all slides.")
@click.option("--recursive", is_flag=True, help="Look into the folders of SOURCE too.")
@click.option("--dry-run", is_flag=True, help="Only say what it would take: tiles, time, disk.")
@click.option("--part", default="1/1", help="One of several parts of the archive, as 3/16.")
@click.option("--slides-at-once", "archive__slides_at_once", type=int, help="Slides in work.")
@click.option("--scratch", type=PATH, help="Folder for patches, on a fast disk workers see.")
@click.option(
    "--stage",
    "archive__stage",
    is_flag=True,
    default=None,
    help="Copy slides to scratch ahead of need.",
)
@click.option("--attempts", "archive__attempts", type=int, help="Attempts at a slide in all.")
@click.option(
    "--retry-wait-s", "archive__retry_wait_s", type=float, help="Wait before the second attempt."
)
@click.option(
    "--verify",
    "archive__verify",
    is_flag=True,
    default=None,
    help="Read outputs that are there, compare their SHA-256.",
)
@click.option(
    "--keep-store", "archive__keep_store", is_flag=True, default=None, help="Keep patch stores."
)
@click.option(
    "--report", "archive__report", is_flag=True, default=None, help="Write the page of each slide."
)
@quiet_option
@json_option
def batch(**options: Any) -> None:
    """Translate all slides of a folder, pattern or list.

    A list is CSV or TSV with a column slide, and maybe mpp, bundle, out (name of the output).

    \b
    wsi-stain batch slides --out results
    wsi-stain batch slides --out results --dry-run
    wsi-stain batch 'slides/**/*.svs' --out results --scratch /local/ssd
    wsi-stain batch list.csv --out results --part 3/16

    What is done and sound is skipped, what fails is listed at the end with the next thing to do
    (exit code 9) and in archive.json and archive.csv. Stopped runs go on: type the same again.
    """
    from wsi_stain.archive.jobs import Part
    from wsi_stain.archive.lanes import Orders
    from wsi_stain.archive.record import ArchiveFiles
    from wsi_stain.config import ArchiveConfig
    from wsi_stain.config.decode import decode_flags

    source, out, recursive = (options.pop(name) for name in ("source", "out", "recursive"))
    quiet, as_json, dry_run = (options.pop(name) for name in ("quiet", "as_json", "dry_run"))
    scratch, files = options.pop("scratch"), ArchiveFiles(out, Part.parse(options.pop("part")))
    given = {name: options.pop(name) for name in list(options) if name.startswith("archive__")}
    told = {name.removeprefix("archive__"): value for name, value in given.items()}
    archive = decode_flags(told, ArchiveConfig)
    _refuse_stage(archive.stage, scratch)
    base, origins = settle(options)
    refuse_unused(base, origins)
    jobs = _jobs(source, out, base, recursive=recursive)
    mine = [job for job in jobs if files.part.holds(job.name)]
    orders = Orders(files, archive, base, origins, scratch)
    if dry_run:
        _foretell(mine, orders, quiet=quiet, as_json=as_json)
    else:
        _work(mine, orders, quiet=quiet, as_json=as_json)


def _work(jobs: list[Job], orders: Orders, *, quiet: bool, as_json: bool) -> None:
    from wsi_stain.archive.run import run_archive
    from wsi_stain.cluster import share_heaps
    from wsi_stain.console import ArchiveDisplay

    share_heaps()
    _end_as_by_ctrl_c()
    with ArchiveDisplay(len(jobs), quiet=quiet or as_json) as display:
        record = run_archive(jobs, orders, display)
    slides = {job.name: job.slide for job in jobs}
    _show(record, orders.files, slides, as_json=as_json)
    _raise_failures(record, orders.files)


def _end_as_by_ctrl_c() -> None:
    """Let go of all locks when a scheduler ends this process: another host takes over no lock."""
    import signal

    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _foretell(jobs: list[Job], orders: Orders, *, quiet: bool, as_json: bool) -> None:
    from wsi_stain.archive.outlook import look_out
    from wsi_stain.console import ProgressDisplay

    with ProgressDisplay(quiet=quiet or as_json) as display:
        outlook = look_out(jobs, orders, display)
    show_facts(outlook.as_json() if as_json else outlook.facts(), as_json)
    if not as_json:
        for slide in outlook.refused():
            click.echo(f"refused  {slide.name}: {slide.error}\n         next: {slide.next}")


def _jobs(source: str, out: Path, base: RunConfig, *, recursive: bool) -> list[Job]:
    from wsi_stain.archive.jobs import make_jobs
    from wsi_stain.archive.source import find_entries

    return make_jobs(find_entries(source, out, recursive=recursive), base)


def _refuse_stage(stage: bool, scratch: Path | None) -> None:
    from wsi_stain.errors import ConfigError

    if stage and scratch is None:
        raise ConfigError("--stage needs a place to copy slides to.", hint="Give --scratch DIR.")


def _show(
    record: ArchiveRecord, files: ArchiveFiles, slides: Mapping[str, Path], *, as_json: bool
) -> None:
    """Print what came of the archive: the record for machines, counts and failures for people."""
    if as_json:
        import msgspec

        click.echo(msgspec.json.format(msgspec.json.encode(record), indent=2).decode())
        return
    from wsi_stain.console import print_archive

    failed = [
        (slide.name, slide.error, _runnable(slide.next, slides.get(slide.name), files.out))
        for slide in record.of_state("failed")
    ]
    counts = {name: len(record.of_state(name)) for name in ("done", "skipped", "failed", "pending")}
    print_archive(counts, failed, files.record)


def _runnable(command: str, slide: Path | None, out: Path) -> str:
    """Give slide and output their folders again, which the record leaves out: to be typed here."""
    if slide is not None:
        command = _with_folders(command, "", slide)
    return _with_folders(command, "--out ", out)


def _with_folders(command: str, before: str, path: Path) -> str:
    # A folder with blanks has put quotes around a name without.
    for form in (f"{before}'{path.name}'", before + shlex.quote(path.name)):
        if form in command:
            return command.replace(form, before + shlex.quote(str(path)), 1)
    return command


def _raise_failures(record: ArchiveRecord, files: ArchiveFiles) -> None:
    from wsi_stain.errors import BatchError

    failed, left = record.of_state("failed"), record.of_state("pending")
    if failed or left:
        more = f", {len(left)} were not begun" if left else ""
        raise BatchError(
            f"{len(failed)} of {len(record.slides)} slides failed{more}.",
            hint="Reasons are in "
            f"{shlex.quote(str(files.record.with_suffix('.csv')))}; the same command tries these "
            "again.",
        )
