"""The QuPath script: its places are filled, nothing breaks out of a string, Groovy parses it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from wsi_stain.config import ColorReference
from wsi_stain.write.qupath import qupath_script, write_qupath_script

COLOR = ColorReference(
    output_white=(250.0, 251.0, 252.0), stain_od=((0.624, 0.69, 0.367), (0.278, 0.539, 0.795))
)
HE = ((0.65, 0.7, 0.29), (0.21, 0.8, 0.56))
PARSER = """
import org.codehaus.groovy.control.*
def unit = new CompilationUnit()
unit.addSource(new File(args[0]))
unit.compile(Phases.CONVERSION)
println "parsed"
"""
GROOVY, JAVA = shutil.which("groovy"), shutil.which("java")
with_groovy = pytest.mark.skipif(
    GROOVY is None or JAVA is None, reason="no groovy: apt-get install groovy default-jre-headless"
)


def code(script: str) -> str:
    """Leave out comments and the content of strings."""
    script = re.sub(r"/\*.*?\*/", "", script, flags=re.DOTALL)
    script = re.sub(r"""'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*\"""", '""', script)
    return re.sub(r"//.*", "", script)


def parse(path: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    assert GROOVY is not None
    assert JAVA is not None
    parser = folder / "parser.groovy"
    parser.write_text(PARSER)
    home = str(Path(JAVA).resolve().parents[1])
    return subprocess.run(
        [GROOVY, str(parser), str(path)],
        env={**os.environ, "JAVA_HOME": home},
        capture_output=True,
        text=True,
        check=False,
    )


def test_places_are_filled_with_the_bundles_vectors() -> None:
    script = qupath_script("S-1_ki67", "Ki-67", COLOR, HE, (246.0, 243.0, 242.0))
    assert re.findall(r"@[A-Z_]+@", script) == []
    assert '"Values 1" : "0.6240 0.6900 0.3670"' in script
    assert '"Values 2" : "0.2780 0.5390 0.7950"' in script
    assert '"Background" : "250.0 251.0 252.0"' in script
    assert '"Stain 2" : "Eosin", "Values 2" : "0.2100 0.8000 0.5600"' in script
    assert "research use only" in script
    assert "BRIGHTFIELD_H_E" in script
    assert "BRIGHTFIELD_H_DAB" in script


def test_he_vectors_are_left_out_when_the_fit_has_none() -> None:
    assert "def heStains = ''" in qupath_script("S", "Ki-67", COLOR)


@pytest.mark.parametrize("name", ["S-1_ki67", """x"'$ {boom()} */ \\\\ \n@DAB@"""])
def test_brackets_balance_and_no_name_breaks_out(name: str) -> None:
    script = qupath_script(name, name, COLOR)
    assert "boom()" not in script
    plain = code(script)
    for opening, closing in ("()", "{}", "[]"):
        assert plain.count(opening) == plain.count(closing) > 0
    assert plain.count('"') % 2 == 0
    assert "'" not in plain


def test_file_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "qupath.groovy"
    write_qupath_script(path, "S", "Ki-67", COLOR)
    assert path.read_text("utf-8") == qupath_script("S", "Ki-67", COLOR)
    assert list(tmp_path.iterdir()) == [path]


@with_groovy
def test_groovy_parses_it(tmp_path: Path) -> None:
    path = tmp_path / "qupath.groovy"
    write_qupath_script(path, "S-1_ki67", "Ki-67", COLOR, HE, (246.0, 243.0, 242.0))
    found = parse(path, tmp_path)
    assert found.stdout.strip() == "parsed", found.stderr
    path.write_text(path.read_text("utf-8").replace("} finally {", "} finaly {", 1))
    assert parse(path, tmp_path).returncode != 0
