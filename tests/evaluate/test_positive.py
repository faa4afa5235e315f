"""The one number of a slide in an archive's table: that of the report, or none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from wsi_stain.errors import OutputError
from wsi_stain.evaluate.metrics_nuclei import stain_densities
from wsi_stain.evaluate.metrics_stain import POSITIVE_OD
from wsi_stain.evaluate.positive import positive_fraction
from wsi_stain.geometry import Scale
from wsi_stain.layout import find_run
from wsi_stain.slides.image import SlideSource
from wsi_stain.stain.density import is_stained
from wsi_stain.write.overview import HeFolder

MakeRun = Callable[..., Path]
WHITE = (243.0, 243.0, 244.0)


def test_share_is_that_of_the_fields_together(tmp_path: Path, make_run: MakeRun) -> None:
    files = find_run(make_run(tmp_path))
    kept = HeFolder(files.folder / "he")
    he = kept.record()
    tissue, brown = [], []
    with SlideSource.open(files.output) as source:
        for number, region in enumerate(he.fields):
            ihc = source.read_out(region, Scale(1.0, he.mpp_out, he.size_out))
            tissue.append(is_stained(kept.field(number), WHITE).ravel())
            brown.append((stain_densities(ihc, WHITE)[..., 1] > POSITIVE_OD).ravel())
    expected = np.concatenate(brown)[np.concatenate(tissue)].mean()
    assert 0.001 < expected < 0.5, "the left quarter is brown"
    assert positive_fraction(files) == pytest.approx(expected, abs=1e-5)


def test_nothing_is_claimed_without_kept_fields(tmp_path: Path, make_run: MakeRun) -> None:
    assert positive_fraction(find_run(make_run(tmp_path, keeps_he=False))) is None


def test_damaged_record_is_told(tmp_path: Path, make_run: MakeRun) -> None:
    files = find_run(make_run(tmp_path))
    raw = json.loads(files.manifest.read_text())
    files.manifest.write_text(json.dumps(raw | {"stain": {}}))
    with pytest.raises(OutputError, match="no color fit"):
        positive_fraction(files)
