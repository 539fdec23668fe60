"""The program as an operator starts it: it serves without Redis, and ends when told to."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import httpx
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.e2e
START_SECONDS = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture
def start(
    model_folder: Path, tmp_path: Path
) -> Iterator[Callable[..., tuple[subprocess.Popen[str], str]]]:
    home = {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": ""}  # not that of who runs the tests
    started: list[subprocess.Popen[str]] = []

    def begin(*arguments: str) -> tuple[subprocess.Popen[str], str]:
        port = free_port()
        command = [sys.executable, "-m", "gateway", str(model_folder), "--port", str(port)]
        command += ["--admin-port", "0", "--redis-url", f"redis://127.0.0.1:{free_port()}/0"]
        process = subprocess.Popen(
            [*command, *arguments], stderr=subprocess.PIPE, text=True, env=os.environ | home
        )
        started.append(process)
        return process, f"http://127.0.0.1:{port}"

    yield begin
    for process in started:
        process.kill()
        process.communicate(timeout=20)


def wait_until_it_lives(url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            assert httpx.get(f"{url}/livez").status_code == 200
            return
        except httpx.TransportError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_without_redis_it_lives_and_refuses_in_words(
    start: Callable[..., tuple[subprocess.Popen[str], str]],
) -> None:
    process, url = start()
    wait_until_it_lives(url)
    assert httpx.get(f"{url}/readyz").status_code == 503
    body = {"prompt": "one", "max_tokens": 1}
    refused = httpx.post(f"{url}/v1/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_capacity")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "Traceback" not in errors
    assert errors.count("no BATON_ADMIN_TOKEN was given") == 1


def test_a_busy_port_is_one_clear_line(
    start: Callable[..., tuple[subprocess.Popen[str], str]],
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process, _ = start("--port", str(taken.getsockname()[1]))
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 3
    last = errors.strip().splitlines()[-1]
    assert last.startswith("baton gateway: cannot listen on")
    assert last.endswith("--port takes another port, 0 any free one.")
    assert "Traceback" not in errors


def test_a_port_that_both_have_bound_is_one_clear_line_of_who_listens_last(
    start: Callable[..., tuple[subprocess.Popen[str], str]],
) -> None:
    """Of two gateways that are started together, or of one that is told one port twice."""
    port = str(free_port())
    process, _ = start("--port", port, "--admin-port", port)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 3
    assert errors.strip().splitlines()[-1] == (
        f"baton gateway: cannot listen on 127.0.0.1:{port}: Address already in use. "
        "--port takes another port, 0 any free one."
    )
    assert "Traceback" not in errors
