"""All metrics of one picture: right picture, right white, none where there is no value."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from msgspec import structs

from wsi_stain.evaluate.metrics_seam import BorderLines
from wsi_stain.evaluate.metrics_stain import dab_p90, iod
from wsi_stain.evaluate.paint import Painted
from wsi_stain.evaluate.pairs import ImageFile, Subject
from wsi_stain.evaluate.recipe import ImageGroup
from wsi_stain.evaluate.scores import MAKING, PAIRED, UNPAIRED, score_making, score_picture
from wsi_stain.geometry import Region, Scale, Size
from wsi_stain.stain.density import dab_od, is_stained
from wsi_stain.stain.white import WhitePoint

Rgb8 = npt.NDArray[np.uint8]
WHITE = (243.0, 243.0, 244.0)


@pytest.fixture(scope="module")
def he(he_pixels: Rgb8) -> Rgb8:
    """Tissue with a rim of glass."""
    return he_pixels[250:450, 100:300]


@pytest.fixture(scope="module")
def brown(he: Rgb8) -> Rgb8:
    """The same field, brown where it was dark."""
    made = he.copy()
    made[he.min(axis=-1) < 120] = (120, 80, 60)
    return made


def subject(he: Rgb8, reference: Rgb8 | None, mpp: float = 0.5) -> Subject:
    glass = WhitePoint(rgb=WHITE, origin="glass", glass_fraction=0.5)
    file = ImageFile(ImageGroup(name="g", mpp=mpp, folder="he"), Path("a.png"), None, "he", "CC0")
    size = Size(he.shape[1], he.shape[0])
    scale = Scale(mpp / 0.5, 0.5, size)
    theirs = None if reference is None else glass
    return Subject(file, scale, he, reference, Region(0, 0, *size), glass, theirs, ("",))


def test_picture_equal_to_its_reference_scores_perfectly(he: Rgb8, brown: Rgb8) -> None:
    scores = score_picture(brown, WHITE, subject(he, brown), 0.15)
    assert set(scores) >= {*UNPAIRED, *PAIRED}
    assert scores["psnr"] is None, "infinite"
    for name in ("ssim", "ssim_box11", "vif", "hist"):
        assert scores[name] == pytest.approx(1.0)
    for name in ("hue_deg", "positive_fraction", "labelling_percent", "n_nuclei", "iod"):
        assert scores[name] == scores[f"ref_{name}"] != 0


def test_numbers_are_those_of_the_metrics(he: Rgb8, brown: Rgb8) -> None:
    scores = score_picture(brown, WHITE, subject(he, he), 0.15)
    assert scores["iod"] == iod(brown)
    assert scores["ref_iod"] == iod(he)
    assert scores["miod"] == pytest.approx(iod(brown) / (200 * 200))
    assert scores["dab_p90"] == dab_p90(brown)


def test_no_reference_means_no_paired_numbers(he: Rgb8) -> None:
    scores = score_picture(he, WHITE, subject(he, None), 0.15)
    assert set(scores) == set(UNPAIRED)
    assert scores["sobel_ssim"] == pytest.approx(1.0)
    assert scores["white_error"] == 0.0


def test_blank_output_has_no_hue_and_no_index(he: Rgb8) -> None:
    blank = np.full_like(he, 243)
    scores = score_picture(blank, WHITE, subject(he, None), 0.15)
    assert scores["hue_deg"] is None
    assert scores["labelling_percent"] is None
    assert scores["positive_fraction"] == 0.0
    error, signed = scores["white_error"], scores["white_signed"]
    assert error is not None
    assert error == signed
    assert error > 0.3


def test_enlarged_pixels_show_no_nuclei(he: Rgb8, brown: Rgb8) -> None:
    scores = score_picture(brown, WHITE, subject(he, None, mpp=1.0), 0.15)
    assert scores["labelling_percent"] is None
    assert scores["n_nuclei"] is None


def test_making_tells_bare_white_seams_and_spread(he: Rgb8, brown: Rgb8) -> None:
    lines = (BorderLines((80,), (80,), 80), BorderLines((112,), (112,), 80))
    scores = score_making(Painted(he, he, lines), WHITE, subject(he, None))
    assert set(scores) == set(MAKING)
    assert scores["white_error_bare"] == 0.0
    assert scores["seam_ratio"] == scores["seam_ratio_he"] != 1.0, "nuclei lie as they lie"
    assert scores["dab_sd"] is None
    torn = brown.copy()
    torn[:, 80:] = np.clip(torn[:, 80:].astype(int) - 60, 0, 255)
    worse = score_making(Painted(torn, brown, lines), WHITE, subject(he, None))
    assert worse["seam_ratio_he"] == scores["seam_ratio_he"]
    assert (worse["seam_ratio"] or 0.0) > 1.5 * (scores["seam_ratio"] or 9.0)
    filled = np.full_like(he, 120)
    glass = score_making(Painted(brown, filled), WHITE, subject(he, None))
    assert glass["seam_ratio"] is None
    open_share = float((~is_stained(he, WHITE)).mean())
    assert glass["white_error_bare"] == pytest.approx(open_share)
    assert open_share > 0.02


def test_spread_is_ranked_against_the_error_on_aligned_pairs_alone(he: Rgb8, brown: Rgb8) -> None:
    error = np.abs(dab_od(brown) - dab_od(he))
    painted = Painted(brown, brown, sd=error)
    pair = subject(he, he)
    assert score_making(painted, WHITE, pair)["sd_error_rho"] is None
    aligned = replace(pair.file, group=structs.replace(pair.file.group, aligned=True))
    scores = score_making(painted, WHITE, replace(pair, file=aligned))
    assert scores["sd_error_rho"] is not None
    assert scores["sd_error_rho"] > 0.8
    assert scores["dab_sd"] is not None
    assert scores["dab_sd"] > 0.0
