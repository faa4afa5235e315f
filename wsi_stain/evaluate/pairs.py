"""Images to judge on: find them, read them at the model's pixel size, choose the crop.

In: a recipe's image groups. Out: one `Subject` at a time. Not here: models, metrics.

An image file is treated as one slide: what is fitted once per slide is fitted on the whole of it,
also where only its center is judged.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from wsi_stain.config import ColorReference, Rgb
from wsi_stain.errors import ConfigError
from wsi_stain.evaluate.recipe import EvaluateConfig, ImageChoice, ImageGroup
from wsi_stain.geometry import Region, Scale, Size, choose_scale
from wsi_stain.stain.density import is_stained
from wsi_stain.stain.white import WhitePoint, estimate_white
from wsi_stain.translate.fit import ColorFit

__all__ = ["ImageFile", "Subject", "find_images", "load_subject", "palette_pixels", "real_pictures"]

Rgb8 = NDArray[np.uint8]

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".tif", ".tiff"})
PALETTE_PIXELS_PER_IMAGE = 5_000
_SAMPLE_PX = 1_000_000


@dataclass(frozen=True)
class ImageFile:
    """One H&E image and, where there is one, its reference.

    Attributes
    ----------
    group
        The recipe's entry it belongs to.
    path, reference
        Files.
    slide
        Slide or patient: the unit of resampling.
    licence
        As the manifest states it, or "not stated".
    """

    group: ImageGroup
    path: Path
    reference: Path | None
    slide: str
    licence: str

    @property
    def name(self) -> str:
        """Group and stem: unique in a recipe."""
        return f"{self.group.name}/{self.path.stem}"


@dataclass(frozen=True, eq=False)
class Subject:
    """An image that was read, at the model's pixel size.

    Attributes
    ----------
    file
        Where it came from.
    scale
        From the file's pixels to these.
    he
        uint8 (h, w, 3), the whole image.
    reference
        uint8, the same shape, or none.
    crop
        What is judged of it.
    glass, reference_glass
        White of the two.
    digests
        SHA-256 of the files, H&E first.
    fits
        Colors fitted on it so far, by start image and gradient map.
    """

    file: ImageFile
    scale: Scale
    he: Rgb8
    reference: Rgb8 | None
    crop: Region
    glass: WhitePoint
    reference_glass: WhitePoint | None
    digests: tuple[str, ...]
    fits: dict[tuple[str, str | None], ColorFit] = field(default_factory=dict)

    @property
    def tissue_fraction(self) -> float:
        """Share of the crop's H&E that is stained."""
        return float(is_stained(self.cut(self.he), self.glass.rgb).mean())

    def cut(self, picture: Rgb8) -> Rgb8:
        """Cut the judged part out of a picture of the whole image."""
        crop = self.crop
        return picture[crop.y_px : crop.bottom_px, crop.x_px : crop.right_px]


def find_images(config: EvaluateConfig) -> list[ImageFile]:
    """Find all images of a recipe, in its order, by name in each group.

    Raises
    ------
    ConfigError
        A folder, manifest or reference is missing, a stem is there twice, or nothing matches.
    """
    root = Path(config.root).expanduser()
    return [file for group in config.images for file in _group_files(root, group)]


def load_subject(file: ImageFile, mpp_model: float, config: EvaluateConfig) -> Subject:
    """Read an image and bring it to the model's pixel size, as a slide would be.

    Parameters
    ----------
    file
        Which.
    mpp_model
        Pixel size of the model, um/px.
    config
        Crop, tolerance of the pixel size.

    Raises
    ------
    ConfigError
        A file cannot be decoded, or image and reference differ in size.
    """
    he, digest = _read(file.path)
    scale = choose_scale(_size(he), file.group.mpp, mpp_model, config.mpp_tolerance)
    digests = [digest]
    reference = None
    if file.reference is not None:
        reference, digest = _read(file.reference)
        digests.append(digest)
        if reference.shape != he.shape:
            raise ConfigError(
                f"{file.reference} is {_size(reference)}, but {file.path} is {_size(he)}.",
                hint="A pair must show the same field at the same size.",
            )
    he = _rescale(he, scale)
    reference = None if reference is None else _rescale(reference, scale)
    white = file.group.reference_white
    return Subject(
        file=file,
        scale=scale,
        he=he,
        reference=reference,
        crop=_central(scale.size_out, config.crop_px),
        glass=_white(he, file.group.white),
        reference_glass=None if reference is None else _white(reference, white),
        digests=tuple(digests),
    )


