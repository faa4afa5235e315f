"""Bundles on disk: round trip, and every way in which one can be wrong."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors import safe_open

from wsi_stain.bundles import bundle_digest, find_bundle, read_spec
from wsi_stain.config import BundleSpec, CriticSpec, GuidanceSpec, HeadsSpec, NetSpec, SolverSpec
from wsi_stain.errors import BundleError, DeviceError
from wsi_stain.translate import bundle as bundle_module
from wsi_stain.translate.bundle import fast_dtype, load_bundle, pick_device, save_nets
from wsi_stain.translate.guidance import Entropy, MutualInformation, PatchContrast, Sum
from wsi_stain.translate.networks import ContrastHeads, Critic, ScoreNet

CPU = torch.device("cpu")


@pytest.fixture
def copy(tmp_path: Path, save_tiny_bundle: Callable[[Path], Path]) -> Path:
    """A tiny bundle of one's own, to break."""
    return save_tiny_bundle(tmp_path / "copy")


def _edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "bundle.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    change(spec)
    path.write_text(json.dumps(spec), encoding="utf-8")


def test_path_is_a_path_also_where_a_shipped_bundle_has_that_name(
    tmp_path: Path, save_tiny_bundle: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = save_tiny_bundle(tmp_path / "ki67")
    monkeypatch.chdir(tmp_path)
    for path in ("./ki67", "../" + tmp_path.name + "/ki67", str(mine)):
        assert find_bundle(path) == mine
    assert find_bundle("ki67") != mine


def test_weights_return_within_bfloat16_when_saved_and_loaded(
    tiny_bundle: Path, tiny_score: ScoreNet, tiny_critic: Critic, tiny_heads: ContrastHeads
) -> None:
    bundle = load_bundle(str(tiny_bundle), CPU, torch.float32)
    pairs = ((tiny_score, bundle.score), (tiny_critic, bundle.critic), (tiny_heads, bundle.heads))
    for saved, loaded in pairs:
        assert loaded is not None
        assert not loaded.training
        found = dict(loaded.named_parameters())
        for name, p in saved.named_parameters():
            assert found[name].dtype == torch.float32
            assert not found[name].requires_grad
            torch.testing.assert_close(found[name], p.bfloat16().float(), rtol=0, atol=0)
            torch.testing.assert_close(found[name], p, rtol=2**-8, atol=0)


def test_predictions_agree_when_saved_and_loaded(tiny_bundle: Path, tiny_score: ScoreNet) -> None:
    bundle = load_bundle(str(tiny_bundle), CPU, torch.float32)
    low = load_bundle(str(tiny_bundle), CPU, torch.bfloat16)
    assert bundle.score is not None
    assert low.score is not None
    y_t = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    alpha, sigma = torch.tensor([0.9]), torch.tensor([0.43589])
    expected = tiny_score.denoise(y_t, alpha, sigma)
    scale = float(expected.std())
    for net, limit in ((bundle.score, 0.02), (low.score, 0.05)):
        found = net.denoise(y_t, alpha, sigma)
        assert found.dtype == torch.float32
        assert float((found - expected).square().mean().sqrt()) < limit * scale


def test_spec_returns_when_read_back(tiny_bundle: Path) -> None:
    spec = read_spec(tiny_bundle)
    assert spec.name == "tiny"
    assert set(spec.files) == {"score.safetensors", "critic.safetensors", "heads.safetensors"}
    with safe_open(tiny_bundle / "score.safetensors", framework="pt") as file:
        header = file.metadata()["spec"]
    assert msgspec.json.decode(header, type=BundleSpec) == msgspec.structs.replace(spec, files={})


def test_digest_changes_when_weights_change(copy: Path, tiny_score: ScoreNet) -> None:
    before = bundle_digest(copy)
    weights = {name: p.clone() for name, p in tiny_score.named_parameters()}
    save_nets(copy, read_spec(copy), {"score": weights})
    assert bundle_digest(copy) == before
    weights["tail.bias"][0] += 1.0
    save_nets(copy, read_spec(copy), {"score": weights})
    assert bundle_digest(copy) != before
    assert load_bundle(str(copy), CPU).critic is not None  # the other files stay listed


def test_damaged_file_is_refused_when_one_bit_flips(copy: Path) -> None:
    path = copy / "critic.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(BundleError, match=r"critic\.safetensors is damaged: SHA-256"):
        load_bundle(str(copy), CPU)


def test_missing_file_is_refused_when_loaded(copy: Path) -> None:
    (copy / "heads.safetensors").unlink()
    with pytest.raises(BundleError, match=r"tiny lacks heads\.safetensors"):
        load_bundle(str(copy), CPU)


def test_unlisted_file_is_refused_when_loaded(copy: Path) -> None:
    _edit(copy, lambda spec: spec["files"].pop("score.safetensors"))
    with pytest.raises(BundleError, match=r"lacks score\.safetensors"):
        load_bundle(str(copy), CPU)


def test_later_schema_is_refused_when_read(copy: Path) -> None:
    _edit(copy, lambda spec: spec.update(schema=99, novelty=1))
    with pytest.raises(BundleError, match="schema 99; this version reads up to") as caught:
        load_bundle(str(copy), CPU)
    assert "newer wsi-stain" in caught.value.hint
    assert caught.value.exit_code == 6


def test_unknown_field_is_refused_when_read(copy: Path) -> None:
    _edit(copy, lambda spec: spec.update(timestep=1000))
    with pytest.raises(BundleError, match="timestep") as caught:
        load_bundle(str(copy), CPU)
    assert "`timesteps`" in caught.value.hint


@pytest.mark.parametrize(
    "net", [NetSpec(channels=(16, 16, 16), blocks=1), NetSpec(channels=(16, 16, 32), blocks=2)]
)
def test_other_shapes_are_refused_when_loaded(copy: Path, net: NetSpec) -> None:
    _edit(copy, lambda spec: spec.update(net=msgspec.to_builtins(net)))
    with pytest.raises(BundleError, match=r"does not fit the net in bundle\.json"):
        load_bundle(str(copy), CPU)


def test_file_that_is_no_safetensors_is_refused_when_digest_fits(copy: Path) -> None:
    path = copy / "score.safetensors"
    path.write_bytes(b"not weights")
    digest = hashlib.sha256(b"not weights").hexdigest()
    _edit(copy, lambda spec: spec["files"].update({path.name: digest}))
    with pytest.raises(BundleError, match=r"does not fit the net in bundle\.json"):
        load_bundle(str(copy), CPU)


@pytest.mark.parametrize("text", ["", "{", '{"name": 3}', "[]", "null"])
def test_bad_json_is_refused_when_read(copy: Path, text: str) -> None:
    (copy / "bundle.json").write_text(text, encoding="utf-8")
    with pytest.raises(BundleError, match=r"bundle\.json"):
        load_bundle(str(copy), CPU)


def test_unknown_name_is_refused_when_looked_for(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="No bundle nowhere-at-all") as caught:
        find_bundle("nowhere-at-all")
    assert "Shipped bundles" in caught.value.hint
    with pytest.raises(BundleError, match="not a folder with"):
        find_bundle(str(tmp_path))


def test_identity_bundle_has_no_sampler_when_loaded(identity_bundle: Path) -> None:
    bundle = load_bundle(str(identity_bundle), CPU)
    assert (bundle.score, bundle.critic, bundle.heads) == (None, None, None)
    assert bundle.sampler(SolverSpec(), GuidanceSpec()) is None


def test_sampler_has_the_terms_of_the_settings_when_built(tiny_bundle: Path) -> None:
    bundle = load_bundle(str(tiny_bundle), CPU)
    everything = bundle.sampler(SolverSpec(), GuidanceSpec())
    assert everything is not None
    assert isinstance(everything.guidance, Sum)
    kinds = [type(term) for term in everything.guidance.terms]
    assert kinds == [MutualInformation, Entropy, PatchContrast]
    unguided = bundle.sampler(SolverSpec(), None)
    assert unguided is not None
    assert unguided.guidance is None
    one = bundle.sampler(SolverSpec(), GuidanceSpec(structure_scale=0.0, contrast="none"))
    assert one is not None
    assert isinstance(one.guidance, Sum)
    assert [type(term) for term in one.guidance.terms] == [Entropy]


@pytest.mark.parametrize(
    ("part", "asked", "hint"),
    [
        ("critic", GuidanceSpec(contrast="none"), "structure_scale = 0"),
        ("heads", GuidanceSpec(structure_scale=0.0), 'contrast = "none"'),
    ],
)
def test_missing_net_is_named_when_guidance_needs_it(
    copy: Path, part: str, asked: GuidanceSpec, hint: str
) -> None:
    _edit(copy, lambda spec: spec.update({part: None}))
    bundle = load_bundle(str(copy), CPU)
    with pytest.raises(BundleError, match=f"carries no {part} net") as caught:
        bundle.sampler(SolverSpec(), asked)
    assert hint in caught.value.hint


def test_cuda_is_refused_when_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="no CUDA device"):
        pick_device("cuda")
    assert pick_device("auto") == pick_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto", 1) == torch.device("cuda", 1)
    assert pick_device("cpu") == CPU


def test_precision_follows_the_hardware_when_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(bundle_module, "_cpu_multiplies_bfloat16", lambda s=supported: s)
        assert fast_dtype(CPU) == dtype
    assert fast_dtype(torch.device("cuda")) == torch.bfloat16


def test_a_cap_on_the_processor_is_respected() -> None:
    code = "import torch; from wsi_stain.translate.bundle import fast_dtype\n"
    code += "print(fast_dtype(torch.device('cpu')))"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "torch.float32"


def test_specs_are_kept_apart_when_nets_differ(tmp_path: Path) -> None:
    critic, heads = CriticSpec(channels=(8, 8, 8), embed=4), HeadsSpec(embed=4)
    spec = BundleSpec(name="c", marker="m", critic=critic, heads=heads)
    save_nets(tmp_path, spec, {"critic": dict(Critic(critic).named_parameters())})
    bundle = load_bundle(str(tmp_path), CPU)
    assert bundle.critic is not None
    assert bundle.heads is None  # heads sit on a score net; there is none
    assert bundle.sampler(SolverSpec(), None) is None
