"""The page in a real browser: from disk, no request, no error, both pictures as one."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from tornado.httpclient import AsyncHTTPClient
from tornado.websocket import WebSocketClientConnection, websocket_connect

from wsi_stain.archive_record import ARCHIVE_FILE, ArchiveRecord, ArchiveSlide, write_archive
from wsi_stain.config import WriteConfig
from wsi_stain.evaluate.archive_page import write_archive_page
from wsi_stain.evaluate.quantify_files import quantify
from wsi_stain.evaluate.report import write_report
from wsi_stain.geometry import Size
from wsi_stain.write.tiff import write_pyramid

MakeRun = Callable[..., Path]
Visit = Callable[["Tab"], Awaitable[None]]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SIZES = {"laptop": (1366, 900), "tablet": (820, 1180), "phone": (390, 844)}
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
)
STATE = """report.viewers.map(v => [v.viewport.getZoom(true), v.viewport.getCenter(true).x,
    v.viewport.getCenter(true).y])"""
SHOWN = "report.viewers.every(v => v.isOpen() && v.world.getItemAt(0).getFullyLoaded())"
READY = f"window.report !== undefined && {SHOWN}"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]


class Tab:
    """A browser tab, driven by the DevTools protocol."""

    def __init__(self, socket: WebSocketClientConnection) -> None:
        self._socket = socket
        self._n_calls = 0
        self.events: list[dict[str, Any]] = []

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._n_calls += 1
        message = {"id": self._n_calls, "method": method, "params": params}
        await self._socket.write_message(json.dumps(message))
        while True:
            data = await asyncio.wait_for(self._socket.read_message(), 60)
            assert data is not None, "the browser went away"
            answer: dict[str, Any] = json.loads(data)
            if answer.get("id") == self._n_calls:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    async def js(self, code: str) -> Any:
        result = await self.call("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def wait(self, code: str) -> None:
        for _ in range(200):
            if await self.js(code):
                return
            await asyncio.sleep(0.1)
        raise AssertionError(f"never true: {code}")

    async def open(self, page: Path, size: tuple[int, int], ready: str = READY) -> None:
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1}
        await self.call("Emulation.setDeviceMetricsOverride", **metrics, mobile=size[0] < 500)
        await self.call("Page.navigate", url=page.as_uri())
        await self.wait(ready)
        await asyncio.sleep(0.5)

    async def screenshot(self) -> npt.NDArray[np.uint8]:
        data = base64.b64decode((await self.call("Page.captureScreenshot"))["data"])
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        assert pixels is not None
        return np.asarray(pixels, np.uint8)

    def faults(self) -> list[str]:
        """List all that a page on disk must not do."""
        found = []
        for event in self.events:
            method, params = event["method"], event["params"]
            if method == "Network.requestWillBeSent":
                url = params["request"]["url"]
                found += [] if url.startswith(("file:", "data:")) else [url]
            elif method in (
                "Log.entryAdded",
                "Network.loadingFailed",
                "Runtime.consoleAPICalled",
                "Runtime.exceptionThrown",
            ):
                found.append(json.dumps(params))
        return found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, make_run: MakeRun) -> Path:
    return write_report(make_run(tmp_path_factory.mktemp("browser")))


def browse(profile: Path, visit: Visit) -> None:
    """Start a browser of our own, let `visit` drive a tab, stop it."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as browser:
        try:
            assert browser.stderr is not None
            port = next(
                line.rsplit(":", 1)[1].split("/")[0]
                for line in browser.stderr
                if "DevTools listening" in line
            )
            asyncio.run(_drive(port, visit))
        finally:
            browser.terminate()


async def _drive(port: str, visit: Visit) -> None:
    answer = await AsyncHTTPClient().fetch(f"http://127.0.0.1:{port}/json/list")
    [target] = [each for each in json.loads(answer.body) if each["type"] == "page"]
    socket = await websocket_connect(target["webSocketDebuggerUrl"], max_message_size=1 << 28)
    tab = Tab(socket)
    try:
        for domain in ("Page", "Runtime", "Log", "Network"):
            await tab.call(f"{domain}.enable")
        await visit(tab)
    finally:
        socket.close()


