"""Training images: find them, bring their glass to one white, hold a part out.

In: a `DataConfig`. Out: `TrainImage`s of one split. Not here: crops, nets, how slides are read.
"""

from __future__ import annotations

import csv
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from wsi_stain.config import DataConfig
from wsi_stain.errors import ConfigError
from wsi_stain.train.fields import read_fields

__all__ = ["TrainImage", "load_images"]

WHITE_PERCENTILE = 98.0
SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff"}
HELD_OUT_EVERY = 5

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class TrainImage:
    """One decoded training image.

    Attributes
    ----------
    path
        File it came from.
    source
        First two folders of the path under the root: the unit of weights, whites and licences.
    licence
        As the manifest states it, or "not stated".
    rgb
        uint8 (h, w, 3); its glass brought to the common white where `balance` is on.
    """

    path: Path
    source: str
    licence: str
    rgb: Image


@dataclass(frozen=True)
class _Row:
    """An image file that a recipe names; no split where none is stated."""

    name: str
    licence: str
    split: str | None

    @property
    def source(self) -> str:
        return "/".join(Path(self.name).parts[:-1][:2])


def load_images(config: DataConfig, split: str) -> list[TrainImage]:
    """Find and decode the images of one split.

    Parameters
    ----------
    config
        Root folder, manifest and filters, or plain folders of images; slides and patch stores.
    split
        "train" or "val". With `held_out_strip` the right strip of every image and slide is "val"
        and the rest of it "train". Else the manifest says, and of plain folders every fifth image
        by sorted name, of slides every fifth, is "val".

    Returns
    -------
    list of TrainImage
        Images sorted by path, then the fields of slides.

    Raises
    ------
    ConfigError
        No manifest and no folders, a folder, weight or white that belongs to no image, a file
        that cannot be decoded, an image smaller than a crop, or no image left.
    SlideError, NoTissueError, PlanError, OutputError
        A slide or store cannot be used.

    Notes
    -----
    Memory bound: all images of the split, decoded.
    """
    root = Path(config.root).expanduser()
    rows = (_manifest_rows if config.where else _folder_rows)(root, config)
    _check_names(config, {row.source for row in rows}, root)
    images = [
        _load(root, row, config, split)
        for row in sorted(rows, key=lambda row: row.name)
        if config.held_out_strip or row.split == split
    ]
    for i, name in enumerate(sorted(config.slides)):
        if config.held_out_strip or (i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == (split == "val"):
            images += _slide_images(root, name, config, split)
    if not images:
        raise ConfigError(
            f"No {split} image under {root} matches the recipe.",
            hint="Check data.root, data.where and data.folders; with few images or slides, hold "
            "a part of each out: data.held_out_strip = 0.2",
        )
    return images


def _manifest_rows(root: Path, config: DataConfig) -> list[_Row]:
    path = root / config.manifest
    if not path.is_file():
        raise ConfigError(f"Training manifest {path} does not exist.", hint="Check data.root.")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    missing = {"path", "split", *config.where} - set(rows[0] if rows else {})
    if missing:
        raise ConfigError(f"Training manifest {path} lacks the columns {sorted(missing)}.")
    matching = [
        _Row(row["path"], row.get("licence", "not stated"), row["split"])
        for row in rows
        if all(row[column] in values for column, values in config.where.items())
    ]
    chosen = [row for row in matching if not config.folders or row.source in config.folders]
    # Test images stay out, however the rest is split.
    return [row for row in chosen if row.split in ("train", "val")]


def _folder_rows(root: Path, config: DataConfig) -> list[_Row]:
    names = sorted(
        {
            str(path.relative_to(root))
            for folder in config.folders  # one may lie in another
            for path in (root / folder).rglob("*")
            if path.suffix.lower() in SUFFIXES
        }
    )
    rows = []
    for i, name in enumerate(names):
        split = "val" if i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else "train"
        row = _Row(name, "not stated", split)
        rows.append(replace(row, licence=config.licences.get(row.source, row.licence)))
    return rows


def _check_names(config: DataConfig, sources: set[str], root: Path) -> None:
    """Refuse a name that belongs to no image: a typing error would silently do nothing."""
    known = sources | set(config.slides)
    tables: dict[str, Iterable[str]] = {
        "weights": config.weights,
        "whites": config.whites,
        "licences": config.licences,
    }
    if config.where:
        tables["folders"] = config.folders
    for field, names in tables.items():
        for name in names:
            if name not in known:
                close = difflib.get_close_matches(name, sorted(known), n=1)
                raise ConfigError(
                    f"data.{field} names {name!r}, and no image under {root} that the recipe "
                    "chooses lies there.",
                    hint=f"Did you mean {close[0]!r}?" if close else f"There are: {sorted(known)}",
                )
    if not config.where:
        for folder in config.folders:
            if not (root / folder).is_dir():
                raise ConfigError(f"data.folders: {root / folder} is no folder.")
    stray = set(config.slide_mpp) - set(config.slides)
    if stray:
        raise ConfigError(f"data.slide_mpp names {sorted(stray)}, which data.slides does not.")


def _load(root: Path, row: _Row, config: DataConfig, split: str) -> TrainImage:
    path = root / row.name
    encoded = np.fromfile(path, dtype=np.uint8) if path.is_file() else np.empty(0, np.uint8)
    decoded = cv2.imdecode(encoded, cv2.IMREAD_COLOR) if encoded.size else None
    if decoded is None:
        raise ConfigError(f"Training image {path} is missing or cannot be decoded.")
    rgb = np.ascontiguousarray(np.asarray(decoded, np.uint8)[:, :, ::-1])
    if config.balance:
        bright = np.percentile(rgb.reshape(-1, 3), WHITE_PERCENTILE, axis=0)
        rgb = _balance(rgb, bright, config.whites.get(row.source, config.white_target))
    if config.held_out_strip:
        edge = round(rgb.shape[1] * (1.0 - config.held_out_strip))
        rgb = np.ascontiguousarray(rgb[:, edge:] if split == "val" else rgb[:, :edge])
    if min(rgb.shape[:2]) < config.crop_px:
        part = f" {split} part" if config.held_out_strip else ""
        raise ConfigError(
            f"Training image {path}{part} is {rgb.shape[1]} x {rgb.shape[0]} px, smaller than a "
            f"crop of {config.crop_px} px.",
            hint="Lower data.crop_px or leave the image out.",
        )
    return TrainImage(path, row.source, row.licence, rgb)


def _slide_images(root: Path, name: str, config: DataConfig, split: str) -> list[TrainImage]:
    fields = read_fields(
        root / name,
        mpp=config.mpp,
        side_px=2 * config.crop_px,
        most=config.fields_per_slide,
        asked_mpp=config.slide_mpp.get(name),
    )
    if min(fields.tiles.shape[1:3]) < config.crop_px:
        raise ConfigError(
            f"Patch store {root / name} has tiles of {fields.tiles.shape[1]} px, smaller than a "
            f"crop of {config.crop_px} px.",
            hint="Lower data.crop_px.",
        )
    tiles = fields.tiles[_in_split(fields.spans, config.held_out_strip, split)]
    white = config.whites.get(name, config.white_target)
    licence = config.licences.get(name, "not stated")
    if config.balance:
        tiles = _balance(tiles, np.asarray(fields.white.rgb), white)
    return [TrainImage(root / name, name, licence, tile) for tile in tiles]


def _in_split(spans: NDArray[np.float64], strip: float, split: str) -> NDArray[np.bool_]:
    """Tell which fields lie wholly on their side of the strip's edge; those across it go."""
    if not strip:
        return np.ones(len(spans), np.bool_)
    edge = 1.0 - strip
    return np.asarray(spans[:, 0] >= edge if split == "val" else spans[:, 1] <= edge)


def _balance(rgb: Image, bright: NDArray[np.float64], white: Sequence[float]) -> Image:
    """Scale each channel so that `bright` lies at `white`: one glass for all sources."""
    gain = np.asarray(white) / np.maximum(bright, 1.0)
    balanced: Image = np.clip(np.rint(rgb * gain), 0, 255).astype(np.uint8)
    return balanced
