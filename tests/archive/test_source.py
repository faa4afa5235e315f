"""Which slides a folder, a pattern or a list names, and what their outputs are called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_stain.archive.jobs import Job, Part, make_jobs
from wsi_stain.archive.source import Entry, find_entries
from wsi_stain.bundles import find_bundle, read_spec
from wsi_stain.config import RunConfig, SampleConfig
from wsi_stain.errors import BundleError, ConfigError

Settle = Callable[..., RunConfig]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source with slides in three folders, other files, and a run made beside its slide."""
    root = tmp_path / "in"
    names = ["a.svs", "b.NDPI", "notes.txt", ".hidden.svs", "m.mrxs", "m/Slidedat.ini"]
    names += ["x/a.svs", "y/a.svs", "y/a.tif", "d/1.dcm", "d/2.dcm", "z.ome.zarr/zarr.json"]
    names += ["a_ki67.ome.tiff", "a_ki67.run/he/overview.tif", "out/old_ki67.ome.tiff"]
    names += ["a_ki67_uncertainty.ome.tiff", "a_ki67_quantify/heat.ome.tiff"]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    return root


def names(entries: Sequence[Entry], root: Path) -> list[str]:
    return [entry.slide.relative_to(root).as_posix() for entry in entries]


def test_folder_gives_its_slides_and_no_other_file(tree: Path) -> None:
    found = find_entries(str(tree), tree / "out")
    assert names(found, tree) == ["a.svs", "b.NDPI", "m.mrxs", "z.ome.zarr"]


def test_recursive_looks_into_folders_but_not_into_outputs(tree: Path) -> None:
    found = names(find_entries(str(tree), tree / "out", recursive=True), tree)
    assert found == [
        "a.svs",
        "b.NDPI",
        "d/1.dcm",
        "m.mrxs",
        "x/a.svs",
        "y/a.svs",
        "y/a.tif",
        "z.ome.zarr",
    ]


def test_links_that_lead_back_are_not_followed(tree: Path) -> None:
    before = find_entries(str(tree), tree / "out", recursive=True)
    (tree / "x/back").symlink_to(tree)
    (tree / "self").symlink_to(".")
    assert find_entries(str(tree), tree / "out", recursive=True) == before


