"""Room 3 of 4: a trained model on disk: `bundle.json` and safetensors, nothing else.

In: a folder or the name of a shipped bundle. Out: `ModelBundle`. Not here: pickle, network code.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from wsi_stain.bundles import find_bundle, read_spec
from wsi_stain.config import BundleSpec, GuidanceSpec, SolverSpec, StudentSpec
from wsi_stain.errors import BundleError, DeviceError
from wsi_stain.files import make_folder
from wsi_stain.translate.color import ColorHold
from wsi_stain.translate.guidance import Entropy, Guidance, MutualInformation, PatchContrast, Sum
from wsi_stain.translate.networks import ContrastHeads, Critic, ScoreNet
from wsi_stain.translate.noise import Schedule
from wsi_stain.translate.sampler import Sampler
from wsi_stain.translate.structure import EdgeInformation
from wsi_stain.translate.student import StudentSampler, student_net

__all__ = [
    "ModelBundle",
    "count_cuda_devices",
    "fast_dtype",
    "load_bundle",
    "pick_device",
    "save_nets",
]

N = TypeVar("N", bound=nn.Module)
FILE_MODE = 0o644
FILES = {part: f"{part}.safetensors" for part in ("score", "critic", "heads", "student")}


@dataclass(frozen=True)
class ModelBundle:
    """A loaded bundle on one device.

    Attributes
    ----------
    spec
        What the bundle says about itself.
    device, dtype
        Where the score net runs, and in which precision; critic and heads are float32.
    score, critic, heads, student
        Nets in evaluation mode; the latter three may be absent. Without a score net the bundle is
        the identity: the output is the start image (a bundle for tests of the road).
    """

    spec: BundleSpec
    device: torch.device
    dtype: torch.dtype
    score: ScoreNet | None
    critic: Critic | None
    heads: ContrastHeads | None
    student: ScoreNet | None = None

    def sampler(self, solver: SolverSpec, guidance: GuidanceSpec | None) -> Sampler | None:
        """Build the reverse process; none for the identity bundle.

        Parameters
        ----------
        solver
            A `StudentSpec` asks for the student.
        guidance
            Energy, or none for the unguided process and for the student.

        Raises
        ------
        BundleError
            A term is asked for whose net the bundle does not carry.
        """
        if self.score is None:
            return None
        schedule = Schedule.of(self.spec)
        if isinstance(solver, StudentSpec):
            if self.student is None:
                raise BundleError(
                    f"Bundle {self.spec.name} carries no student.",
                    hint="Train one with wsi-stain distill.",
                )
            return StudentSampler(schedule, self.student, solver, self.spec.guidance)
        terms = self._terms(schedule, solver, guidance) if guidance is not None else []
        return Sampler(
            schedule,
            self.score.denoise,
            Sum(terms) if terms else None,
            solver,
            guidance or self.spec.guidance,
        )

    def _terms(self, schedule: Schedule, solver: SolverSpec, spec: GuidanceSpec) -> list[Guidance]:
        terms: list[Guidance] = []
        if spec.sees_map:
            critic = _required(self.critic, self.spec.name, "critic", "structure_scale = 0")
            terms.append(MutualInformation(critic, schedule, spec, solver.start_step))
        if spec.edges != "none" and spec.edges_scale > 0:
            terms.append(EdgeInformation(schedule, spec))
        if spec.color_pull > 0:
            terms.append(ColorHold(schedule, spec))
        if spec.entropy != "none" and spec.entropy_scale > 0:
            terms.append(Entropy(schedule, spec, solver.start_step))
        if spec.contrast != "none" and spec.contrast_scale > 0:
            heads = _required(self.heads, self.spec.name, "heads", 'contrast = "none"')
            score = _required(self.score, self.spec.name, "score", 'contrast = "none"')
            terms.append(PatchContrast(score, heads, schedule, spec))
        return terms


def _required(net: N | None, name: str, part: str, remedy: str) -> N:
    if net is None:
        raise BundleError(
            f"Bundle {name} carries no {part} net, which the guidance needs.",
            hint=f"Train one, or set guidance {remedy}.",
        )
    return net


def pick_device(asked: str, index: int = 0) -> torch.device:
    """Choose a device; asking for CUDA where there is none is an error, not a fallback."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            "CUDA was asked for, but torch sees no CUDA device.",
            hint="Use --device cpu, or see wsi-stain doctor.",
        )
    if asked == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", index)


