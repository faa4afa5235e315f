"""What the teacher makes of H&E: start image and result, made once and kept in the run folder.

In: a bundle, H&E fields. Out: `Pairs` in memory, one safetensors file per few pairs on disk. Not
here: the student, losses.

The folder's name is a digest of all that the pairs depend on: change the bundle, a setting or the
H&E, and others are made. A stopped run goes on with the file that is missing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from msgspec import structs
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from wsi_stain.config import SampleConfig, SolverSpec, StainConfig, TrainConfig
from wsi_stain.errors import BundleError, ConfigError, NoTissueError
from wsi_stain.files import atomic_write_bytes, make_folder
from wsi_stain.manifest import Event, Listener
from wsi_stain.stages import digest
from wsi_stain.stain.start import COLOR_VERSION
from wsi_stain.train.data import ImageSet
from wsi_stain.train.he_fields import HeField
from wsi_stain.translate.bundle import FILES, ModelBundle
from wsi_stain.translate.fit import ColorFit, fit_pictures
from wsi_stain.translate.noise import NoiseField
from wsi_stain.translate.pixels import to_model, to_rgb
from wsi_stain.translate.sampler import Sampler, View
from wsi_stain.translate.structure import edge_map

__all__ = ["PairBatch", "Pairs", "make_pairs", "teacher_of", "teacher_solver"]

PAIRS_PER_FILE = 8
BATCH = 4
# Held-out pairs lie far from the others in the noise field, so that they share no noise.
_SPLIT_ROWS_PX = {"train": 0, "val": 1 << 24}


@dataclass(frozen=True)
class PairBatch:
    """A batch for the student.

    Attributes
    ----------
    view
        Start image, edges of the H&E, noise by step, scale of the gradient map.
    target
        What the teacher made, float32 (B, 3, H, W) in [-1, 1].
    """

    view: View
    target: torch.Tensor


@dataclass(frozen=True, eq=False)
class Pairs:
    """Teacher pairs in memory.

    Attributes
    ----------
    he, start, target
        uint8 (n, s, s, 3).
    map_scale
        float32 (n,).
    field, row_px
        Noise, and the row of the noise field at which the pairs lie side by side.
    """

    he: NDArray[np.uint8]
    start: NDArray[np.uint8]
    target: NDArray[np.uint8]
    map_scale: NDArray[np.float32]
    field: NoiseField
    row_px: int

    def __len__(self) -> int:
        return len(self.he)

    def batch(
        self, n: int, crop_px: int, rng: np.random.Generator, device: torch.device
    ) -> PairBatch:
        """Draw n crops of one flip and turn; noise is flipped and turned with them.

        Crops lie on multiples of 16 px, where the nets' grids coincide with the teacher's.
        """
        places = (self.he.shape[1] - crop_px) // 16 + 1
        picks = rng.integers(len(self), size=n)
        offsets = 16 * rng.integers(places, size=(n, 2))
        turns, flip = int(rng.integers(4)), bool(rng.integers(2))

        def move(picture: torch.Tensor) -> torch.Tensor:
            turned = torch.rot90(picture, turns, (2, 3))
            return (turned.flip(3) if flip else turned).contiguous()

        return self._cut(picks, offsets, crop_px, move, device)

    def whole(self, picks: NDArray[np.int64], device: torch.device) -> PairBatch:
        """Give whole pairs as they are."""
        zeros = np.zeros((len(picks), 2), np.int64)
        return self._cut(picks, zeros, self.he.shape[1], lambda picture: picture, device)

    def _cut(
        self,
        picks: NDArray[np.int64],
        offsets: NDArray[np.int64],
        crop_px: int,
        move: Callable[[torch.Tensor], torch.Tensor],
        device: torch.device,
    ) -> PairBatch:
        places = _places(picks, self.he.shape[1], self.row_px) + offsets[:, ::-1]
        places_xy = torch.from_numpy(places).to(device)

        def cut(pictures: NDArray[np.uint8]) -> torch.Tensor:
            crops = [
                pictures[i, y : y + crop_px, x : x + crop_px]
                for i, (y, x) in zip(picks, offsets, strict=True)
            ]
            return move(to_model(np.stack(crops), device))

        @functools.cache
        def noise(step: int) -> torch.Tensor:
            return move(self.field.at(places_xy, step, crop_px))

        scale = torch.from_numpy(self.map_scale[picks]).to(device).view(-1, 1, 1, 1)
        view = View(cut(self.start), edge_map(cut(self.he)), noise, scale)
        return PairBatch(view, cut(self.target))


def _places(numbers: NDArray[np.int64], side_px: int, row_px: int) -> NDArray[np.int64]:
    """Lay pairs side by side in the noise field: left and top of each, int64 (n, 2)."""
    return np.stack([numbers * side_px, np.full_like(numbers, row_px)], axis=1)


def teacher_solver(bundle: ModelBundle, config: TrainConfig) -> SolverSpec:
    """Give the bundle's own solver, made deterministic: with eta = 0 one input has one output."""
    steps = config.distill.teacher_steps or bundle.spec.solver.steps
    return structs.replace(bundle.spec.solver, eta=0.0, steps=steps)