def palette_pixels(choice: ImageChoice, root: Path, color: ColorReference) -> Rgb8:
    """Sample the stained pixels of training IHC, each brought to the white of the bundle's output.

    Parameters
    ----------
    choice
        Training IHC.
    root
        Root folder of the recipe.
    color
        Its `output_white` is where the glass of every image goes.

    Returns
    -------
    ndarray
        uint8 (n, 3), at most `PALETTE_PIXELS_PER_IMAGE` of each image.

    Raises
    ------
    ConfigError
        No image, or none of their pixels is stained.
    """
    parts = []
    for path, _ in _choose(root, choice):
        pixels = _to_white(_read(path)[0], choice.white, color).reshape(-1, 3)
        stained = pixels[is_stained(pixels, color.output_white)]
        parts.append(stained[:: max(1, -(-len(stained) // PALETTE_PIXELS_PER_IMAGE))])
    palette = np.concatenate(parts)
    if len(palette) < 4:
        raise ConfigError(
            f"The palette's {len(parts)} images in {root / choice.folder} show {len(palette)} "
            "stained pixels.",
            hint="Choose other images in [palette].",
        )
    return palette


def real_pictures(
    choices: Sequence[ImageChoice], root: Path, color: ColorReference, crop_px: int
) -> list[Rgb8]:
    """Read the middle of IHC images, each brought to the white of the bundle's output.

    Parameters
    ----------
    choices
        Held-out IHC of the bundle's own stain.
    root
        Root folder of the recipe.
    color
        Its `output_white` is where the glass of every image goes.
    crop_px
        Side of the middle, in the files' own pixels; 0: all of it.

    Returns
    -------
    list of ndarray
        uint8 (h, w, 3).

    Raises
    ------
    ConfigError
        A choice has no image, or one cannot be read.
    """
    found = []
    for choice in choices:
        for path, _ in _choose(root, choice):
            picture = _to_white(_read(path)[0], choice.white, color)
            crop = _central(_size(picture), crop_px)
            found.append(picture[crop.y_px : crop.bottom_px, crop.x_px : crop.right_px])
    return found


def _to_white(picture: Rgb8, background: Rgb, color: ColorReference) -> Rgb8:
    """Bring the glass of a picture to that of the bundle's output."""
    gain = np.array(color.output_white) / np.array(_white(picture, background).rgb)
    balanced: Rgb8 = np.clip(np.rint(picture * gain), 0, 255).astype(np.uint8)
    return balanced


def _group_files(root: Path, group: ImageGroup) -> Iterator[ImageFile]:
    chosen = _choose(root, group)
    stems = _by_stem([path for path, _ in chosen])
    references = (
        _by_stem(_pictures(root / group.reference)) if group.reference else dict[str, Path]()
    )
    for path, licence in chosen:
        if group.reference and path.stem not in references:
            raise ConfigError(
                f"{path} has no reference named {path.stem}.* in {root / group.reference}.",
                hint="Remove the image, or leave `reference` out for this group.",
            )
        yield ImageFile(
            group=group,
            path=stems[path.stem],
            reference=references.get(path.stem),
            slide=_slide(path, root, group),
            licence=licence,
        )


def _choose(root: Path, choice: ImageChoice) -> list[tuple[Path, str]]:
    """List files with their licences, sorted."""
    folder = root / choice.folder
    found = [(path, "not stated") for path in _pictures(folder)]
    if choice.manifest:
        licences = _manifest(root, choice)
        found = [(path, licences[path]) for path, _ in found if path in licences]
    if not found:
        raise ConfigError(
            f"No image in {folder} matches the recipe.",
            hint="Check root, folder, manifest and where.",
        )
    if 0 < choice.limit < len(found):
        picks = np.linspace(0, len(found) - 1, choice.limit).round().astype(int)
        found = [found[i] for i in picks]
    return found


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder.", hint="Check root and folder in the recipe.")
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def _manifest(root: Path, choice: ImageChoice) -> dict[Path, str]:
    """Map each listed file that passes `where` to its licence."""
    path = root / choice.manifest
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    except OSError as error:
        raise ConfigError(f"Manifest {path} cannot be read: {error.strerror}.") from error
    missing = {"path", *choice.where} - set(rows[0] if rows else {})
    if missing:
        raise ConfigError(f"Manifest {path} lacks the columns {sorted(missing)}.")
    return {
        root / row["path"]: row.get("licence") or "not stated"
        for row in rows
        if all(row[column] in values for column, values in choice.where.items())
    }


def _by_stem(paths: Sequence[Path]) -> dict[str, Path]:
    stems: dict[str, Path] = {}
    for path in paths:
        if (other := stems.setdefault(path.stem, path)) != path:
            raise ConfigError(
                f"{other} and {path} have one stem.", hint="Use one group of images per folder."
            )
    return stems


def _slide(path: Path, root: Path, group: ImageGroup) -> str:
    folder = Path(os.path.relpath(path.parent, root)).as_posix()  # may lie outside of it
    if not group.group_pattern:
        return folder
    match = re.search(group.group_pattern, path.stem)
    if match is None:
        raise ConfigError(
            f"group_pattern {group.group_pattern!r} of {group.name} does not match {path.stem}."
        )
    return f"{folder}/{match.group(1)}"


def _read(path: Path) -> tuple[Rgb8, str]:
    data = path.read_bytes() if path.is_file() else b""
    bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    if bgr is None:
        raise ConfigError(f"Image {path} is missing or cannot be decoded.")
    rgb: Rgb8 = np.ascontiguousarray(np.asarray(bgr, np.uint8)[:, :, ::-1])
    return rgb, hashlib.sha256(data).hexdigest()


def _size(picture: Rgb8) -> Size:
    return Size(picture.shape[1], picture.shape[0])


def _rescale(picture: Rgb8, scale: Scale) -> Rgb8:
    if scale.factor == 1.0:
        return picture
    how = cv2.INTER_AREA if scale.factor > 1.0 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(picture, tuple(scale.size_out), interpolation=how), np.uint8)


def _central(size: Size, crop_px: int) -> Region:
    width_px, height_px = (min(side, crop_px or side) for side in size)
    left_px, top_px = (size.width_px - width_px) // 2, (size.height_px - height_px) // 2
    return Region(left_px, top_px, width_px, height_px)


def _white(picture: Rgb8, background: Rgb) -> WhitePoint:
    step = max(1, picture.shape[0] * picture.shape[1] // _SAMPLE_PX)
    return estimate_white(picture.reshape(-1, 3)[::step], background)