def test_page_is_clean_and_not_too_wide_when_opened_from_disk(page: Path, tmp_path: Path) -> None:
    async def visit(tab: Tab) -> None:
        for size in SIZES.values():
            await tab.open(page, size)
            assert await tab.js("document.documentElement.scrollWidth") <= size[0]
            picture = await tab.screenshot()
            pink = (picture[..., 0] > 170) & (picture[..., 1] < 160) & (picture[..., 2] > 120)
            assert pink.sum() > 1000, "no H&E in sight"
            box = await tab.js(
                "document.querySelector('.statement').getBoundingClientRect().toJSON()"
            )
            assert box["top"] == 0
            await tab.js("window.scrollTo(0, 1e6)")
            box = await tab.js(
                "document.querySelector('.statement').getBoundingClientRect().toJSON()"
            )
            assert box["top"] == 0
        assert tab.faults() == []

    browse(tmp_path, visit)


def test_faults_are_seen_when_planted(page: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(page.parent, bad)
    html = (bad / "index.html").read_text(encoding="utf-8")
    planted = '<img src="http://127.0.0.1:9/x.png"><script>boom()</script></body>'
    (bad / "index.html").write_text(html.replace("</body>", planted), encoding="utf-8")

    async def visit(tab: Tab) -> None:
        await tab.open(bad / "index.html", SIZES["laptop"])
        found = "\n".join(tab.faults())
        assert "127.0.0.1:9" in found
        # The page's own policy stops both before anything leaves the machine.
        assert "Content Security Policy" in found

    browse(tmp_path / "profile", visit)


def test_both_pictures_move_as_one_when_one_is_zoomed(page: Path, tmp_path: Path) -> None:
    async def visit(tab: Tab) -> None:
        await tab.open(page, SIZES["laptop"])
        home = await tab.js(STATE)
        for x_px in (350, 1000):  # over the H&E, then over the virtual stain
            before = await tab.js(STATE)
            wheel = {"type": "mouseWheel", "x": x_px, "y": 500, "deltaX": 0, "deltaY": -240}
            await tab.call("Input.dispatchMouseEvent", **wheel)
            await asyncio.sleep(1.0)
            after = await tab.js(STATE)
            assert after[0][0] > 1.1 * before[0][0]
            np.testing.assert_allclose(after[0], after[1], rtol=1e-6)
        await tab.js("document.getElementById('whole').click()")
        await asyncio.sleep(1.0)
        np.testing.assert_allclose(await tab.js(STATE), home, rtol=1e-3)

    browse(tmp_path, visit)


def test_keys_move_the_picture_and_the_border_when_used(page: Path, tmp_path: Path) -> None:
    async def press(tab: Tab, key: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            await tab.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code
            )
        await asyncio.sleep(0.8)

    async def visit(tab: Tab) -> None:
        await tab.open(page, SIZES["laptop"])
        await tab.js("document.getElementById('closer').click()")
        await asyncio.sleep(0.8)
        before = await tab.js(STATE)
        await tab.js("report.viewers[1].canvas.focus()")
        await press(tab, "ArrowRight", 39)
        after = await tab.js(STATE)
        assert after[1][1] > before[1][1]
        np.testing.assert_allclose(after[0], after[1], rtol=1e-6)

        await tab.js("document.getElementById('swipe').click()")
        await tab.js("document.getElementById('cut').focus()")
        await press(tab, "ArrowLeft", 37)
        cut = await tab.js(
            "getComputedStyle(document.getElementById('stage')).getPropertyValue('--cut')"
        )
        assert float(cut) == pytest.approx(0.499)

    browse(tmp_path, visit)


def test_swipe_shows_one_stain_on_each_side_when_switched_on(page: Path, tmp_path: Path) -> None:
    async def visit(tab: Tab) -> None:
        await tab.open(page, SIZES["laptop"])
        await tab.js("document.getElementById('swipe').click()")
        await asyncio.sleep(1.5)
        states = await tab.js(STATE)
        np.testing.assert_allclose(states[0], states[1], rtol=1e-6)
        picture = (await tab.screenshot())[220:820].astype(int)
        redness = (picture[..., 0] - picture[..., 1] > 40).sum(axis=0)
        middle = picture.shape[1] // 2
        assert redness[: middle - 20].sum() > 5000, "the H&E's pink on the left"
        assert redness[middle + 20 :].sum() < 0.02 * redness.sum(), "none on the right"

    browse(tmp_path, visit)


@pytest.fixture(scope="module")
def rich_page(tmp_path_factory: pytest.TempPathFactory, make_run: MakeRun) -> Path:
    """Page with all that may be shown: measured, with an uncertainty and a flagged tile."""
    run = make_run(tmp_path_factory.mktemp("rich"))
    grey = np.zeros((1101, 1403, 3), np.uint8)
    grey[300:700, 300:700] = 30
    (run / "tiles.csv").write_text(
        "tile,x_px_out,y_px_out,size_px,flags\n3,256,256,256,structure\n"
    )
    quantify(run.with_name("S-1_ki67.ome.tiff"))
    write_pyramid(
        run.with_name("S-1_ki67_uncertainty.ome.tiff"),
        Size(1403, 1101),
        [grey],
        0.5,
        WriteConfig(lossless=True),
        name="sd",
    )
    return write_report(run)


@pytest.mark.parametrize("size", SIZES)
def test_overlays_come_and_go_when_ticked(rich_page: Path, tmp_path: Path, size: str) -> None:
    async def visit(tab: Tab) -> None:
        await tab.open(rich_page, SIZES[size])
        assert await tab.js("document.documentElement.scrollWidth") <= SIZES[size][0]
        await tab.js("document.querySelector('.bar').scrollIntoView()")
        await tab.wait("report.viewers.every(v => v.world.getItemCount() === 3)")
        plain = (await tab.screenshot()).astype(int)
        for name in ("positive", "tissue", "spread", "spot", "doubts"):
            await tab.js(f"document.getElementById('show-{name}').click()")
            await asyncio.sleep(0.8)
            shown = (await tab.screenshot()).astype(int)
            assert (np.abs(shown - plain)[220:].max(axis=-1) > 40).sum() > 200, name
            await tab.js(f"document.getElementById('show-{name}').click()")
            await asyncio.sleep(0.8)
            gone = (await tab.screenshot()).astype(int)
            assert (np.abs(gone - plain)[220:].max(axis=-1) > 40).sum() < 50, name
        assert tab.faults() == []

    browse(tmp_path, visit)


def test_both_pictures_agree_when_the_mode_changes_on_the_way(page: Path, tmp_path: Path) -> None:
    async def visit(tab: Tab) -> None:
        await tab.open(page, SIZES["laptop"])
        for mode in ("swipe", "beside"):
            # In one turn: the viewers learn of their new size only after the jump has begun.
            field = "document.querySelectorAll('[data-field]')[1].click()"
            await tab.js(f"document.getElementById('{mode}').click(); {field}")
            await asyncio.sleep(2.0)
            states = await tab.js(STATE)
            assert states[0][0] > 1.5, mode
            np.testing.assert_allclose(states[0], states[1], rtol=1e-6, err_msg=mode)

    browse(tmp_path, visit)


def test_overlays_without_data_have_no_box(page: Path, tmp_path: Path) -> None:
    async def visit(tab: Tab) -> None:
        await tab.open(page, SIZES["laptop"])
        boxes = "[...document.querySelectorAll('fieldset input')].map(box => box.id)"
        assert await tab.js(boxes) == ["show-tissue", "show-positive", "show-doubts"]
        assert "wsi-stain quantify S-1_ki67.ome.tiff" in await tab.js("document.body.innerText")

    browse(tmp_path, visit)


def test_fields_lie_over_a_reduced_slide_when_near(
    tmp_path: Path, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsi_stain.write.overview.choose_reduction", lambda size: 2)
    page = write_report(make_run(tmp_path / "out"))
    n_fields = "document.querySelectorAll('[data-field]').length"
    opacities = "report.viewers.map(v => v.world.getItemAt(1).getOpacity())"

    async def visit(tab: Tab) -> None:
        await tab.open(page, SIZES["phone"])
        await tab.wait(f"report.viewers.every(v => v.world.getItemCount() === 2 + {n_fields})")
        assert await tab.js(opacities) == [0, 0]
        await tab.js("document.querySelector('[data-field]').click()")
        await asyncio.sleep(1.5)
        assert await tab.js(opacities) == [1, 1]
        states = await tab.js(STATE)
        np.testing.assert_allclose(states[0], states[1], rtol=1e-6)
        assert tab.faults() == []

    browse(tmp_path / "profile", visit)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory, make_run: MakeRun) -> Path:
    """Index page of 12 slides: ten done, two of them flagged, one failed, one to come."""
    out = tmp_path_factory.mktemp("archive")
    report = write_report(make_run(out, "s1_ki67"))
    slides = [
        ArchiveSlide(
            name=f"s{number}",
            state="done",
            run=f"s{number}_ki67.run",
            output=f"s{number}_ki67.ome.tiff",
            tiles=100 * ((7 * number) % 11),
            seconds=3.5 * number,
            flags=["structure"] if number in (3, 4) else [],
            positive_fraction=None if number == 5 else 0.03 * number,
        )
        for number in range(1, 11)
    ]
    for slide in slides[1:]:
        shutil.copytree(report.parent, out / slide.run / "report")
    error = "Slide s11.svs has no pixel size: neither its tags nor its objective tell."
    slides.append(
        ArchiveSlide(name="s11", state="failed", error=error, next="wsi-stain batch x --mpp 0.5")
    )
    slides.append(ArchiveSlide(name="s12"))
    begun_utc = "2026-01-02T03:04:05+00:00"
    write_archive(
        out / ARCHIVE_FILE, ArchiveRecord(begun_utc=begun_utc, bundle="ki67", slides=slides)
    )
    return write_archive_page(out)


ROWS = "document.querySelectorAll('#slides tbody tr').length > 0"
ORDER = """[...document.querySelectorAll('#slides tbody tr')].filter(row => !row.hidden)
    .map(row => row.dataset.name)"""


@pytest.mark.parametrize("size", SIZES)
def test_archive_is_clean_and_its_pictures_are_seen(
    archive: Path, tmp_path: Path, size: str
) -> None:
    async def visit(tab: Tab) -> None:
        await tab.open(archive, SIZES[size], ROWS)
        assert await tab.js("document.documentElement.scrollWidth") <= SIZES[size][0]
        await tab.js("document.querySelectorAll('img').forEach(i => i.loading = 'eager')")
        await tab.wait("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert await tab.js("document.images.length") == 20
        assert "Virtual stain, research use only." in await tab.js("document.body.innerText")
        assert tab.faults() == []

    browse(tmp_path, visit)


def test_archive_is_sorted_and_searched_with_the_keyboard(archive: Path, tmp_path: Path) -> None:
    async def press(tab: Tab, key: str) -> list[str]:
        await tab.js(f"document.querySelector('[data-key={key}]').focus()")
        for kind in ("keyDown", "keyUp"):
            enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
            await tab.call("Input.dispatchKeyEvent", type=kind, **enter)
        found: list[str] = await tab.js(ORDER)
        return found

    async def visit(tab: Tab) -> None:
        await tab.open(archive, SIZES["laptop"], ROWS)
        # As a person counts, not letter by letter; what was not measured comes last both ways.
        assert (await press(tab, "name"))[:3] == ["s1", "s2", "s3"]
        assert (await press(tab, "name"))[:3] == ["s12", "s11", "s10"]
        assert (await press(tab, "positive"))[:2] == ["s1", "s2"]
        assert set((await tab.js(ORDER))[-3:]) == {"s5", "s11", "s12"}
        assert (await press(tab, "positive"))[:2] == ["s10", "s9"]
        assert set((await tab.js(ORDER))[-3:]) == {"s5", "s11", "s12"}
        assert (await press(tab, "state"))[0] == "s11"
        sorts = "[...document.querySelectorAll('th[aria-sort]')].map(th => th.ariaSort)"
        assert sorted(await tab.js(sorts)) == ["ascending", *["none"] * 5]
        await tab.js("document.querySelector('[data-show=flagged]').click()")
        assert sorted(await tab.js(ORDER)) == ["s3", "s4"]
        await tab.js("document.querySelector('[data-show]').click()")  # all
        find = "const f = document.getElementById('find'); f.value = 'pixel size';"
        await tab.js(find + "f.dispatchEvent(new Event('input'))")
        assert await tab.js(ORDER) == ["s11"]
        assert "1 of 12 shown" in await tab.js("document.body.innerText")
        assert tab.faults() == []

    browse(tmp_path, visit)


def test_flagged_place_is_shown_when_its_button_is_pressed(rich_page: Path, tmp_path: Path) -> None:
    async def visit(tab: Tab) -> None:
        await tab.open(rich_page, SIZES["phone"])
        await tab.js("document.getElementById('show-doubts').checked = false")
        await tab.js("document.querySelector('[data-place]').click()")
        await asyncio.sleep(1.5)
        assert await tab.js("document.getElementById('show-doubts').checked")
        states = await tab.js(STATE)
        np.testing.assert_allclose(states[0], states[1], rtol=1e-6)
        # Tile of 256 px at (256, 256) of 1403 px.
        np.testing.assert_allclose(states[0][1:], [384 / 1403, 384 / 1403], rtol=0.01)
        assert states[0][0] > 2.0
        assert tab.faults() == []

    browse(tmp_path, visit)