def teacher_of(bundle: ModelBundle, config: TrainConfig) -> Sampler:
    """Build the guided teacher.

    Raises
    ------
    BundleError
        The bundle lacks the score net, or one that its guidance needs.
    """
    sampler = bundle.sampler(teacher_solver(bundle, config), bundle.spec.guidance)
    if sampler is None:
        raise BundleError(
            f"Bundle {bundle.spec.name} has no score net to teach a student.",
            hint="Train stage score first: wsi-stain train score --recipe RECIPE --run RUN "
            "--bundle BUNDLE",
        )
    return sampler


def make_pairs(
    bundle: ModelBundle,
    config: TrainConfig,
    fields: list[HeField],
    split: str,
    folder: Path,
    listener: Listener,
) -> Pairs:
    """Make the pairs that are missing and load all.

    Parameters
    ----------
    bundle
        The teacher.
    config
        Recipe: data, number of pairs, teacher's steps, seed.
    fields
        H&E to draw from.
    split
        "train" or "val".
    folder
        Run folder; pairs go to its folder `pairs`.
    listener
        Hears the stage "pairs".

    Raises
    ------
    NoTissueError
        A field shows too little stain; it is named.
    ConfigError
        A file of pairs cannot be read.
    OutputError
        A file cannot be written.
    """
    distill = config.distill
    n_pairs = distill.pairs if split == "train" else distill.held_out_pairs
    n_files = -(-n_pairs // PAIRS_PER_FILE)
    place = folder / "pairs" / _key(bundle, config, fields, split)
    make_folder(place)
    maker = _Maker(bundle, config, fields, split)
    listener(Event("pairs", "start", total=n_pairs))
    parts = []
    for number in range(n_files):
        path = place / f"{number:05d}.safetensors"
        if not path.is_file():
            first = number * PAIRS_PER_FILE
            made = maker.make(np.arange(first, first + PAIRS_PER_FILE))
            atomic_write_bytes(path, save_tensors(made))
        parts.append(_load(path))
        done = min(n_pairs, (number + 1) * PAIRS_PER_FILE)
        listener(Event("pairs", "advance", done=done, total=n_pairs))
    listener(Event("pairs", "finish", done=n_pairs, total=n_pairs))
    joined = {name: np.concatenate([part[name] for part in parts])[:n_pairs] for name in parts[0]}
    return Pairs(**joined, field=NoiseField(config.seed), row_px=_SPLIT_ROWS_PX[split])


def _load(path: Path) -> dict[str, NDArray[np.generic]]:
    try:
        tensors = load_tensors(path.read_bytes())
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"Teacher pairs {path} cannot be read: {error}.", hint="Delete the file."
        ) from error
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _key(bundle: ModelBundle, config: TrainConfig, fields: list[HeField], split: str) -> str:
    """Name all that a pair depends on; not how many there are, nor the student."""
    spec = bundle.spec
    files = {name: sha for name, sha in spec.files.items() if name != FILES["student"]}
    parts = [
        msgspec.to_builtins([spec.net, spec.critic, spec.heads, spec.guidance, spec.color]),
        [spec.start_image, spec.timesteps, spec.beta_first, spec.beta_last, str(bundle.dtype)],
        msgspec.to_builtins([teacher_solver(bundle, config), config.data]),
        [ImageSet(field.images, config.data).digest() for field in fields],
        msgspec.to_builtins([field.white for field in fields]),
    ]
    return digest(files, parts, split, config.seed, COLOR_VERSION)[:16]