def count_cuda_devices(asked: str) -> int:
    """Count the CUDA devices for "auto" or "cuda"; 0 for "cpu".

    Raises
    ------
    DeviceError
        CUDA was asked for and there is none.
    """
    return 0 if pick_device(asked).type == "cpu" else torch.cuda.device_count()


def fast_dtype(device: torch.device) -> torch.dtype:
    """Give bfloat16 where the hardware multiplies it, else float32.

    On an AVX2 processor oneDNN emulates bfloat16 at an eighth of float32's speed. Where a person
    caps what oneDNN may use (``ONEDNN_MAX_CPU_ISA=AVX2``), it is as on such a processor.
    """
    return torch.bfloat16 if device.type == "cuda" or _cpu_multiplies_bfloat16() else torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    has_units = torch.cpu._is_avx512_bf16_supported()
    return bool(has_units and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def load_bundle(name: str, device: torch.device, dtype: torch.dtype | None = None) -> ModelBundle:
    """Load a bundle, after its checksums are verified.

    Parameters
    ----------
    name
        Folder with a `bundle.json`, or the name of a shipped bundle.
    device
        Where to put the nets.
    dtype
        Precision of the score net; by default the fastest the device has units for.

    Raises
    ------
    BundleError
        Missing, damaged, wrong digest, or made by a later version.
    """
    folder = find_bundle(name)
    spec = read_spec(folder)
    dtype = dtype or fast_dtype(device)
    nets: dict[str, nn.Module] = {}
    if spec.net is not None:
        nets["score"] = ScoreNet(spec.net)
    if spec.critic is not None:
        nets["critic"] = Critic(spec.critic)
    if spec.heads is not None and spec.net is not None:
        nets["heads"] = ContrastHeads(spec.heads, spec.net.channels)
    if spec.student is not None and spec.net is not None:
        nets["student"] = student_net(spec.net)
    for part, net in nets.items():
        _fill(net, folder / FILES[part], spec)
        net.eval().requires_grad_(False)
        net.to(device)
        if isinstance(net, ScoreNet):
            net.lower(dtype)
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return ModelBundle(spec, device, dtype, *map(nets.get, FILES))  # type: ignore[arg-type]


def _fill(net: nn.Module, path: Path, spec: BundleSpec) -> None:
    expected = spec.files.get(path.name)
    if not path.is_file() or expected is None:
        raise BundleError(f"Bundle {spec.name} lacks {path.name}.", hint="Install it again.")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise BundleError(
            f"{path} is damaged: SHA-256 {found[:12]}, bundle.json says {expected[:12]}.",
            hint="Install the bundle again.",
        )
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        net.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    except (SafetensorError, RuntimeError) as error:
        raise BundleError(f"{path} does not fit the net in bundle.json: {error}") from error


def save_nets(folder: Path, spec: BundleSpec, nets: dict[str, dict[str, torch.Tensor]]) -> None:
    """Write weights in bfloat16 and `bundle.json` with their digests.

    Parameters
    ----------
    folder
        Made if absent; files of parts that are not in `nets` stay, and stay listed.
    spec
        Spec to write; its `files` is completed.
    nets
        Part ("score", "critic", "heads", "student") to weights.
    """
    make_folder(folder)
    files = dict(spec.files)
    bare = msgspec.structs.replace(spec, files={})
    for part, weights in nets.items():
        path = folder / FILES[part]
        tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in weights.items()}
        save_file(tensors, path, {"spec": msgspec.json.encode(bare).decode()})
        path.chmod(FILE_MODE)  # safetensors makes it private; a bundle is for all who install it
        files[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    complete = msgspec.structs.replace(spec, files=files)
    text = json.dumps(msgspec.to_builtins(complete), indent=2, ensure_ascii=False) + "\n"
    (folder / "bundle.json").write_text(text, encoding="utf-8")
