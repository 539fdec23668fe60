"""A real local cluster under test: `baton serve` as a person starts it, in its own processes."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parent.parent.parent
START_SECONDS = 90.0
ADMIN_TOKEN = "e2e-token"


class ClusterFace:
    """What a running cluster says of itself, by the ports of one gateway."""

    base_url: str  # of the public server
    admin_url: str

    def admin(self, path: str, method: str = "GET", body: object = None) -> Any:
        request = urllib.request.Request(
            f"{self.admin_url}/admin/v1/{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {ADMIN_TOKEN}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.load(response)

    def metrics(self) -> str:
        with urllib.request.urlopen(f"{self.base_url}/metrics", timeout=10) as response:
            return str(response.read().decode())

    def nodes(self) -> dict[str, dict[str, Any]]:
        return {node["name"]: node for node in self.admin("nodes")["nodes"]}

    def all_blocks_are_back(self) -> bool:
        """No node holds a block for a sequence or a transfer."""
        return all(
            node["load"]["num_free_blocks"] == node["load"]["num_blocks"]
            and node["load"]["num_transfers"] == 0
            for node in self.nodes().values()
        )


class ClusterProcess(ClusterFace):
    """`baton serve ARGS` with free ports. `url` ends in /v1; `stop` is Ctrl-C."""

    def __init__(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.lines: list[str] = []
        self._found: queue.Queue[re.Match[str] | None] = queue.Queue()
        command = [sys.executable, "-m", "baton", "serve", "--port", "0", "--admin-port", "0"]
        self._process = subprocess.Popen(
            [*command, "--admin-token", ADMIN_TOKEN, *arguments],
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        match = self._found.get(timeout=START_SECONDS)
        if match is None:
            raise AssertionError("baton serve did not start:\n" + "\n".join(self.lines))
        self.model, self.url, self.admin_url = match.groups()
        self.base_url = self.url.removesuffix("/v1")

    @property
    def pid(self) -> int:
        return self._process.pid

    def _read(self) -> None:
        pattern = re.compile(r"Baton serves (\S+) at (\S+)\s+\(admin: (\S+)\)")
        for line in self._process.stdout or ():
            self.lines.append(line.rstrip())
            if match := pattern.search(line):
                self._found.put(match)
        self._found.put(None)

    def child(self, name: str) -> int:
        """The pid of the process that runs the node or program `name` ("gateway", "redis") now."""
        for pid in children_of(self.pid):
            words = command_line(pid)
            is_redis = "redis-server" in words[0] if words else False
            if name in words or (name == "redis" and is_redis):
                return pid
        raise LookupError(name)

    def kill(self, name: str) -> None:
        os.kill(self.child(name), signal.SIGKILL)

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        if self._process.poll() is None:
            self._process.send_signal(number)
        code = self._process.wait(60)
        self._reader.join(10)
        if self._process.stdout is not None:
            self._process.stdout.close()
        return code


def children_of(pid: int) -> list[int]:
    """Of all threads of the process."""
    texts = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(word) for text in texts for word in text.split()]


def command_line(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        return []


def eventually(condition: Callable[[], object], seconds: float = 15.0) -> None:
    """Wait until `condition` holds; heartbeats carry what it asks for, so it is polled."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("the condition did not hold in time")
        time.sleep(0.1)
