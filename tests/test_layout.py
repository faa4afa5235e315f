"""Names and places of a run's files."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_stain.errors import OutputError
from wsi_stain.layout import RunFiles, find_run, safe_name, slug


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("CMU-1.svs", "CMU-1"),
        ("a.ome.tif", "a"),
        ("b.tiff", "b"),
        (".svs", "svs"),
        ("x/../y", "x_.._y"),
        ("Gewebe ü.ndpi", "Gewebe ü"),
        ("..", "slide"),
    ],
)
def test_stem_is_safe_and_readable(name: str, stem: str) -> None:
    assert safe_name(name) == stem


@given(st.text(max_size=400))
def test_any_name_becomes_one_short_path_part(name: str) -> None:
    stem = safe_name(name)
    assert 0 < len(stem.encode()) <= 120
    assert "/" not in stem
    assert stem not in {".", ".."}
    assert not set(stem) & set('\\:*?"<>|\0\n')


def test_slug_keeps_letters_and_digits() -> None:
    assert (slug("Ki-67"), slug("HER2"), slug("!")) == ("ki67", "her2", "ihc")


def test_output_that_is_the_slide_is_refused(tmp_path: Path) -> None:
    slide = tmp_path / "a_ki67.ome.tiff"
    slide.write_bytes(b"x")
    (tmp_path / "a").symlink_to(slide)
    with pytest.raises(OutputError, match="slide itself"):
        RunFiles.of(tmp_path, tmp_path / "a", "Ki-67")


def test_run_is_found_from_folder_pyramid_and_output_folder(tmp_path: Path) -> None:
    files = RunFiles.of(tmp_path, Path("s.svs"), "Ki-67")
    files.folder.mkdir()
    files.manifest.write_text("{}")
    assert find_run(files.folder) == find_run(files.output) == find_run(tmp_path) == files
    (tmp_path / "b.run").mkdir()
    with pytest.raises(OutputError, match="holds 2 runs"):
        find_run(tmp_path)
    with pytest.raises(OutputError, match=r"no manifest\.json"):
        find_run(tmp_path / "b.run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OutputError, match="holds no run"):
        find_run(tmp_path / "empty")


def test_files_of_an_ome_zarr_run_are_named_found_and_swept(tmp_path: Path) -> None:
    files = RunFiles.of(tmp_path, Path("s.svs"), "Ki-67", "ome-zarr")
    assert files.name == "s_ki67"
    assert files.output.name == "s_ki67.ome.zarr"
    assert files.unsound.name == "unsound.ome.zarr"
    files.folder.mkdir()
    files.manifest.write_text("{}")
    for folder in (files.output, files.unsound):
        folder.mkdir()
        (folder / "zarr.json").write_text("{}")
    for left_over in ("s_ki67.ome.zarr.part", "s_ki67.ome.zarr.old.part"):
        (tmp_path / left_over / "0").mkdir(parents=True)
    assert find_run(files.folder) == find_run(files.output) == find_run(tmp_path) == files
    files.sweep()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s_ki67.ome.zarr", "s_ki67.run"]
    assert not files.unsound.exists()
