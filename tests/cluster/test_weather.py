"""Workers and schedulers that die, leave and come back in the middle of a real slide, over TLS."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from wsi_stain.cli import main
from wsi_stain.config import BundleSpec, ClusterConfig, NetSpec, RunConfig, SampleConfig, TileConfig
from wsi_stain.dispatch import open_executor
from wsi_stain.errors import DeviceError
from wsi_stain.layout import RunFiles
from wsi_stain.manifest import Event
from wsi_stain.pipeline import translate_slide
from wsi_stain.translate.bundle import save_nets
from wsi_stain.translate.networks import ScoreNet

# A busy machine is no failure: three workers load torch here.
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

Start = Callable[[], Any]
NET = NetSpec(channels=(16, 16), blocks=1)
TILES = TileConfig(shard_tiles=2)
SAMPLE = SampleConfig(steps=2, guided=False)


@dataclass(frozen=True)
class Scene:
    """A slide, a model, and the pyramid of a run in one process that nothing disturbs."""

    slide: Path
    bundle: Path
    straight: bytes


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, synthetic_slide: Path) -> Scene:
    """With a small untrained net: what it draws depends on noise, place and seed."""
    torch.manual_seed(0)
    weights = ScoreNet(NET).state_dict()
    weights["tail.weight"] = 0.05 * torch.randn_like(weights["tail.weight"])
    folder = tmp_path_factory.mktemp("scene")
    spec = BundleSpec(name="tiny", marker="Test", tile_px=128, net=NET, start_image="stain")
    save_nets(folder / "tiny", spec, {"score": weights})
    config = settings(folder / "tiny", ClusterConfig(executor="serial", device="cpu"))
    result = translate_slide(synthetic_slide, folder / "straight", config)
    return Scene(synthetic_slide, folder / "tiny", result.files.output.read_bytes())


@pytest.fixture
def start_tls(start_dask: Callable[[dict[str, Path]], Any], certificates: dict[str, Path]) -> Start:
    """Give the function that makes a `DaskProcesses` of one authority."""
    return lambda: start_dask(certificates)


def settings(bundle: Path, cluster: ClusterConfig) -> RunConfig:
    return RunConfig(bundle=str(bundle), tiles=TILES, sample=SAMPLE, cluster=cluster)


def remote(dask: Any, **more: Any) -> ClusterConfig:
    files: dict[str, Any] = {f"tls_{name}": str(path) for name, path in dask.tls.items()}
    given: dict[str, Any] = {"executor": "address", "device": "cpu", "scheduler": dask.address}
    return ClusterConfig(**given, **files, **more)


def after(acts: dict[int, Callable[[], None]]) -> Callable[[Event], None]:
    """Do something when so many shards were translated."""
    seen = 0

    def listen(event: Event) -> None:
        nonlocal seen
        if (event.stage, event.kind) == ("translate", "advance"):
            seen += 1
            acts.get(seen, lambda: None)()

    return listen


def kill(process: Any) -> None:
    import psutil  # noqa: PLC0415 - one use

    for child in psutil.Process(process.pid).children(recursive=True):
        child.kill()
    process.kill()
    process.wait()


def test_nobody_notices_when_workers_die_and_leave(
    start_tls: Start, scene: Scene, tmp_path: Path
) -> None:
    dask = start_tls()
    dask.start_scheduler()
    victim = dask.start_worker("--name", "victim")
    dask.start_worker("--name", "leaver")
    dask.wait_for_workers(2)
    config = settings(scene.bundle, remote(dask, wait_s=300))
    left: dict[str, Any] = {}

    def leave() -> None:
        """What a worker does at the end of its lifetime; a new one takes its place."""
        from distributed import default_client  # noqa: PLC0415 - the executor's own

        dask.start_worker("--name", "late", "--lifetime", "1h", "--lifetime-stagger", "1m")
        # A worker that holds results leaves only where another can take them.
        default_client().wait_for_workers(2, timeout=120)
        there = default_client().scheduler_info(n_workers=-1)["workers"]
        (address,) = (a for a, worker in there.items() if worker["name"] == "leaver")
        left.update(default_client().retire_workers([address], close_workers=True))

    listen = after({2: lambda: kill(victim), 4: leave})
    result = translate_slide(scene.slide, tmp_path / "out", config, listener=listen)
    assert victim.wait(timeout=60) != 0
    assert len(left) == 1
    assert result.files.output.read_bytes() == scene.straight


def test_run_goes_on_with_a_new_scheduler(
    start_tls: Start,
    scene: Scene,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dask = start_tls()
    dask.start_scheduler()
    for _ in range(2):
        dask.start_worker()
    dask.wait_for_workers(2)
    out = tmp_path / "out"
    done = lose_scheduler(dask, scene, out)
    assert len([path for path in done if path.parent.name == "ihc"]) >= 3

    # The same command, and the words of the program.
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        f'bundle = "{scene.bundle}"\n[tiles]\nshard_tiles = 2\n[sample]\nsteps = 2\n'
        'guided = false\n[cluster]\ndevice = "cpu"\n'
    )
    command = ["translate", scene.slide, "--out", out, "--recipe", recipe, "--keep-store"]
    monkeypatch.setattr(sys, "argv", ["wsi-stain", *map(str, command), "--quiet", *dask.flags()])
    with pytest.raises(SystemExit) as stop:
        main()
    line = capsys.readouterr().err
    assert stop.value.code == 7
    assert line.startswith(f"wsi-stain: The scheduler {dask.address} cannot be reached")
    assert line.count("\n") == 1

    again = start_tls()
    again.start_scheduler()
    again.start_worker()
    monkeypatch.setattr(sys, "argv", ["wsi-stain", *map(str, command), "--quiet", *again.flags()])
    main()
    files = RunFiles.of(out, scene.slide, "Test", "ome-tiff")
    assert files.output.read_bytes() == scene.straight
    # What was finished was not made again.
    assert {path: path.stat().st_mtime_ns for path in done} == done


def lose_scheduler(dask: Any, scene: Scene, out: Path) -> dict[Path, int]:
    """Kill it in the middle; give the markers of finished shards with their times."""
    struck_s: list[float] = []

    def strike() -> None:
        struck_s.append(time.monotonic())
        kill(dask.scheduler)

    config = settings(scene.bundle, remote(dask))
    with pytest.raises(DeviceError, match="scheduler was lost") as caught:
        translate_slide(scene.slide, out, config, listener=after({3: strike}))
    assert time.monotonic() - struck_s[0] < 60
    assert caught.value.exit_code == 7
    assert "same command" in caught.value.hint
    store = RunFiles.of(out, scene.slide, "Test", "ome-tiff").store
    return {path: path.stat().st_mtime_ns for path in store.glob("done/*/*.json")}


def test_run_ends_when_all_workers_stay_away(start_tls: Start) -> None:
    dask = start_tls()
    dask.start_scheduler()
    worker = dask.start_worker()
    dask.wait_for_workers(1)
    with open_executor(remote(dask, wait_s=30), lambda _: 0) as executor:
        results = executor.run(lambda number: time.sleep(1.0), range(50))
        next(results)
        kill(worker)
        with pytest.raises(DeviceError, match=r"All workers of tls://.* died and none came back"):
            list(results)
