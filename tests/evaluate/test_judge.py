"""The judge from end to end: rows, tables, sheet, record; stop and go on; the verb."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner

from wsi_stain.cli import cli
from wsi_stain.config import BundleSpec
from wsi_stain.errors import BundleError, NoTissueError
from wsi_stain.evaluate.judge import evaluate
from wsi_stain.evaluate.rows import Row, picture_path, read_rows
from wsi_stain.evaluate.sheet import read_picture
from wsi_stain.manifest import Event
from wsi_stain.translate.bundle import save_nets

Rgb8 = npt.NDArray[np.uint8]
RECIPE = """
root = "{root}"
crop_px = 96
seed = {seed}
device = "cpu"
nulls = [{nulls}]
variants = [
  {{ name = "default" }},
  {{ name = "grown", sample = {{ start_image = "stain" }} }},
]
[palette]
folder = "ihc"
[[real]]
folder = "ihc"
[[images]]
name = "pairs"
mpp = 0.5
folder = "he"
reference = "ihc"
aligned = true
[[images]]
name = "alone"
mpp = 0.5
folder = "he"
limit = 1
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundle without nets: the output is the H&E, glass aside."""
    folder = tmp_path_factory.mktemp("bundles") / "identity"
    save_nets(folder, BundleSpec(name="identity", marker="Test", start_image="source"), {})
    return folder


@pytest.fixture
def root(tmp_path: Path, he_pixels: Rgb8) -> Path:
    """Two dense H&E fields whose "IHC" is the H&E itself."""
    for name, x_px in (("a", 330), ("b", 380)):
        field = he_pixels[380:520, x_px : x_px + 150]
        for folder in ("he", "ihc"):
            path = tmp_path / folder / f"{name}.png"
            path.parent.mkdir(exist_ok=True)
            assert cv2.imwrite(str(path), np.ascontiguousarray(field[:, :, ::-1]))
    return tmp_path


def write_recipe(root: Path, seed: int = 0, nulls: str = '"source", "null-recolor"') -> Path:
    path = root / "r.toml"
    path.write_text(RECIPE.format(root=root, seed=seed, nulls=nulls))
    return path


def run(root: Path, bundle: Path, **changes: Any) -> list[Row]:
    evaluate(write_recipe(root, **changes), root / "out", bundle=str(bundle))
    return read_rows(root / "out/results.jsonl")


def test_every_method_is_judged_on_every_image(root: Path, bundle: Path) -> None:
    rows = run(root, bundle)
    assert [(r.method, r.image) for r in rows] == [
        (method, image)
        for image in ("pairs/a", "pairs/b", "alone/a")
        for method in ("default", "grown", "source", "null-recolor")
    ]
    assert [r.paired for r in rows] == [True] * 8 + [False] * 4
    first = rows[0]
    assert (first.width_px, first.height_px, first.mpp) == (96, 96, 0.5)
    assert first.settings["solver"]["steps"] == 15
    assert len(first.digests[0]) == len(first.bundle["digest"]) == 64


def test_crop_of_glass_is_left_out_and_named(root: Path, bundle: Path) -> None:
    for folder in ("he", "ihc"):
        cv2.imwrite(str(root / folder / "c.png"), np.full((140, 150, 3), 243, np.uint8))
    heard = list[Event]()
    evaluate(write_recipe(root), root / "out", bundle=str(bundle), listener=heard.append)
    rows = read_rows(root / "out/results.jsonl")
    assert {row.image for row in rows} == {"pairs/a", "pairs/b", "alone/a"}
    assert [event.text for event in heard if event.kind == "note"] == [
        "pairs/c is left out: its crop shows 0.0% tissue"
    ]
    text = (root / "out/table.md").read_text()
    assert "3 images" in text
    assert "Left out, as their crops show no tissue: pairs/c." in text
    for name in ("a", "b"):
        (root / f"he/{name}.png").unlink()
    with pytest.raises(NoTissueError, match="None of the 2 crops shows tissue"):
        run(root, bundle)


def test_identity_against_itself_is_perfect(root: Path, bundle: Path) -> None:
    """A planted truth for the whole chain: output = H&E = reference."""
    by = {(r.method, r.image): r for r in run(root, bundle)}
    for image in ("pairs/a", "pairs/b"):
        scores = by["source", image].scores
        for name in ("ssim", "vif", "hist", "sobel_ssim"):
            assert scores[name] == pytest.approx(1.0)
        assert scores["iod"] == scores["ref_iod"]
        ssim = by["default", image].scores["ssim"]
        assert ssim is not None
        assert ssim > 0.97, "only glass is laid over it"
        recolored = by["null-recolor", image].scores["hist"]
        assert recolored is not None


def test_files_tell_what_was_done(root: Path, bundle: Path) -> None:
    rows = run(root, bundle)
    out = root / "out"
    assert {p.name for p in out.iterdir()} == {
        "pictures",
        "results.jsonl",
        "run.json",
        "sheet.png",
        "table.csv",
        "table.md",
    }
    record = json.loads((out / "run.json").read_text())
    assert record["settings"]["bundle"] == "identity"
    assert [i["image"] for i in record["images"]] == ["pairs/a", "pairs/b", "alone/a"]
    assert record["versions"]["numpy"] == np.__version__
    text = (out / "table.md").read_text()
    assert "research use only" in text
    assert "2 images of 1 slides or folders; aligned" in text
    columns = read_picture(out / "sheet.png").shape[1] // 196
    assert columns == 6, "H&E, four methods, reference"
    made = read_picture(picture_path(out, rows[0].image, rows[0].method))
    assert made.shape == (96, 96, 3)


def test_second_run_makes_nothing_again(root: Path, bundle: Path) -> None:
    first = run(root, bundle)
    table = (root / "out/table.md").read_text()
    assert run(root, bundle) == first, "seconds and all"
    assert (root / "out/table.md").read_text() == table


def test_stopped_run_goes_on(root: Path, bundle: Path) -> None:
    class Stop(Exception):
        """Stands for a kill."""

    def listen(event: Event) -> None:
        if event.kind == "advance" and event.done == 5:
            raise Stop

    recipe = write_recipe(root)
    with pytest.raises(Stop):
        evaluate(recipe, root / "out", bundle=str(bundle), listener=listen)
    kept = read_rows(root / "out/results.jsonl")
    assert len(kept) == 5
    assert run(root, bundle)[:5] == kept


def test_changed_setting_voids_only_what_depends_on_it(root: Path, bundle: Path) -> None:
    before = {(r.method, r.image): r for r in run(root, bundle)}
    after = {(r.method, r.image): r for r in run(root, bundle, seed=1)}
    for place, row in after.items():
        assert (row.key == before[place].key) == (row.kind == "null"), place
    (root / "he/b.png").write_bytes((root / "he/a.png").read_bytes())
    third = {(r.method, r.image): r for r in run(root, bundle, seed=1)}
    changed = {image for (_, image), r in third.items() if r.key != after[r.method, image].key}
    assert changed == {"pairs/b"}


def test_lost_picture_is_painted_again(root: Path, bundle: Path) -> None:
    run(root, bundle)
    path = picture_path(root / "out", "pairs/a", "grown")
    picture = read_picture(path)
    path.unlink()
    run(root, bundle)
    np.testing.assert_array_equal(read_picture(path), picture)


def test_verb_prints_the_table_and_errors_keep_their_codes(root: Path, bundle: Path) -> None:
    command = ["evaluate", "--recipe", str(write_recipe(root)), "--out", str(root / "out")]
    result = CliRunner().invoke(cli, [*command, "--bundle", str(bundle), "--quiet"])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(root / "out/table.md")
    missing = CliRunner().invoke(cli, [*command, "--bundle", "none"])
    assert isinstance(missing.exception, BundleError)
