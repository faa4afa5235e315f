"""TLS certificates: made for one run, or files of the user's own.

In: a private folder, or paths. Out: Dask's `Security`, which refuses all that is not encrypted.
Not here: connections.

Both sides prove who they are with a certificate of one authority. Whoever holds the key can run
code on all workers: it must be its owner's alone.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import TYPE_CHECKING

from wsi_stain.config import ClusterConfig
from wsi_stain.errors import ConfigError
from wsi_stain.files import cannot_write

if TYPE_CHECKING:
    from distributed import Security

__all__ = ["given_credentials", "new_credentials"]

PRIVATE = 0o600
ROLES = ("client", "scheduler", "worker")


def new_credentials(folder: Path) -> Security:
    """Make an authority, a certificate and a key for one run.

    Parameters
    ----------
    folder
        Gets ``ca.pem``, ``cert.pem`` and ``key.pem``, each of mode 600.

    Raises
    ------
    OutputError
        They cannot be written.
    """
    from distributed import Security

    made = Security.temporary().get_tls_config_for_role("client")
    paths = {key: folder / f"{key.removesuffix('_file')}.pem" for key in ("ca_file", "cert", "key")}
    try:
        for key, path in paths.items():
            path.touch(mode=PRIVATE, exist_ok=False)
            path.write_text(made[key], encoding="ascii")
    except OSError as error:
        raise cannot_write(folder, error) from error
    return _security(*(str(path) for path in paths.values()))


def given_credentials(config: ClusterConfig) -> Security | None:
    """Load the user's certificates; none where the scheduler's address is plain TCP.

    Raises
    ------
    ConfigError
        A file cannot be read, or the key can be read by others.
    """
    if not config.scheduler.startswith("tls://"):
        return None
    for name in (config.tls_ca, config.tls_cert, config.tls_key):
        try:
            mode = stat.S_IMODE(Path(name).stat().st_mode)
        except OSError as error:
            raise ConfigError(f"TLS file {name} cannot be read: {error.strerror}.") from error
        if name == config.tls_key and mode & 0o077:
            raise ConfigError(
                f"The TLS key {name} can be read by others (mode {mode:o}).",
                hint=f"chmod 600 {name}",
            )
    return _security(config.tls_ca, config.tls_cert, config.tls_key)


def _security(ca: str, cert: str, key: str) -> Security:
    from distributed import Security

    pairs = {f"tls_{role}_cert": cert for role in ROLES} | {
        f"tls_{role}_key": key for role in ROLES
    }
    return Security(require_encryption=True, tls_ca_file=ca, **pairs)
