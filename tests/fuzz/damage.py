"""Ways to damage a file that know its structure: TIFF directories, JSON, TOML, safetensors.

In: a random generator, bytes. Out: other bytes. Not here: which files, what is expected of them.
"""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

__all__ = [
    "damage_bytes",
    "damage_json",
    "damage_safetensors",
    "damage_tiff",
    "damage_tile",
    "damage_toml",
]

NUMBERS = (0, 1, 2, 3, 7, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1)
CODES = (254, 256, 257, 258, 259, 262, 270, 277, 282, 284, 296, 322, 323, 324, 325, 330, 347, 530)
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**63, 1e-300, 1e308, -0.5, "", "x", "x" * 5000, "../../x"),
    *([], {}, [[]], [1, 2, 3], {"a": 1}, "\udcff", "\x00"),
)
TOML_VALUES = (
    *("nan", "inf", "-inf", "-1", "0", "1e400", "9" * 400, '""', '"x"', "[]", "{}", "true"),
    *("2026-01-01", '"' + "x" * 3000 + '"', "[" * 3000, "'''", "0x", '"\\ud800"', "1979-05-27"),
)


class _Entry(NamedTuple):
    """An entry of a TIFF directory: where it lies, and how wide its count and value are."""

    offset: int
    wide: bool


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    """Cut, overwrite, zero, repeat or empty."""
    kind = rng.choice(("cut", "noise", "zeros", "bits", "empty", "grow"))
    if kind == "empty" or not data:
        return b""
    at = rng.randrange(len(data))
    length = min(len(data) - at, rng.choice((1, 2, 4, 16, 300, 5000)))
    if kind == "cut":
        return data[:at]
    if kind == "grow":
        return data[:at] + rng.randbytes(length) + data[at:]
    if kind == "bits":
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    filling = bytes(length) if kind == "zeros" else rng.randbytes(length)
    return data[:at] + filling + data[at + length :]


def damage_tiff(rng: random.Random, data: bytes) -> bytes:
    """Change entries of directories, the OME-XML or Aperio text, or any bytes."""
    kind = rng.choice(("entries", "entries", "entries", "text", "bytes"))
    if kind == "bytes":
        return damage_bytes(rng, data)
    if kind == "text":
        return _damage_text(rng, data)
    changed = bytearray(data)
    entries = list(_entries(data))
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        _damage_entry(rng, changed, rng.choice(entries))
    return bytes(changed)


def damage_tile(rng: random.Random, data: bytes) -> bytes:
    """Damage the streams of one or a few tiles, and nothing of the directories."""
    changed = bytearray(data)
    streams = list(_streams(data))
    for at, length in rng.sample(streams, min(len(streams), rng.choice((1, 1, 1, 2, 4)))):
        broken = damage_bytes(rng, bytes(changed[at : at + length]))
        changed[at : at + length] = broken[:length].ljust(length, b"\0")
    return bytes(changed)


def damage_json(rng: random.Random, data: bytes) -> bytes:
    """Change, drop or add one value somewhere in the tree; sometimes nest it deep, or cut it."""
    kind = rng.choice(("value", "value", "value", "drop", "add", "bytes", "deep"))
    if kind == "bytes":
        return damage_bytes(rng, data)
    if kind == "deep":
        return b"[" * 50_000
    tree = json.loads(data)
    holder, key = rng.choice(list(_places(tree)))
    if kind == "drop":
        del holder[key]
    elif kind == "add" and isinstance(holder, dict):
        holder["strange"] = rng.choice(VALUES)
    else:
        holder[key] = rng.choice(VALUES)
    return json.dumps(tree).encode("utf-8", "replace")


def damage_toml(rng: random.Random, data: bytes) -> bytes:
    """Give a setting a strange value or name."""
    if rng.random() < 0.15:
        return damage_bytes(rng, data)
    lines = data.decode().splitlines()
    at = rng.choice([index for index, line in enumerate(lines) if "=" in line])
    name, _, value = lines[at].partition("=")
    if rng.random() < 0.15:
        lines[at] = f"{name.strip()}x ={value}"
    else:
        lines[at] = f"{name}= {rng.choice(TOML_VALUES)}"
    return "\n".join(lines).encode()


