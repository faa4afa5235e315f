"""What a user may set for `quantify`.

In: nothing. Out: `QuantifyConfig`. Not here: measuring.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from wsi_stain.config.values import MaskMpp, Settings


class QuantifyConfig(Settings, frozen=True, kw_only=True):
    """How stain is measured. Pixels are taken at the pixel size of the models, or coarser."""

    mpp: Annotated[float, msgspec.Meta(ge=0.1, le=2.0)] = 0.5  # of the pixels that are measured
    mpp_tolerance: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.1
    mask_mpp: MaskMpp = 8.0
    positive_od: Annotated[float, msgspec.Meta(gt=0.0, le=3.0)] = 0.15  # log10 DAB OD
    tile_um: Annotated[float, msgspec.Meta(ge=64.0, le=4096.0)] = 128.0  # of the heat map
    hot_spot_mm2: Annotated[float, msgspec.Meta(ge=0.01, le=25.0)] = 1.0