def test_bundle_of_a_list_is_relative_to_it_as_slides_are(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("slide,bundle\na.svs,mine\nb.svs,ki67\nc.svs,/x/y\nd.svs,\n")
    found = [entry.bundle for entry in find_entries(str(tmp_path / "l.csv"), tmp_path)]
    assert found == [str(tmp_path / "mine"), "ki67", "/x/y", ""]


def test_pattern_and_single_file(tree: Path) -> None:
    out = tree / "out"
    assert names(find_entries(f"{tree}/**/*.svs", out), tree) == ["a.svs", "x/a.svs", "y/a.svs"]
    assert names(find_entries(f"{tree}/notes.txt", out), tree) == ["notes.txt"]
    assert names(find_entries(f"{tree}/**/*.tiff", out), tree) == ["out/old_ki67.ome.tiff"]


@pytest.mark.parametrize("source", ["none", "none/*.svs", "in/d/out"])
def test_nothing_there_is_an_error_that_says_what_to_give(tree: Path, source: str) -> None:
    with pytest.raises(ConfigError, match=r"No slides at .*column slide"):
        find_entries(str(tree.parent / source), tree / "out")


def write_list(folder: Path, text: str, name: str = "list.csv") -> str:
    path = folder / name
    path.write_bytes(text.encode("utf-8"))
    return str(path)


def test_list_gives_slide_mpp_bundle_and_out(
    tmp_path: Path, settle: Settle, identity_bundle: Path
) -> None:
    rows = ["slide, mpp ,bundle,out", "a.svs,0.25,,first", "", f"sub/b.svs,,{identity_bundle},"]
    text = "\ufeff" + "\r\n".join(rows)
    for name, sign in (("list.csv", ","), ("list.tsv", "\t")):
        source = write_list(tmp_path, text.replace(",", sign), name)
        jobs = make_jobs(find_entries(source, tmp_path), settle())
        assert [job.name for job in jobs] == ["first_test", "b_test"]
        assert [job.slide for job in jobs] == [tmp_path / "a.svs", tmp_path / "sub/b.svs"]
        assert [job.config.slide.mpp for job in jobs] == [0.25, None]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "slide,stain,color\na.svs,1,2\n",
            "unknown columns: stain, color.*slide, mpp, bundle, out",
        ),
        ("mpp\n0.5\n", "no column slide"),
        ("slide,slide\na,b\n", "a column twice"),
        ("slide,mpp\na.svs,fine\n", r"line 2: mpp fine is no number from 0\.05 to 20"),
        ("slide,mpp\na.svs,nan\n", "line 2: mpp nan"),
        ("slide,mpp\na.svs,250\n", "line 2: mpp 250"),
        ("slide,mpp\n,0.5\n", "line 2: column slide is empty"),
        ("slide\na.svs,0.5\n", "line 2: it has more fields"),
        ("slide\na\0b.svs\n", "line 2: column slide has a zero byte"),
        ("slide,bundle\na.svs,k\0\n", "line 2: column bundle has a zero byte"),
        ('slide\n"a.svs\n', "not readable as CSV"),
    ],
)
def test_list_that_cannot_be_used_is_refused_by_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        find_entries(write_list(tmp_path, text), tmp_path)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/x", "a/b", "..", ".", ".hidden", "a\x00b", "x.svs", "a\\b", "x" * 300]
)
def test_output_name_cannot_leave_the_folder(settle: Settle, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be the name of an output"):
        make_jobs([Entry(Path("a.svs"), "line 2", out=name)], settle())


@given(st.text(min_size=1, max_size=30))
def test_output_name_is_a_plain_name_or_refused(name: str) -> None:
    entry = Entry(Path("a.svs"), "line 2", out=name)
    try:
        job = make_jobs([entry], RunConfig())[0]
    except ConfigError:
        return
    assert Path("out", job.name).resolve().parent == Path("out").resolve()


def test_job_names_the_solver_that_its_bundle_runs_by() -> None:
    # Records name it: a batch must know its own work again whether or not the flag is given.
    entry = Entry(Path("a.svs"), "a")
    spec = read_spec(find_bundle(RunConfig().bundle))
    assert make_jobs([entry], RunConfig())[0].config.sample.solver == spec.default_solver
    asked = RunConfig(sample=SampleConfig(solver="teacher"))
    assert make_jobs([entry], asked)[0].config.sample.solver == "teacher"


def stems(settle: Settle, *entries: Entry) -> list[str]:
    return [job.stem for job in make_jobs(entries, settle())]


def test_slides_of_one_name_are_told_apart(settle: Settle) -> None:
    one = Entry(Path("in/x/a.svs"), "1", ("x",))
    two = Entry(Path("in/y/A.svs"), "2", ("y",))
    other = Entry(Path("in/b.svs"), "3")
    assert stems(settle, one, two, other) == ["x_a", "y_A", "b"]
    twin = Entry(Path("in/x/a.tif"), "4", ("x",))
    assert stems(settle, one, twin) == ["x_a_svs", "x_a_tif"]


def test_slides_that_cannot_be_told_apart_are_refused_by_place(settle: Settle) -> None:
    entries = [Entry(Path("a.svs"), "list, line 2"), Entry(Path("a.svs"), "list, line 5")]
    with pytest.raises(ConfigError, match=r"a_svs_test: list, line 2 and list, line 5.*column out"):
        make_jobs(entries, settle())
    named = [Entry(Path("a.svs"), "2", out="n"), Entry(Path("b.svs"), "3", out="N")]
    with pytest.raises(ConfigError, match="Two slides"):
        make_jobs(named, settle())


def test_one_slide_by_two_bundles_has_two_outputs(settle: Settle) -> None:
    entries = [Entry(Path("a.svs"), "2"), Entry(Path("a.svs"), "3", bundle="ki67")]
    assert [job.name for job in make_jobs(entries, settle())] == ["a_test", "a_ki67"]
    with pytest.raises(BundleError, match="No bundle none"):
        make_jobs([Entry(Path("a.svs"), "2", bundle="none")], settle())


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "1/0", "a/b", "1/2/3", "-1/2", ""])
def test_part_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="1/16 to 16/16"):
        Part.parse(text)


@given(st.lists(st.text(), unique=True), st.integers(1, 9))
def test_each_job_is_in_one_part(names: list[str], total: int) -> None:
    parts = [Part(index, total) for index in range(1, total + 1)]
    for name in names:
        assert sum(part.holds(name) for part in parts) == 1


def test_part_of_a_job_depends_on_its_name_alone() -> None:
    parts = [Part(index, 3) for index in (1, 2, 3)]
    found = [
        [part.holds(name) for part in parts].index(True) for name in ("a_ki67", "b_ki67", "c_ki67")
    ]
    assert found == [2, 0, 0]
    assert Part.parse("3/16").tag == "-03-of-16"


def test_size_counts_the_folder_of_an_mrxs(tmp_path: Path, settle: Settle) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m.mrxs").write_bytes(b"x" * 10)
    (tmp_path / "m" / "Data0.dat").write_bytes(b"x" * 90)
    (job,) = make_jobs([Entry(tmp_path / "m.mrxs", "1")], settle())
    assert job.size_bytes() == 100
    gone: Job = make_jobs([Entry(tmp_path / "gone.svs", "1")], settle())[0]
    assert gone.size_bytes() == 0
