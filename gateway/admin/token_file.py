"""Where the token of an admin API is left for `baton admin`, if nobody has chosen one.

    1. `baton serve`, for its gateway, or a gateway that was given none draws a token and writes it
       here, by address and port: a machine has many loopback addresses, and each has all ports.
    2. `baton admin`, run by the same user, reads it, but sends it to loopback addresses only.
    3. Who wrote it removes it at its end.

Where programs are started by systemd, Kubernetes or compose, the token comes from the environment
(`BATON_ADMIN_TOKEN`), and nothing is written.

Only the owner may read the file: 0600, in a folder of mode 0700.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING

from cluster.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

WILDCARDS = frozenset({"0.0.0.0", "::", ""})
_EVERYWHERE = "everywhere"  # in the name of the file of who listens on one of them


def admin_token_path(host: str, port: int, env: Mapping[str, str] = os.environ) -> Path:
    """Of who listens on `host`. In `$XDG_RUNTIME_DIR/baton` where there is one, which is in memory;
    else in `~/.baton`."""
    return _path(_EVERYWHERE if host in WILDCARDS else _addresses_of(host)[0], port, env)


def write_admin_token(
    host: str, port: int, token: str, env: Mapping[str, str] = os.environ
) -> Path:
    """Replace the file, at once: who reads meanwhile has the old token or the new one, and never
    what another could have opened is written into. Raises `ConfigError` when the folder cannot be
    written."""
    path = admin_token_path(host, port, env)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="ascii") as file:
            file.write(token + "\n")
        try:
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise
        _remove_outdated(path, port)
    except OSError as error:
        raise ConfigError(f"cannot write the admin token to {path}: {error.strerror}.") from error
    return path


def _remove_outdated(path: Path, port: int) -> None:
    """Who listens everywhere is alone on its port: others that left a token there were killed."""
    everywhere = path.with_name(_name(_EVERYWHERE, port))
    for other in path.parent.glob(_name("*", port)):
        if other != path and everywhere in (other, path):
            other.unlink(missing_ok=True)


def read_admin_token(host: str, port: int, env: Mapping[str, str] = os.environ) -> str | None:
    """The token of who answers at `host` and `port`; None when none was left."""
    for address in (*_addresses_of(host), _EVERYWHERE):
        token = _read(_path(address, port, env))
        if token is not None:
            return token
    return None


def _read(path: Path) -> str | None:
    try:
        text = path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return None
    return text.strip() or None


@contextmanager
def left_admin_token(
    host: str, port: int, token: str, env: Mapping[str, str] = os.environ
) -> Iterator[Path]:
    """Inside, it is there. Raises `ConfigError` as `write_admin_token` does."""
    path = write_admin_token(host, port, token, env)
    try:
        yield path
    finally:
        if _read(path) == token:  # else who has the port now has left its own
            path.unlink(missing_ok=True)


def _addresses_of(host: str) -> list[str]:
    """Each in one spelling, in the order in which they are tried. A name that is not known stands
    for itself."""
    try:
        return [str(ipaddress.ip_address(host))]
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return [host]
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _path(address: str, port: int, env: Mapping[str, str]) -> Path:
    runtime = env.get("XDG_RUNTIME_DIR", "")
    folder = Path(runtime) / "baton" if runtime and Path(runtime).is_dir() else _home(env)
    return folder / _name(address, port)


def _name(address: str, port: int) -> str:
    return f"admin-token-{address}-{port}"


def _home(env: Mapping[str, str]) -> Path:
    home = env.get("HOME", "")
    return (Path(home) if home else Path.home()) / ".baton"
