"""Virtual IHC from H&E whole slides: slide in, pyramid out.

The main path is four rooms in the order of the data: `slides` (where the pixels are), `stain`
(what the colors mean), `translate` (H&E in, IHC out), `write` (the picture out). `pipeline` is
the table of contents; `train` and `evaluate` make and judge the nets. `DESIGN.md` beside this
file draws the house. Heavy libraries are imported when a name is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "RunConfig": "wsi_stain.config",
    "SlideSource": "wsi_stain.slides.image",
    "load_bundle": "wsi_stain.translate.bundle",
    "plan_slide": "wsi_stain.planning",
    "translate_slide": "wsi_stain.pipeline",
    "write_pyramid": "wsi_stain.write.tiff",
}

__all__ = [
    "RunConfig",
    "SlideSource",
    "load_bundle",
    "plan_slide",
    "translate_slide",
    "write_pyramid",
]


def __getattr__(name: str) -> Any:
    """Import an exported name on first use (PEP 562), so that `import wsi_stain` stays light."""
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
