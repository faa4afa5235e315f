"""What a user may set for an archive of slides.

In: nothing. Out: `ArchiveConfig`. Not here: what one slide is translated with (`run`).
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from wsi_stain.config.values import Count, NonNegative, Settings


class ArchiveConfig(Settings, frozen=True, kw_only=True):
    """How to go through many slides."""

    slides_at_once: Annotated[int, msgspec.Meta(ge=1, le=64)] = 3  # read, translated, written
    attempts: Count = 3  # of a slide whose file, disk or workers failed
    retry_wait_s: NonNegative = 10.0  # before the second attempt; then twice as long each time
    verify: bool = False  # compare the SHA-256 of outputs that are there
    keep_store: bool = False
    report: bool = False  # write the page of each slide
    stage: bool = False  # copy slides to the scratch folder ahead of need
