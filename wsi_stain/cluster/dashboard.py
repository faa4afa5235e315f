"""Dask's dashboard: off unless asked for, on the loopback address only, told where it answers.

In: settings, a client. Out: its address. Not here: schedulers.

Its pages show code, names of files and logs, to whoever can open them. A page that can reach
workers can run code on them (CVE-2026-23528, by way of a proxy of Jupyter's): so proxies stay off,
and where that proxy is installed there is no dashboard.
"""

from __future__ import annotations

import http.client
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from wsi_stain.config import ClusterConfig
from wsi_stain.errors import ConfigError

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["check_dashboard", "own_link", "page_settings", "served_link"]

LOOPBACK = "127.0.0.1"
PROXY = "jupyter_server_proxy"
ASK_S = 2
# Dask's own without its proxy to workers.
ROUTES = (
    "distributed.http.scheduler.prometheus",
    "distributed.http.scheduler.info",
    "distributed.http.scheduler.json",
    "distributed.http.health",
    "distributed.http.statics",
)


def check_dashboard(config: ClusterConfig) -> None:
    """Refuse a dashboard that cannot be, or should not.

    Raises
    ------
    ConfigError
        Bokeh is missing, or jupyter-server-proxy is there.
    """
    if not config.dashboard:
        return
    if find_spec("bokeh") is None:
        raise ConfigError(
            "cluster.dashboard: Dask's pages need Bokeh, which this installation lacks.",
            hint="pip install 'wsi-stain[dashboard]'",
        )
    if find_spec(PROXY) is not None:
        raise ConfigError(
            "cluster.dashboard: jupyter-server-proxy is installed here, through which a web page "
            "could run code on the workers (CVE-2026-23528).",
            hint="Use an environment without it, or leave the dashboard off.",
        )


def page_settings(config: ClusterConfig) -> dict[str, Any]:
    """Settle which pages a scheduler of ours serves, beside `dask_settings`."""
    if not config.dashboard:
        return {}
    return {
        "distributed.scheduler.http.routes": list(ROUTES),
        # Dask lets pages of any origin in, so that any page in the browser could read along.
        "distributed.scheduler.dashboard.bokeh-application.allow_websocket_origin": [
            f"{LOOPBACK}:*",
            "localhost:*",
        ],
    }


def own_link(client: Client, config: ClusterConfig) -> str:
    """Give the address on this host of our scheduler's dashboard; empty where it is off."""
    return _link(LOOPBACK, client) if config.dashboard else ""


def served_link(client: Client) -> str:
    """Give the dashboard of a scheduler that is not ours; empty where none answers from here."""
    address = client.scheduler_info(n_workers=0)["address"]
    host = address.partition("://")[2].rpartition(":")[0]
    link = _link(host, client)
    return link if link and _answers(host, link) else ""


def _link(host: str, client: Client) -> str:
    port = client.scheduler_info(n_workers=0)["services"].get("dashboard")
    return f"http://{host}:{port}/status" if port else ""


def _answers(host: str, link: str) -> bool:
    port = int(link.rpartition("/")[0].rpartition(":")[2])
    connection = http.client.HTTPConnection(host.strip("[]"), port, timeout=ASK_S)
    try:
        connection.request("GET", "/status")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False  # behind a firewall, or on its own host's loopback address: no use from here
    finally:
        connection.close()
