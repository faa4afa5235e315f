"""The README's table: every figure arrives, and nothing that is no figure."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

TABLE = runpy.run_path(str(Path(__file__).with_name("table.py")))
make_table, insert_table = TABLE["make_table"], TABLE["insert_table"]

ROW: dict[str, Any] = {
    "bench": "write",
    "figure": "pyramid",
    "unit": "MP/s",
    "value": 123.456,
    "peer": "libvips",
    "peer_value": 82.0,
    "ratio": 1.505,
    "machine": "2 cores of a test",
}


def test_every_figure_has_a_row_under_its_machine() -> None:
    alone = {**ROW, "figure": "size", "value": 14050, "peer": None, "peer_value": None}
    alone |= {"ratio": None, "machine": "other"}
    table = make_table([json.dumps(ROW), "", json.dumps(alone)])
    assert "Measured on 2 cores of a test:" in table
    assert "| write: pyramid | 123 MP/s | libvips: 82 MP/s | 1.5 |" in table
    assert "| write: size | 14,050 MP/s |  |  |" in table


@pytest.mark.parametrize("line", ["Done.", "[1]", '{"bench": "write"}'])
def test_line_that_is_no_figure_is_refused(line: str) -> None:
    with pytest.raises(SystemExit, match="line 2 is no figure"):
        make_table([json.dumps(ROW), line])


def test_table_replaces_what_is_between_the_markers_and_nothing_else() -> None:
    page = "a\n<!-- bench -->\nold\n<!-- /bench -->\nb\n"
    new = insert_table(page, "new")
    assert new == "a\n<!-- bench -->\nnew\n<!-- /bench -->\nb\n"
    assert insert_table(new, "new") == new
    with pytest.raises(SystemExit, match="no markers"):
        insert_table("a", "new")
    with pytest.raises(SystemExit, match="no figures"):
        make_table([])
