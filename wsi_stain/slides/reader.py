"""The open file behind a slide: opened in each process that reads, with sRGB pixels.

Room 1 of 4. In: a path, regions of levels. Out: uint8 RGB; which tiles were left out. Not here:
the frame of the virtual slide, resampling.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from wsi_stain.errors import SlideError
from wsi_stain.geometry import Region
from wsi_stain.slides.identity import check_file, content_digest
from wsi_stain.slides.missing import Cell, TileError
from wsi_stain.slides.openslide_read import open_backend
from wsi_stain.slides.slide_facts import Pixels

__all__ = ["LevelReader", "OpenedSlide"]


class LevelReader:
    """Reads a slide's levels; left behind when pickled, opened anew when needed.

    Parameters
    ----------
    path
        The slide.
    cache_mb
        Bound of decoded tiles kept in memory.
    digest
        Of the content; another content is another slide.
    allow_missing
        Read tiles that cannot be decoded as background, and list them.

    Attributes
    ----------
    missing
        What was left out so far in this process, and why.
    """

    def __init__(self, path: Path, cache_mb: int, digest: str, *, allow_missing: bool) -> None:
        self.missing: dict[Cell, str] = {}
        self._path = path
        self._cache_mb = cache_mb
        self._digest = digest
        self._allow_missing = allow_missing
        self._opened: OpenedSlide | None = None

    @property
    def opened(self) -> OpenedSlide:
        """The open slide, of this process.

        Raises
        ------
        SlideError
            It cannot be opened, or is another one by now.
        """
        # A handle must not be shared with the parent of a forked process: both move its position.
        if self._opened is None or self._opened.pid != os.getpid():
            check_file(self._path)
            if content_digest(self._path) != self._digest:
                raise SlideError(
                    f"Slide {self._path} has changed since it was opened.", hint="Start again."
                )
            self._opened = OpenedSlide(self._path, self._cache_mb)
        return self._opened

    def read(self, level: int, region: Region) -> Pixels:
        """Read a region that lies inside a level, as uint8 (h, w, 3) sRGB.

        Raises
        ------
        TileError
            A tile cannot be read, and slides may not lack any.
        SlideError
            Nothing can be read.
        """
        backend = self.opened.backend
        while True:
            try:
                return self.opened.to_srgb(backend.read(level, region))
            except TileError as error:
                # A tile that is asked for again although it was left out would never end.
                if not self._allow_missing or error.cell is None or error.cell in backend.left_out:
                    raise
                backend.left_out.add(error.cell)
                self.missing[error.cell] = error.reason

    def close(self) -> None:
        """Close the file; a later read opens it again."""
        if self._opened is not None and self._opened.pid == os.getpid():
            self._opened.backend.close()
        self._opened = None

    def __getstate__(self) -> dict[str, Any]:
        # It may be opened by a process that works in another folder.
        return {**self.__dict__, "_path": self._path.absolute(), "_opened": None, "missing": {}}


class OpenedSlide:
    """An open slide with its color transform, of one process."""

    def __init__(self, path: Path, cache_mb: int) -> None:
        self.pid = os.getpid()
        self.backend = open_backend(path, cache_mb)
        self.transform = _srgb_transform(self.backend.facts.icc)

    def to_srgb(self, pixels: Pixels) -> Pixels:
        """Convert uint8 (h, w, 3) by the slide's own profile, if there is one."""
        if self.transform is None:
            return pixels
        picture = Image.fromarray(pixels)
        ImageCms.applyTransform(picture, self.transform, inPlace=True)
        return np.asarray(picture)


def _srgb_transform(icc: bytes | None) -> ImageCms.ImageCmsTransform | None:
    """Build the transform from the slide's profile to sRGB; none where the profile is broken."""
    if icc is None:
        return None
    try:
        profile = ImageCms.getOpenProfile(io.BytesIO(icc))
        intent = ImageCms.Intent(ImageCms.getDefaultIntent(profile))
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.buildTransform(profile, srgb, "RGB", "RGB", intent)
    except (ImageCms.PyCMSError, OSError):  # a note of the slide says so
        return None
