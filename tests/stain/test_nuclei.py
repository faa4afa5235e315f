"""Start image "nuclei": the stain is decided for a nucleus as a whole."""

from __future__ import annotations

import cv2
import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from wsi_stain.config import ColorReference
from wsi_stain.errors import BundleError, ConfigError, NoTissueError
from wsi_stain.stain.density import HDX, POSITIVE_OD, dab_od, is_stained, rgb_to_od
from wsi_stain.stain.normalize import fit_stain
from wsi_stain.stain.separate import angle_deg
from wsi_stain.stain.start import StartTransform, fit_nuclei_start, fit_start

Rgb8 = npt.NDArray[np.uint8]
WHITE = (243.0, 241.0, 244.0)
HE = np.array([[0.651, 0.701, 0.290], [0.216, 0.801, 0.558]])
SIDE_PX, RADIUS_PX, PITCH_PX, MPP = 256, 7, 32, 0.5
DENSE = 1.6
BAND_PX = 224  # below: strong eosin, which sets the scale


def _density(side_px: int = SIDE_PX) -> npt.NDArray[np.float64]:
    """Hematoxylin of nuclei on a grid; every fourth is dense, and all have a coarse chromatin."""
    rng = np.random.default_rng(5)
    density = np.zeros((side_px, side_px))
    for number, (row, column) in enumerate(_centers(side_px)):
        strength = DENSE if number % 4 == 0 else 0.7
        cv2.circle(density, (column, row), RADIUS_PX, strength, -1)
    chromatin = 1.0 + 0.25 * np.sign(rng.standard_normal(density.shape))
    return density * chromatin


