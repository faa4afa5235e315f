"""The identity of a stage's inputs: under another key a finished shard is not finished.

In: a plan, a color fit, settings. Out: keys. Not here: who compares them (`slides/store`).
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import msgspec

from wsi_stain.bundles import bundle_digest, find_bundle
from wsi_stain.config import RunConfig
from wsi_stain.planning import SlidePlan
from wsi_stain.stain.start import COLOR_VERSION
from wsi_stain.stain.tile_scores import SCORES_VERSION
from wsi_stain.translate.fit import ColorFit
from wsi_stain.translate.task import Arithmetic

__all__ = ["digest", "he_key", "ihc_key"]


def digest(*parts: Any) -> str:
    """SHA-256, hex, of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def he_key(plan: SlidePlan) -> str:
    """Identify H&E shards: the slide, where tiles lie, how large its pixels are taken to be."""
    return digest(plan.source.digest, plan.grid.digest, plan.source.mpp_l0)


def ihc_key(plan: SlidePlan, color: ColorFit, config: RunConfig, there: Arithmetic) -> str:
    """Identify IHC shards: H&E, color fit, model, how it runs, seed, arithmetic, scores."""
    return digest(
        he_key(plan),
        color.numbers(),
        bundle_digest(find_bundle(config.bundle)),
        msgspec.to_builtins(config.sample),
        config.seed,
        *there,
        SCORES_VERSION,
        COLOR_VERSION,
    )