def damage_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Lie about the header's length, or change its JSON, or any bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    kind = rng.choice(("length", "header", "header", "bytes"))
    if kind == "length":
        lie = rng.choice((0, 1, length - 1, length + 1, len(data), 2**31, 2**40, 2**63, 2**64 - 1))
        return struct.pack("<Q", lie) + data[8:]
    if kind == "header":
        header = damage_json(rng, data[8 : 8 + length])
        return struct.pack("<Q", len(header)) + header + data[8 + length :]
    return damage_bytes(rng, data)


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """List all places of a tree: the container, and the key or index in it."""
    keys = list(node) if isinstance(node, dict) else range(len(node))
    for key in keys:
        yield node, key
        if isinstance(node[key], dict | list):
            yield from _places(node[key])


def _entries(data: bytes) -> Iterator[_Entry]:
    """Walk the directories of a little-endian TIFF, with those of tag 330."""
    wide = data[2] == 43
    todo = [struct.unpack_from("<Q" if wide else "<I", data, 8 if wide else 4)[0]]
    seen: set[int] = set()
    head, size, tail = ("<Q", 20, "<Q") if wide else ("<H", 12, "<I")
    while todo:
        offset = todo.pop()
        if not offset or offset in seen:
            continue
        seen.add(offset)
        (count,) = struct.unpack_from(head, data, offset)
        first = offset + struct.calcsize(head)
        for index in range(count):
            entry = _Entry(first + index * size, wide)
            yield entry
            todo += _children(data, entry)
        todo.append(struct.unpack_from(tail, data, first + count * size)[0])


def _streams(data: bytes) -> Iterator[tuple[int, int]]:
    """List place and length of the tiles of all directories."""
    tables: list[dict[int, list[int]]] = []
    for entry in _entries(data):
        code = struct.unpack_from("<H", data, entry.offset)[0]
        if code == 324:
            tables.append({code: _numbers(data, entry)})
        elif code == 325:
            tables[-1][code] = _numbers(data, entry)
    for table in tables:
        yield from zip(table[324], table[325], strict=True)


def _children(data: bytes, entry: _Entry) -> list[int]:
    return _numbers(data, entry) if struct.unpack_from("<H", data, entry.offset)[0] == 330 else []


def _numbers(data: bytes, entry: _Entry) -> list[int]:
    kind = struct.unpack_from("<H", data, entry.offset + 2)[0]
    width = {3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}[kind]
    (count,) = struct.unpack_from("<Q" if entry.wide else "<I", data, entry.offset + 4)
    at = entry.offset + (12 if entry.wide else 8)
    if count * struct.calcsize(width) > (8 if entry.wide else 4):
        (at,) = struct.unpack_from("<Q" if entry.wide else "<I", data, at)
    return list(struct.unpack_from(f"<{count}{width}", data, at))


def _damage_entry(rng: random.Random, data: bytearray, entry: _Entry) -> None:
    number = "<Q" if entry.wide else "<I"
    value_at = entry.offset + (12 if entry.wide else 8)
    (value,) = struct.unpack_from(number, data, value_at)
    numbers = (*NUMBERS, value + 1, max(0, value - 1), 2 * value % 2**32, len(data))
    kind = rng.choice(("code", "type", "count", "value", "value", "value"))
    if kind == "code":
        struct.pack_into("<H", data, entry.offset, rng.choice(CODES))
    elif kind == "type":
        struct.pack_into("<H", data, entry.offset + 2, rng.randrange(20))
    elif kind == "count":
        struct.pack_into(number, data, entry.offset + 4, rng.choice(numbers))
    else:
        struct.pack_into(number, data, value_at, rng.choice(numbers))


def _damage_text(rng: random.Random, data: bytes) -> bytes:
    """Change a number, a quote or a bracket of the description, and keep its length."""
    swaps: tuple[Callable[[bytes], bytes], ...] = (
        lambda found: b"9" * len(found),
        lambda found: b"0" * len(found),
        lambda found: b"-" + b"1" * (len(found) - 1),
        lambda found: b"e" * len(found),
        lambda found: b"\xff" * len(found),
    )
    places = list(re.finditer(rb"(?<=[\"= x])\d[\d.]*|[<>\"|]", data[:4096] + data[-4096:]))
    if not places:
        return damage_bytes(rng, data)
    found = rng.choice(places)
    at = found.start() if found.start() < 4096 else len(data) - 8192 + found.start()
    at = max(0, at)
    return data[:at] + rng.choice(swaps)(found.group()) + data[at + len(found.group()) :]
