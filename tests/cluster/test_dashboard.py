"""Dask's dashboard: off by default, refused beside a proxy, on loopback, told where it answers."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from wsi_stain.cluster.dashboard import PROXY, check_dashboard, page_settings, served_link
from wsi_stain.config import ClusterConfig
from wsi_stain.dispatch import open_executor
from wsi_stain.errors import ConfigError
from wsi_stain.manifest import Event

ON = ClusterConfig(dashboard=True, workers=1)


@contextmanager
def http(status: int) -> Iterator[int]:
    """Answer every request on a port of loopback with one status."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def client_of(**services: int) -> Any:
    info = {"address": "tls://127.0.0.1:8786", "services": services}
    return SimpleNamespace(scheduler_info=lambda n_workers: info)


def installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    found = {"bokeh", PROXY}
    monkeypatch.setattr(
        "wsi_stain.cluster.dashboard.find_spec",
        lambda name: object() if name in names else None if name in found else 1 / 0,
    )


def test_nothing_is_checked_or_served_by_default() -> None:
    check_dashboard(ClusterConfig())
    assert page_settings(ClusterConfig()) == {}


def test_missing_bokeh_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    with pytest.raises(ConfigError, match="Bokeh") as caught:
        check_dashboard(ON)
    assert "wsi-stain[dashboard]" in caught.value.hint


def test_dashboard_beside_the_proxy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "bokeh", PROXY)
    with (
        pytest.raises(ConfigError, match="CVE-2026-23528"),
        open_executor(ON, lambda config: 0),
    ):
        pass
    installed(monkeypatch, "bokeh")
    check_dashboard(ON)


def test_pages_go_without_the_proxy_to_workers() -> None:
    routes = page_settings(ON)["distributed.scheduler.http.routes"]
    assert "distributed.http.proxy" not in routes
    assert all(importlib.util.find_spec(route) for route in routes)


@pytest.mark.parametrize("executor", ["serial", "address"])
def test_dashboard_of_nobody_is_refused(executor: Any) -> None:
    with pytest.raises(ValueError, match="dashboard"):
        ClusterConfig(executor=executor, dashboard=True, scheduler="tcp://127.0.0.1:1")


def test_link_of_another_scheduler_is_told_only_where_it_answers() -> None:
    with http(200) as port:
        assert served_link(client_of(dashboard=port)) == f"http://127.0.0.1:{port}/status"
    assert served_link(client_of(dashboard=port)) == "", "nobody answers any more"
    with http(404) as port:
        assert served_link(client_of(dashboard=port)) == "", "a scheduler without a dashboard"
    assert served_link(client_of()) == ""


@pytest.mark.skipif(importlib.util.find_spec("bokeh") is None, reason="no Bokeh here")
def test_own_dashboard_is_told_and_stays_on_loopback() -> None:
    heard: list[Event] = []
    with open_executor(ON, lambda config: 0, heard.append):
        (link,) = (event.facts["dashboard"] for event in heard)
        me = psutil.Process()
        listening = {
            connection.laddr.ip
            for process in [me, *me.children(recursive=True)]
            if process.status() != psutil.STATUS_ZOMBIE
            for connection in process.net_connections(kind="inet")
            if connection.status == psutil.CONN_LISTEN
        }
    assert link.startswith("http://127.0.0.1:")
    assert listening == {"127.0.0.1"}
