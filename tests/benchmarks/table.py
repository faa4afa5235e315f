"""README's table of benchmarks from the JSON lines of `make bench`.

    make bench | tee bench.jsonl
    python tests/benchmarks/table.py bench.jsonl

Writes between the markers `<!-- bench -->` and `<!-- /bench -->` of README.md. A line is
``{"bench", "figure", "unit", "value", "peer", "peer_value", "ratio", "machine"}``; the last three
but one may be null where a figure has no peer. Other lines are an error: a figure must not get
lost.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parents[2] / "README.md"
BEGIN, END = "<!-- bench -->", "<!-- /bench -->"
KEYS = ("bench", "figure", "unit", "value", "peer", "peer_value", "ratio", "machine")
HEAD = "| what | figure | peer or ceiling | ratio |\n|---|---|---|---|"


def make_table(lines: Iterable[str]) -> str:
    """Turn JSON lines into a Markdown table per machine, rows in the order of the lines."""
    rows: dict[str, list[str]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row: dict[str, Any] = json.loads(line)
            cells = [row[key] for key in KEYS]
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise SystemExit(
                f"line {number} is no figure of a benchmark ({error!r}): {line}"
            ) from error
        rows.setdefault(str(cells[-1]), []).append(_row(row))
    if not rows:
        raise SystemExit("there are no figures; give the JSON lines of `make bench`.")
    tables = [f"Measured on {name}:\n\n{HEAD}\n" + "\n".join(rows[name]) for name in rows]
    return "\n\n".join(tables)


def insert_table(text: str, table: str) -> str:
    """Put the table between the markers of a page."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"the page has no markers {BEGIN} and {END}.")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def _row(row: dict[str, Any]) -> str:
    peer = ""
    if row["peer"]:
        peer = str(row["peer"])
        if row["peer_value"] is not None:
            peer += f": {_number(row['peer_value'])} {row['unit']}"
    ratio = "" if row["ratio"] is None else _number(row["ratio"])
    figure = f"{_number(row['value'])} {row['unit']}"
    return f"| {row['bench']}: {row['figure']} | {figure} | {peer} | {ratio} |"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def main(*files: str) -> None:
    """Read the files, or stdin, and rewrite README.md."""
    lines = [line for file in files for line in Path(file).read_text("utf-8").splitlines()]
    table = make_table(lines if files else sys.stdin)
    README.write_text(insert_table(README.read_text("utf-8"), table), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
