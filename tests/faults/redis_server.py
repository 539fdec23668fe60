"""A redis-server on a TCP port, which keeps its port when it is killed and started again."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from baton.embedded_redis import find_redis_server
from tests.faults.ports import free_port

STARTS_WITHIN_SECONDS = 20.0
POLL_SECONDS = 0.02


class RedisServer:
    """Started at once. `options` are lines of its configuration, e.g. "maxmemory 4mb"."""

    def __init__(self, *options: str) -> None:
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="faults-redis-"))
        self._options = options
        self._process: subprocess.Popen[bytes]
        self.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def start(self) -> None:
        """Returns once it answers."""
        plain = (f"port {self.port}", "bind 127.0.0.1", f"dir {self.folder}", "appendonly no")
        config = self.folder / "redis.conf"
        config.write_text("\n".join((*plain, 'save ""', *self._options)))
        self._process = subprocess.Popen(
            [find_redis_server(), str(config)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + STARTS_WITHIN_SECONDS
        while not self._answers():
            if time.monotonic() > deadline or not self.is_running:
                raise AssertionError("redis-server did not start")
            time.sleep(POLL_SECONDS)

    def client(self) -> redis.Redis:
        """Straight to the server, past any proxy."""
        return redis.Redis(
            port=self.port, socket_timeout=5.0, retry=Retry(NoBackoff(), 0), protocol=2
        )

    def reap(self) -> None:
        """Take the end of a killed server."""
        self._process.wait(10)

    def stop(self) -> None:
        if self.is_running:
            self._process.kill()
        self._process.wait(10)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _answers(self) -> bool:
        with self.client() as client:
            try:
                return bool(client.ping())
            except (redis.RedisError, OSError):
                return False
