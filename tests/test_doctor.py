"""The doctor: each fault that it claims to find is planted here."""

from __future__ import annotations

from pathlib import Path

import imagecodecs
import numpy as np
import pytest

from wsi_stain import doctor
from wsi_stain.bundles import list_bundles
from wsi_stain.doctor import (
    check_bundles,
    check_codec,
    check_devices,
    check_libraries,
    check_memory,
    check_packages,
    check_space,
    examine,
)
from wsi_stain.errors import BundleError


def test_missing_package_and_broken_library_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (remark,) = check_packages({"python": "3.11", "zarr": "missing"})
    assert "zarr" in remark.what
    assert remark.do.startswith("pip install")
    (tmp_path / "broken_library.py").write_text("raise OSError('libjpeg.so.9: not found')")
    monkeypatch.syspath_prepend(tmp_path)
    (remark,) = check_libraries(["json", "broken_library"])
    assert remark.what == "broken_library does not load: libjpeg.so.9: not found."


def test_codec_that_changes_colors_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_codec() == []
    wrong = np.full((64, 64, 3), 7, np.uint8)
    monkeypatch.setattr(imagecodecs, "jpeg8_decode", lambda data: wrong)
    (remark,) = check_codec()
    assert "off by 193 grey levels" in remark.what


def test_only_a_driver_can_mean_that_there_is_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        if name not in there:
            raise OSError(name)

    there = list[str]()
    monkeypatch.setattr("ctypes.CDLL", load)
    monkeypatch.setattr(Path, "exists", lambda path: str(path) in there)
    monkeypatch.setattr("sys.platform", "linux")
    assert not doctor.may_have_cuda()
    for driver in ("libcuda.so.1", "/dev/kfd"):
        there[:] = [driver]
        assert doctor.may_have_cuda(), driver
    there.clear()
    monkeypatch.setattr("sys.platform", "win32")
    assert doctor.may_have_cuda(), "only torch knows there"


def test_gpu_that_torch_cannot_use_is_a_problem_and_none_is_advice() -> None:
    assert check_devices(2, 2, "bfloat16") == ([], [])
    problems, advice = check_devices(0, 2, "bfloat16")
    assert "2 NVIDIA" in problems[0].what
    assert advice == []
    problems, advice = check_devices(0, 0, "float32")
    assert problems == []
    assert len(advice) == 2


def test_little_space_and_memory_are_told_with_what_to_type() -> None:
    assert check_space(50e9) == []
    assert "3.0 GB are free" in check_space(3e9)[0].what
    assert check_memory(64e9, 8) == []
    (remark,) = check_memory(8e9, 8)
    assert remark.what == "8.0 GB of memory hold 4 of 8 workers."
    assert remark.do.endswith("--workers 4")


def test_damaged_model_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_bundles() == []

    def damaged(folder: Path, spec: object) -> None:
        raise BundleError(f"{folder.name}/score is damaged.", hint="Install the bundle again.")

    monkeypatch.setattr(doctor, "check_files", damaged)
    assert [tuple(remark) for remark in check_bundles()] == [
        (f"{name}/score is damaged.", "Install the bundle again.") for name in list_bundles()
    ]
    assert any("score is damaged" in remark.what for remark in examine().problems)


def test_examination_is_whole_and_becomes_json() -> None:
    found = examine()
    facts = found.as_json()
    assert facts["ok"] == (not found.problems)
    assert {"CPU cores", "memory GB", "free disk GB", "CUDA devices"} <= set(facts)
    assert facts["versions"]["zarr"] != "missing"