def _centers(side_px: int = SIDE_PX) -> list[tuple[int, int]]:
    places = range(PITCH_PX // 2, side_px, PITCH_PX)
    return [(row, column) for row in places for column in places]


def _picture(glass_rows_px: int = 0) -> Rgb8:
    return _stained(_density(), glass_rows_px)


def _stained(hematoxylin: npt.NDArray[np.float64], glass_rows_px: int = 0) -> Rgb8:
    eosin = np.full((SIDE_PX, SIDE_PX), 0.4)
    eosin[BAND_PX:] = 1.2
    density = np.stack([hematoxylin, eosin], axis=-1)
    density[:glass_rows_px] = 0.0
    od = density @ (HE / np.linalg.norm(HE, axis=1, keepdims=True))
    levels = np.clip(np.rint(np.array(WHITE) * np.exp(-od)), 0, 255)
    picture: Rgb8 = levels.astype(np.uint8)
    return picture


@pytest.fixture
def colors(reference: ColorReference) -> ColorReference:
    """Blue from pale to middling, brown from middling to dark; a fifth of the nuclei's area."""
    ranks = np.linspace(0.0, 1.0, 33)
    blue, brown = np.array([1.2, 1.1, 0.7]), np.array([0.6, 1.1, 1.3])
    return msgspec.structs.replace(
        reference,
        positive_share=0.04,
        blue_od=tuple(map(tuple, ((0.1 + 0.3 * ranks)[:, None] * blue).tolist())),
        brown_od=tuple(map(tuple, ((0.3 + 0.7 * ranks)[:, None] * brown).tolist())),
    )


def _fit(picture: Rgb8, reference: ColorReference) -> StartTransform:
    tissue = is_stained(picture, WHITE)
    transform = fit_stain(picture[tissue], WHITE, reference, "macenko")
    return fit_nuclei_start(picture[None], tissue[None], transform, reference, MPP)


def test_nuclei_are_brown_or_blue_to_the_rim(colors: ColorReference) -> None:
    picture = _picture()
    start = _fit(picture, colors)
    od = rgb_to_od(start.apply(picture), start.target_white)
    inside = np.zeros((SIDE_PX, SIDE_PX), np.uint8)
    for number, (row, column) in enumerate(_centers()):
        nucleus = cv2.circle(inside.copy(), (column, row), RADIUS_PX - 1, 1, -1).astype(bool)
        brown = od[nucleus][:, 2] > od[nucleus][:, 0]
        wanted = number % 4 == 0
        assert np.mean(brown == wanted) > 0.97, (number, wanted, brown.mean())


def test_brown_reaches_the_rim_and_not_the_neighbor(colors: ColorReference) -> None:
    """A dense heart with a paler rim is one brown nucleus; a pale one that touches it is blue."""
    density = _density()
    row, column = _centers()[0]  # the first of the dense ones, and a pale one at its right
    cv2.circle(density, (column, row), RADIUS_PX, 0.65 * DENSE, -1)
    cv2.circle(density, (column, row), 3, DENSE, -1)
    cv2.circle(density, (column + 2 * RADIUS_PX, row), RADIUS_PX - 1, 0.4 * DENSE, -1)
    picture = _stained(density)
    od = rgb_to_od(_fit(picture, colors).apply(picture), WHITE)
    brown = od[..., 2] > od[..., 0]
    assert brown[row - 4 : row + 5, column - 4 : column + 5].mean() > 0.97
    assert (
        brown[row - 3 : row + 4, column + RADIUS_PX + 3 : column + 3 * RADIUS_PX - 2].mean() < 0.03
    )


def test_matter_wider_than_a_nucleus_stays_blue(colors: ColorReference) -> None:
    """Keratin or a fold, as dense as the brown nuclei, also where the picture cuts it."""
    density = _density()
    density[96:160, :64] = DENSE
    picture = _stained(density)
    od = rgb_to_od(_fit(picture, colors).apply(picture), WHITE)
    brown = od[..., 2] > od[..., 0]
    assert brown[100:156, :60].mean() < 0.01
    row, column = _centers()[4]  # dense, and apart from it
    assert brown[row - 4 : row + 5, column - 4 : column + 5].mean() > 0.97
    pale_row, pale_column = _centers()[5]
    nucleus = od[pale_row - 4 : pale_row + 5, pale_column - 4 : pale_column + 5, 0].mean()
    assert od[100:156, :60, 0].mean() < 1.2 * nucleus  # paler than a nucleus of its density


def test_nucleus_is_brown_when_the_border_cuts_it(colors: ColorReference) -> None:
    density = _density()
    row, column = _centers()[4]
    left = column - 3  # the picture begins in its middle
    picture = _stained(density)
    start = _fit(picture, colors)
    od = rgb_to_od(start.apply(np.ascontiguousarray(picture[:, left:])), WHITE)
    brown = od[..., 2] > od[..., 0]
    assert brown[row - 4 : row + 5, :6].mean() > 0.97


def test_a_field_without_nuclei_gets_no_brown(colors: ColorReference) -> None:
    picture = _stained(np.full((SIDE_PX, SIDE_PX), DENSE))
    made = _fit(picture, colors).apply(picture)
    assert (dab_od(made) > POSITIVE_OD).mean() < 0.01


def test_packed_nuclei_are_brown_all_the_same(colors: ColorReference) -> None:
    """Cytoplasm between them, though narrow, tells them from a fold."""
    density = _density()
    density[:96, 160:] = 0.25 * DENSE
    places = [(16 + 18 * i, 178 + 18 * j) for i in range(4) for j in range(4)]
    for row, column in places:
        cv2.circle(density, (column, row), RADIUS_PX, DENSE, -1)
    wide = msgspec.structs.replace(colors, positive_share=0.08)
    picture = _stained(density)
    od = rgb_to_od(_fit(picture, wide).apply(picture), WHITE)
    brown = od[..., 2] > od[..., 0]
    hearts = [brown[row - 3 : row + 4, column - 3 : column + 4].mean() for row, column in places]
    assert min(hearts) > 0.9


def test_stroma_is_pale_and_no_glass(colors: ColorReference) -> None:
    picture = _picture()
    start = _fit(picture, colors)
    made = start.apply(picture)
    od = rgb_to_od(made, start.target_white).mean(axis=-1)
    far = cv2.dilate((_density() > 0).astype(np.uint8), np.ones((15, 15), np.uint8)) == 0
    far[BAND_PX:] = False
    assert is_stained(made, start.target_white)[far].mean() > 0.99
    assert 0.15 < od[far].mean() < 0.6 * od[_density() > 0].mean()


def test_counterstain_is_hematoxylin_whatever_the_mean_of_the_training_set(
    colors: ColorReference,
) -> None:
    """Laboratories' blues average to slate; the depth is theirs, the hue the standard one."""
    slate = tuple((od, od, od) for od, _, _ in colors.blue_od)
    picture = _picture()
    start = _fit(picture, msgspec.structs.replace(colors, blue_od=slate))
    od = rgb_to_od(start.apply(picture), start.target_white)
    row, column = _centers()[1]
    nucleus = od[row - 2 : row + 3, column - 2 : column + 3].mean(axis=(0, 1))
    assert angle_deg(nucleus, HDX[0]) < 10.0


def test_stroma_takes_the_veil_of_the_bundle(colors: ColorReference) -> None:
    picture = _picture()
    deep = msgspec.structs.replace(colors, veil_od=(0.1, 0.2, 0.4))
    pale, dark = (
        rgb_to_od(_fit(picture, each).apply(picture), WHITE)[:8, :8] for each in (colors, deep)
    )
    assert (dark[..., 2] > pale[..., 2] + 0.1).all()


def test_glass_stays_white(colors: ColorReference) -> None:
    picture = _picture(glass_rows_px=48)
    start = _fit(picture, colors)
    np.testing.assert_array_equal(
        start.apply(picture)[:40], np.broadcast_to(np.rint(start.target_white), (40, SIDE_PX, 3))
    )


def test_tiles_of_a_batch_do_not_mix(colors: ColorReference) -> None:
    picture = _picture()
    start = _fit(picture, colors)
    other = np.ascontiguousarray(picture[::-1])
    both = start.apply(np.stack([picture, other]))
    np.testing.assert_array_equal(both[0], start.apply(picture))
    np.testing.assert_array_equal(both[1], start.apply(other))


def test_depth_follows_the_pixel(colors: ColorReference) -> None:
    """Chromatin stays visible in nuclei of both stains."""
    picture = _picture()
    start = _fit(picture, colors)
    od = rgb_to_od(start.apply(picture), start.target_white).mean(axis=-1)
    row, column = _centers()[0]
    nucleus = np.s_[row - 4 : row + 5, column - 4 : column + 5]
    assert np.corrcoef(od[nucleus].ravel(), _density()[nucleus].ravel())[0, 1] > 0.9


def test_the_fit_is_plain_numbers(colors: ColorReference) -> None:
    picture = _picture()
    start = _fit(picture, colors)
    again = msgspec.json.decode(msgspec.json.encode(start), type=StartTransform)
    assert again == start
    np.testing.assert_array_equal(again.apply(picture), start.apply(picture))


def test_without_colors_of_single_stains_the_remedy_is_named(reference: ColorReference) -> None:
    with pytest.raises(BundleError, match="no colors of single stains") as caught:
        _fit(_picture(), reference)
    assert "ranked" in str(caught.value.hint)


def test_too_little_tissue_is_refused(colors: ColorReference) -> None:
    picture = _picture()
    start = _fit(picture, colors)
    nothing = np.zeros((1, SIDE_PX, SIDE_PX), np.bool_)
    with pytest.raises(NoTissueError, match="Only 0 stained pixels"):
        fit_nuclei_start(picture[None], nothing, start.stain, colors, MPP)


def test_pixels_alone_are_not_enough(colors: ColorReference) -> None:
    picture = _picture()
    start = _fit(picture, colors)
    with pytest.raises(ConfigError, match="fitted on pictures"):
        fit_start(picture.reshape(-1, 3), WHITE, start.stain, colors, "nuclei")
