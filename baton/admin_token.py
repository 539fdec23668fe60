"""Where a local cluster leaves the token of its admin API for `baton admin`.

    1. `baton serve` draws a token, gives it to its gateway and writes it here, by port.
    2. `baton admin`, run by the same user, reads it, but sends it to loopback addresses only.
    3. `baton serve` removes it when it ends.

Only the owner may read the file: 0600, in a folder of mode 0700.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping


def admin_token_path(port: int, env: Mapping[str, str] = os.environ) -> Path:
    """In `$XDG_RUNTIME_DIR/baton` where there is one, which is in memory; else in `~/.baton`."""
    runtime = env.get("XDG_RUNTIME_DIR", "")
    folder = Path(runtime) / "baton" if runtime and Path(runtime).is_dir() else _home(env)
    return folder / f"admin-token-{port}"


def write_admin_token(port: int, token: str, env: Mapping[str, str] = os.environ) -> Path:
    """Replace the file. Raises `ConfigError` when the folder cannot be written."""
    path = admin_token_path(port, env)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # never write into a file that another could have opened
        with open(os.open(path, flags, 0o600), "w", encoding="ascii") as file:
            file.write(token + "\n")
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


def _home(env: Mapping[str, str]) -> Path:
    home = env.get("HOME", "")
    return (Path(home) if home else Path.home()) / ".baton"