class _Maker:
    """Draws H&E and runs the teacher on it."""

    def __init__(
        self, bundle: ModelBundle, config: TrainConfig, fields: list[HeField], split: str
    ) -> None:
        self.bundle, self.config, self.fields, self.split = bundle, config, fields, split
        self.teacher = teacher_of(bundle, config)
        self.noise = NoiseField(config.seed)
        weights = config.data.weights
        chance = [f.area_px() * weights.get(f.images[0].source, 1.0) for f in fields]
        self.chance = np.asarray(chance) / np.sum(chance)
        self.fits: dict[int, ColorFit] = {}

    def make(self, numbers: NDArray[np.int64]) -> dict[str, torch.Tensor]:
        """Make the pairs of these numbers; each depends on its number alone."""
        drawn = [self._draw(int(number)) for number in numbers]
        he = np.stack([rgb for rgb, _ in drawn])
        start = np.stack([fit.start.apply(rgb) for rgb, fit in drawn])
        # A scale that nobody looks at is 1.
        scale = np.array([fit.map_scale or 1.0 for _, fit in drawn], np.float32)
        target = np.concatenate(
            [
                self._teach(he[rows], start[rows], scale[rows], numbers[rows])
                for rows in np.split(np.arange(len(he)), range(BATCH, len(he), BATCH))
            ]
        )
        arrays = {"he": he, "start": start, "target": target, "map_scale": scale}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _teach(
        self,
        he: NDArray[np.uint8],
        start: NDArray[np.uint8],
        scale: NDArray[np.float32],
        numbers: NDArray[np.int64],
    ) -> NDArray[np.uint8]:
        device, side_px = self.bundle.device, he.shape[1]
        places = _places(numbers, side_px, _SPLIT_ROWS_PX[self.split])
        places_xy = torch.from_numpy(places).to(device)

        @functools.cache
        def noise(step: int) -> torch.Tensor:
            return self.noise.at(places_xy, step, side_px)

        scales = torch.from_numpy(scale).to(device).view(-1, 1, 1, 1)
        return to_rgb(self.teacher(to_model(start, device), noise, scales, to_model(he, device)))

    def _draw(self, number: int) -> tuple[NDArray[np.uint8], ColorFit]:
        """Draw one crop, and the color fit of its slide."""
        lane = sorted(_SPLIT_ROWS_PX).index(self.split)
        rng = np.random.default_rng(np.random.SeedSequence([self.config.seed, lane, number]))
        index = int(rng.choice(len(self.fields), p=self.chance))
        field = self.fields[index]
        crop = ImageSet(field.images, self.config.data).batch(1, rng)
        return to_rgb(crop)[0], self._fit(index)

    def _fit(self, index: int) -> ColorFit:
        if index not in self.fits:
            field = self.fields[index]
            spec, sample = self.bundle.spec, SampleConfig()
            try:
                fit = fit_pictures(field.pixels(), field.white, spec, StainConfig(), sample)
            except NoTissueError as error:
                text = f"{field.images[0].path}: {error.message}"
                raise NoTissueError(text, hint="Leave this image out.") from error
            self.fits[index] = fit
        return self.fits[index]
