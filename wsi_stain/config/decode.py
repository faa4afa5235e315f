"""Decoding: TOML recipes, bundle headers, flags. `msgspec` checks; this words the errors.

In: files, flags. Out: settings. Not here: the settings themselves.
"""

from __future__ import annotations

import difflib
import math
import re
import stat
from pathlib import Path
from typing import Any, TypeVar, get_args

import msgspec

from wsi_stain.config.bundle import BUNDLE_SCHEMA, BundleSpec
from wsi_stain.config.run import RunConfig
from wsi_stain.config.values import Settings
from wsi_stain.errors import BundleError, ConfigError, WsiStainError

T = TypeVar("T", bound=Settings)


def load_recipe(path: Path, kind: type[T]) -> tuple[T, dict[str, Any]]:
    """Read a TOML recipe.

    Parameters
    ----------
    path
        TOML file.
    kind
        `RunConfig` or `TrainConfig`.

    Returns
    -------
    tuple
        The settings, and the raw nested mapping of what the file sets.

    Raises
    ------
    ConfigError
        Not readable, not TOML, unknown key (the nearest known one is named) or bad value.
    """
    data = _read_recipe(path)
    try:
        raw = msgspec.toml.decode(data)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise ConfigError(f"Recipe {path} is not valid TOML: {error}") from error
    return _convert(raw, kind, f"Recipe {path}", ConfigError), raw


def _read_recipe(path: Path) -> bytes:
    try:
        mode = path.stat().st_mode
        if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):  # may never end, or never begin
            raise ConfigError(f"Recipe {path} is a pipe or a device, not a file.")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"Recipe {path} cannot be read: {error.strerror}.") from error


def decode_bundle_spec(data: bytes, source: str) -> BundleSpec:
    """Decode `bundle.json`.

    Parameters
    ----------
    data
        UTF-8 JSON.
    source
        File name for error messages.

    Raises
    ------
    BundleError
        Not JSON, made by a later version, or a field is unknown or out of bounds.
    """
    try:
        raw = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise BundleError(f"{source} is not valid JSON: {error}") from error
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if isinstance(schema, int) and schema > BUNDLE_SCHEMA:
        raise BundleError(
            f"{source} has schema {schema}; this version reads up to {BUNDLE_SCHEMA}.",
            hint="Install a newer wsi-stain.",
        )
    spec = _convert(raw, BundleSpec, source, BundleError)
    if spec.default_solver == "student" and spec.student is None:
        raise BundleError(f"{source}: default_solver is the student, and there is none.")
    solvers = [solver for solver in (spec.solver, spec.teacher, spec.student) if solver]
    highest = max(solver.start_step for solver in solvers)
    if highest > spec.timesteps:
        raise BundleError(
            f"{source}: start_step {highest} lies above the {spec.timesteps} timesteps."
        )
    return spec


def resolve_run_config(
    flags: dict[str, Any], recipe: Path | None = None
) -> tuple[RunConfig, dict[str, str]]:
    """Settle a run's settings: flags beat the recipe, the recipe beats defaults.

    Parameters
    ----------
    flags
        Dotted names to values, for example ``{"write.quality": 85}``; `None` means not given.
    recipe
        TOML file, or none.

    Returns
    -------
    tuple
        The settings, and the origin ("flag" or "recipe") of every value that is not a default.

    Raises
    ------
    ConfigError
        Unknown key or bad value, with its origin named.
    """
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if recipe is not None:
        _, merged = load_recipe(recipe, RunConfig)
        origins = dict.fromkeys(_dotted(merged), "recipe")
    for name, value in flags.items():
        if value is None:
            continue
        *parents, leaf = name.split(".")
        node = merged
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
        origins[name] = "flag"
    return _convert(merged, RunConfig, "Settings", ConfigError), origins


def decode_flags(flags: dict[str, Any], kind: type[T]) -> T:
    """Make settings of flags alone; `None` means not given.

    Raises
    ------
    ConfigError
        Bad value, with its name.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    return _convert(given, kind, "Settings", ConfigError)


def _dotted(node: dict[str, Any], prefix: str = "") -> list[str]:
    names: list[str] = []
    for key, value in node.items():
        names += _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
    return names


def _convert(raw: Any, kind: type[T], source: str, error_class: type[WsiStainError]) -> T:
    try:
        if endless := _not_finite(raw):
            # Bounds let them through: no comparison with nan is ever true.
            raise error_class(f"{source}: {endless[0]} is not a finite number.")
        return msgspec.convert(raw, kind)
    except (msgspec.ValidationError, OverflowError, RecursionError) as error:
        # A bundle's fields are no settings: no flag sets them.
        hint = (_hint if error_class is ConfigError else _nearest)(str(error), kind)
        raise error_class(f"{source}: {error}.", hint=hint) from error


def _not_finite(node: Any, name: str = "$") -> list[str]:
    """Name the values that are nan or infinite."""
    if isinstance(node, dict):
        return [found for key in node for found in _not_finite(node[key], f"{name}.{key}")]
    if isinstance(node, list | tuple):
        return [found for item in node for found in _not_finite(item, name)]
    return [name] if isinstance(node, float) and not math.isfinite(node) else []


def _hint(text: str, kind: type[Settings]) -> str:
    """Say what to look at: the known key nearest to an unknown one, or the setting itself."""
    place = re.search(r"`\$\.((?:\w+\.)?(\w+))`$", text)
    if place and "unknown field" not in text:
        flag = place[2].replace("_", "-")
        words = _words(kind, place[1]) if "enum" in text else []
        choice = f"One of {', '.join(words)}. " if words else ""
        return f"{choice}That is {place[1]} in a recipe, and the flag --{flag} where there is one."
    return _nearest(text, kind)


def _words(kind: type[Settings], dotted: str) -> list[str]:
    """List the words that a setting may be; none where it may be anything else."""
    found: Any = kind
    for name in dotted.split("."):
        group = next((part for part in _parts(found) if isinstance(part, type)), None)
        if group is None or not issubclass(group, Settings):
            return []
        types = {field.name: field.type for field in msgspec.structs.fields(group)}
        found = types.get(name)
    return [part for part in _parts(found) if isinstance(part, str)]


def _parts(kind: Any) -> list[Any]:
    """Take a type apart, through unions and literals."""
    inner = get_args(kind)
    return [part for arg in inner for part in _parts(arg)] if inner else [kind]


def _nearest(text: str, kind: type[Settings]) -> str:
    """Name the known key that comes nearest to an unknown one."""
    match = re.search(r"unknown field `(.+?)`", text)
    if match is None:
        return ""
    groups = _groups(kind)
    close = difflib.get_close_matches(match.group(1), sorted(groups), n=1, cutoff=0.5)
    if not close:
        return ""
    place = re.search(r"at `\$\.([\w.]+)`", text)
    group = groups[close[0]]
    under = f" under [{group}]" if group and group != (place[1] if place else "") else ""
    return f"Did you mean `{close[0]}`{under}?"


def _groups(kind: type[Settings], group: str = "") -> dict[str, str]:
    """List all keys, each with the dotted name of the group that it stands in."""
    groups: dict[str, str] = {}
    for field in msgspec.structs.fields(kind):
        for part in _parts(field.type):
            if isinstance(part, type) and issubclass(part, Settings):
                groups = _groups(part, f"{group}.{field.name}".lstrip(".")) | groups
    return groups | dict.fromkeys((field.name for field in msgspec.structs.fields(kind)), group)
