"""PatchStore: patches on disk, and which of them are finished.

Room 1 of 4. In: patches, shard by shard. Out: the same. Not here: reading slides, models.

The only door to zarr. Layout of a store:

    grid.json, grid.npy      the grid: change it and the work is void
    he/, ihc/                zarr v3 arrays uint8 (N, t, t, 3): a chunk is a tile, a file a shard
    sd/                      the same, uint8 (N, t, t, 1): spread over seeds, where it was asked for
    done/he/000007.json      made after the shard is safe on disk: key, bytes, SHA-256, facts
"""

from __future__ import annotations

import functools
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import zarr

from wsi_stain.errors import OutputError, PlanError
from wsi_stain.files import atomic_write_bytes, flush_to_disk, flush_tree, writing
from wsi_stain.slides.plan import TileGrid
from wsi_stain.slides.slide_facts import Pixels

__all__ = ["ARRAYS", "ArrayName", "PatchStore"]

ArrayName = Literal["he", "ihc", "sd"]
ARRAYS: tuple[ArrayName, ...] = ("he", "ihc", "sd")
AHEAD = 12
# One file in one folder a shard: a folder is as much work for a shared disk as a file.
CHUNK_KEYS = {"name": "default", "configuration": {"separator": "."}}
CHANNELS = {"he": 3, "ihc": 3, "sd": 1}
# What zarr makes of metadata that are not there, cut or changed.
_DAMAGE = (AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
_OWN_NAMES = frozenset({*ARRAYS, "done", "grid.json", "grid.npy"})
_LEFT_OVERS = ("*.partial", "*.part")  # of zarr, and ours


class _Marker(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is known of a finished shard."""

    key: str
    bytes: int
    sha256: str
    facts: Any = None


class PatchStore:
    """The patches of one slide.

    Parameters
    ----------
    path
        Folder made by `create`.

    Notes
    -----
    Memory bound: one shard. Invariant: a shard is written by one task only; two writers of one
    zarr shard would lose tiles, of different shards they are safe. Pickles as its path.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.grid = TileGrid.load(path / "grid.json")
        self._arrays: dict[str, zarr.Array[Any]] = {}

    @classmethod
    def create(cls, path: Path, grid: TileGrid) -> PatchStore:
        """Make a store, or open the one that is there for the same grid.

        Call it once, before workers start: work for another grid and the left-overs of killed
        writers are removed.

        Raises
        ------
        OutputError
            The folder holds something else, or cannot be written.
        """
        with writing(path, f"Store {path}"):
            _prepare(path, grid)
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> PatchStore:
        """Open a store to read it, or to write shards that no other task writes.

        Raises
        ------
        PlanError
            There is none, or its grid is damaged.
        """
        return cls(path)

    def write(
        self, name: ArrayName, shard: int, tiles: Pixels, key: str, facts: Any = None
    ) -> None:
        """Write a shard, and mark it done once it is safe.

        Parameters
        ----------
        name
            "he", "ihc" or "sd".
        shard
            Its number.
        tiles
            uint8 (n, t, t, 3), of "sd" (n, t, t, 1): all tiles of the shard.
        key
            Identity of the settings that made them; another key makes the shard pending.
        facts
            What is known of the tiles, as plain JSON types: kept, and void, with the shard.

        Raises
        ------
        OutputError
            Wrong shape, or the disk refuses.
        """
        indexes = self.grid.shard(shard)
        expected = (len(indexes), *_tile_shape(name, self.grid))
        if tiles.shape != expected or tiles.dtype != np.uint8:
            raise OutputError(
                f"Store {self.path}: shard {shard} of {name} takes uint8 {expected}, "
                f"not {tiles.dtype} {tiles.shape}."
            )
        with writing(self.path, f"Store {self.path}: shard {shard} of {name}"):
            self._marker(name, shard).unlink(missing_ok=True)
            # An old file goes first: zarr would read it to merge, and stumble if it is damaged.
            file = self._shard_file(name, shard)
            file.unlink(missing_ok=True)
            self._array(name)[indexes.start : indexes.stop] = tiles
            flush_to_disk(file)
            flush_to_disk(file.parent)
            n_bytes = file.stat().st_size
        marker = _Marker(key=key, bytes=n_bytes, sha256=_sha256(tiles), facts=facts)
        atomic_write_bytes(self._marker(name, shard), msgspec.json.encode(marker))

    def read(self, name: ArrayName, shard: int) -> Pixels:
        """Read a shard, uint8 (n, t, t, 3 or 1); the last may be short.

        Raises
        ------
        OutputError
            Not there, or damaged.
        """
        indexes = self.grid.shard(shard)
        return self._get(name, shard, slice(indexes.start, indexes.stop))

    def read_tile(self, name: ArrayName, index: int) -> Pixels:
        """Read one tile, uint8 (t, t, 3 or 1).

        Raises
        ------
        OutputError
            Not there, or damaged.
        """
        if not 0 <= index < self.grid.n_tiles:
            raise IndexError(f"tile {index} of {self.grid.n_tiles}")
        return self._get(name, index // self.grid.shard_tiles, index)

    def tiles_in_order(self, name: ArrayName) -> Callable[[int], Pixels]:
        """Give a `read_tile` for who asks for one tile after the other: it reads some ahead.

        zarr takes longer to find a tile in a shard than to read a dozen. Memory bound: those. For
        shards that are finished and stay as they are; tiles are views, not to be written to.
        """

        @functools.lru_cache(maxsize=1)
        def read(shard: int, first: int) -> Pixels:
            end = self.grid.shard(shard).stop
            return self._get(name, shard, slice(first, min(first + AHEAD, end)))

        def tile(index: int) -> Pixels:
            shard, place = divmod(index, self.grid.shard_tiles)
            pixels: Pixels = read(shard, index - place % AHEAD)[place % AHEAD]
            return pixels

        return tile

    def is_done(self, name: ArrayName, shard: int, key: str, *, verify: bool = False) -> bool:
        """Tell whether a shard was finished under this key and its file has its full size.

        `verify` reads it back and compares the SHA-256: about 1 s per GB.
        """
        marker = self._read_marker(name, shard)
        if marker is None or marker.key != key:
            return False
        try:
            if marker.bytes != self._shard_file(name, shard).stat().st_size:
                return False
        except OSError:  # lost, or out of reach: not there to be used
            return False
        return not verify or self._matches(name, shard, marker.sha256)

    def facts(self, name: ArrayName, shard: int) -> Any:
        """Give what was written with a finished shard; `None` where that was nothing."""
        marker = self._read_marker(name, shard)
        return marker.facts if marker is not None else None

    def pending(self, name: ArrayName, key: str, *, verify: bool = False) -> list[int]:
        """List the shards still to be made under this key."""
        return [
            shard
            for shard in range(self.grid.n_shards)
            if not self.is_done(name, shard, key, verify=verify)
        ]

    def __reduce__(self) -> tuple[type[PatchStore], tuple[Path]]:
        return (PatchStore, (self.path,))

    def _get(self, name: ArrayName, shard: int, where: slice | int) -> Pixels:
        # zarr reads a missing shard as zeros: black tiles instead of an error.
        if not self._shard_file(name, shard).is_file():
            raise OutputError(f"Store {self.path}: shard {shard} of {name} was never written.")
        try:
            return np.asarray(self._array(name)[where])
        except _DAMAGE as error:
            raise OutputError(
                f"Store {self.path}: shard {shard} of {name} is damaged: {error}.",
                hint="Run the same command again: it is made anew.",
            ) from error

    def _matches(self, name: ArrayName, shard: int, sha256: str) -> bool:
        try:
            return _sha256(self.read(name, shard)) == sha256
        except OutputError:  # damaged: the answer to the question, not a failure
            return False

    def _array(self, name: ArrayName) -> zarr.Array[Any]:
        if name not in self._arrays:
            array = zarr.open_array(self.path / name, mode="r+")
            if array.metadata.to_dict()["chunk_key_encoding"] != CHUNK_KEYS:
                raise OutputError(
                    f"Store {self.path} has the layout of an earlier version.",
                    hint="Run the command that made it again: it is made anew.",
                )
            # Else a shard of black tiles, the fill value, would be no file at all.
            self._arrays[name] = array.with_config({"write_empty_chunks": True})
        return self._arrays[name]

    def _shard_file(self, name: ArrayName, shard: int) -> Path:
        return self.path / name / f"c.{shard}.0.0.0"

    def _read_marker(self, name: ArrayName, shard: int) -> _Marker | None:
        try:
            return msgspec.json.decode(self._marker(name, shard).read_bytes(), type=_Marker)
        except (msgspec.MsgspecError, OSError, RecursionError, ValueError):
            return None  # a marker that is not there, or none of ours, says nothing

    def _marker(self, name: ArrayName, shard: int) -> Path:
        return self.path / "done" / name / f"{shard:06d}.json"


def _prepare(path: Path, grid: TileGrid) -> None:
    header = path / "grid.json"
    # A kill may leave any part of a store, also one without its header; strange names are not ours.
    if path.exists() and not header.exists() and _holds_other_files(path):
        raise OutputError(
            f"Store {path} cannot be made: the folder holds other files.",
            hint="Give a new or an empty work folder.",
        )
    if _digest_of(header) != grid.digest:
        for name in (*ARRAYS, "done"):
            if (path / name).exists():
                shutil.rmtree(path / name)
        header.unlink(missing_ok=True)
    for name in ARRAYS:
        _create_array(path, name, grid)
        (path / "done" / name).mkdir(parents=True, exist_ok=True)
    for pattern in _LEFT_OVERS:
        for left_over in path.rglob(pattern):
            left_over.unlink()
    if not header.exists():
        grid.save(header)
        flush_tree(path)  # or a power cut could take the folders from under shards that are done


def _holds_other_files(path: Path) -> bool:
    names = [entry.name for entry in path.iterdir() if not entry.name.endswith(".part")]
    return not _OWN_NAMES.issuperset(names)


def _digest_of(header: Path) -> str:
    try:
        return TileGrid.load(header).digest
    except PlanError:  # a grid that cannot be read is another grid
        return ""


def _create_array(path: Path, name: ArrayName, grid: TileGrid) -> None:
    """Make an array; one that is there stays if it is sound, else it goes with its markers."""
    tile = _tile_shape(name, grid)
    if _fits(path / name, grid, tile):
        return
    for folder in (path / "done" / name, path / name):
        if folder.exists():
            shutil.rmtree(folder)
    _new_array(path / name, grid, tile)


def _new_array(
    place: Path | zarr.storage.MemoryStore, grid: TileGrid, tile: tuple[int, int, int]
) -> zarr.Array[Any]:
    return zarr.create_array(
        place,
        shape=(grid.n_tiles, *tile),
        dtype=np.uint8,
        chunks=(1, *tile),
        shards=(grid.shard_tiles, *tile),
        chunk_key_encoding=CHUNK_KEYS,  # type: ignore[arg-type]
        compressors=None,
        filters=None,
        fill_value=0,
    )


def _tile_shape(name: ArrayName, grid: TileGrid) -> tuple[int, int, int]:
    return grid.tile_px, grid.tile_px, CHANNELS[name]


def _fits(path: Path, grid: TileGrid, tile: tuple[int, int, int]) -> bool:
    """Tell whether an array's metadata can be read and are those that `grid` asks for.

    All of them: zarr opens an array whose codecs it then cannot run.
    """
    try:
        found = zarr.open_array(path, mode="r").metadata.to_dict()
    except _DAMAGE:
        return False
    return found == _new_array(zarr.storage.MemoryStore(), grid, tile).metadata.to_dict()


def _sha256(tiles: Pixels) -> str:
    return hashlib.sha256(np.ascontiguousarray(tiles).data).hexdigest()
