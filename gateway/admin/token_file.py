"""Where the token of an admin API is left for `baton admin`, if nobody has chosen one.

    1. `baton serve`, for its gateway, or a gateway that was given none draws a token and writes it
       here, by port.
    2. `baton admin`, run by the same user, reads it, but sends it to loopback addresses only.
    3. Who wrote it removes it at its end.

Where programs are started by systemd, Kubernetes or compose, the token comes from the environment
(`BATON_ADMIN_TOKEN`), and nothing is written.

Only the owner may read the file: 0600, in a folder of mode 0700.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING

from cluster.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def admin_token_path(port: int, env: Mapping[str, str] = os.environ) -> Path:
    """In `$XDG_RUNTIME_DIR/baton` where there is one, which is in memory; else in `~/.baton`."""
    runtime = env.get("XDG_RUNTIME_DIR", "")
    folder = Path(runtime) / "baton" if runtime and Path(runtime).is_dir() else _home(env)
    return folder / f"admin-token-{port}"


def write_admin_token(port: int, token: str, env: Mapping[str, str] = os.environ) -> Path:
    """Replace the file, at once: who reads meanwhile has the old token or the new one, and never
    what another could have opened is written into. Raises `ConfigError` when the folder cannot be
    written."""
    path = admin_token_path(port, env)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="ascii") as file:
            file.write(token + "\n")
        try:
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise
    except OSError as error:
        raise ConfigError(f"cannot write the admin token to {path}: {error.strerror}.") from error
    return path


def read_admin_token(port: int, env: Mapping[str, str] = os.environ) -> str | None:
    """The token of the cluster whose admin API is on `port`; None when none was left."""
    try:
        text = admin_token_path(port, env).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return None
    return text.strip() or None


def remove_admin_token(port: int, env: Mapping[str, str] = os.environ) -> None:
    admin_token_path(port, env).unlink(missing_ok=True)


@contextmanager
def left_admin_token(port: int, token: str, env: Mapping[str, str] = os.environ) -> Iterator[Path]:
    """Inside, it is there. Raises `ConfigError` as `write_admin_token` does."""
    path = write_admin_token(port, token, env)
    try:
        yield path
    finally:
        if read_admin_token(port, env) == token:  # else who has the port now has left its own
            remove_admin_token(port, env)


def _home(env: Mapping[str, str]) -> Path:
    home = env.get("HOME", "")
    return (Path(home) if home else Path.home()) / ".baton"
