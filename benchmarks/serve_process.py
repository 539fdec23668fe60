"""A `baton serve` of this checkout as a process: started, waited for, stopped.

1. `start` takes two free ports and runs the command; its output goes to a log file.
2. `wait_until_ready` returns the seconds from the start to the first healthy answer.
3. `stop` sends SIGTERM and waits; a cluster that does not drain is killed with its group.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).resolve().parent.parent
READY_TIMEOUT_SECONDS = 300.0
STOP_TIMEOUT_SECONDS = 90.0
POLL_SECONDS = 0.02
LOG_TAIL_BYTES = 4000


class ServeFailed(RuntimeError):
    """The cluster ended, or was not ready in time. The message holds the end of its log."""


class ServeProcess:
    """Use as a context manager. `url` and `admin_url` are its addresses."""

    def __init__(self, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        """`environment`: settings that have no flag."""
        port, admin_port = free_ports(2)
        self.url = f"http://127.0.0.1:{port}"
        self.admin_url = f"http://127.0.0.1:{admin_port}"
        self._log: IO[bytes] = TemporaryFile()  # noqa: SIM115 (closed by stop)
        command = [sys.executable, "-m", "baton", "serve", "--port", str(port)]
        command += ["--admin-port", str(admin_port), *arguments]
        self._began = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**_without_settings(), **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> ServeProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_until_ready(self) -> float:
        """Seconds from the start to the first 200 of `/health`. Raises `ServeFailed`."""
        while not _is_healthy(f"{self.url}/health"):
            elapsed = time.perf_counter() - self._began
            if self._process.poll() is not None or elapsed > READY_TIMEOUT_SECONDS:
                raise ServeFailed(f"baton serve is not ready after {elapsed:.0f} s.\n{self.log()}")
            time.sleep(POLL_SECONDS)
        return time.perf_counter() - self._began

    def log(self) -> str:
        size = os.fstat(self._log.fileno()).st_size
        tail = os.pread(self._log.fileno(), LOG_TAIL_BYTES, max(0, size - LOG_TAIL_BYTES))
        return tail.decode(errors="replace")

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_TIMEOUT_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._log.close()


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _without_settings() -> dict[str, str]:
    """What is set in the caller's shell must not change what is measured."""
    return {name: value for name, value in os.environ.items() if not _is_setting(name)}


def _is_setting(variable: str) -> bool:
    return variable.startswith("BATON_") or variable == "OMP_NUM_THREADS"


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2.0) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
