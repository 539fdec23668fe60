"""`baton serve` around its processes: up when the gateway sees the nodes, down without a trace."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest

import baton.serve
from baton.child import ChildSpec
from baton.serve import EXIT_NOT_READY, SECTIONS, done_unless_stopped, serve
from cluster.config import load_config
from cluster.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from cluster.config import LoadedConfig

TELL = """
import json, os, signal, sys
def tell(**fact):
    os.write(int(os.environ["BATON_PROGRESS_FD"]), json.dumps(fact).encode() + b"\\n")
"""
NODE = TELL + "tell(event='ready', seconds=0.1)\nsignal.pause()\n"
# Says "not yet" once, as a gateway does that has not seen the nodes.
GATEWAY = (
    TELL
    + """
from http.server import BaseHTTPRequestHandler, HTTPServer
answers = [503, 200]
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(answers.pop(0) if self.path == "/readyz" else 404)
        self.end_headers()
    def log_message(self, *arguments): pass
server = HTTPServer(("127.0.0.1", 0), Handler)
url = f"http://127.0.0.1:{server.server_port}"
tell(event="ready", seconds=0.1, url=url, admin_url="http://127.0.0.1:65000", model="pocket")
server.serve_forever()
"""
)
FAILS = (
    TELL
    + "tell(event='failed', message='there are no weights.')\n"
    + "sys.exit('baton decode: there are no weights.')\n"
)


def spec(name: str, program: str) -> ChildSpec:
    token = {"BATON_ADMIN_TOKEN": "secret"}
    return ChildSpec(name, (name,), token, program=(sys.executable, "-c", program))


@pytest.fixture
def loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> LoadedConfig:
    """With the environment that the test gives, or none."""
    monkeypatch.setenv("HOME", str(tmp_path))
    env: dict[str, str] = getattr(request, "param", {})
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return load_config("baton serve", SECTIONS, [], env, positional="model")


@pytest.fixture
def with_children(
    loaded: LoadedConfig, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., int]]:
    """Run `serve` over these programs; the exit code."""

    def run(*specs: ChildSpec, on_up: Callable[[], None] | None = None) -> int:
        monkeypatch.setattr(baton.serve, "child_specs", lambda *_, **__: list(specs))
        monkeypatch.setattr(baton.serve, "start_redis", lambda *_: None)
        if on_up is not None:
            monkeypatch.setattr(baton.serve, "announce", lambda *_: on_up())

        async def bounded() -> int:
            async with asyncio.timeout(30):
                return await serve(loaded)

        return asyncio.run(bounded())

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_a_cluster_comes_up_and_ctrl_c_takes_it_down(
    with_children: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    code = with_children(spec("decode", NODE), spec("gateway", GATEWAY), on_up=interrupt)
    assert code == 0
    shown = capfd.readouterr().err
    assert "Draining" in shown
    assert shown.rstrip().endswith("Stopped.")


@pytest.mark.parametrize(
    ("loaded", "needs_key"), [({}, False), ({"BATON_API_KEY": "secret"}, True)], indirect=["loaded"]
)
def test_what_works_when_pasted_is_said_once_all_is_ready(
    with_children: Any,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    needs_key: bool,
) -> None:
    announce = baton.serve.announce

    def announce_then_stop(*arguments: Any) -> None:
        announce(*arguments)
        interrupt()

    monkeypatch.setattr(baton.serve, "announce", announce_then_stop)
    assert with_children(spec("decode", NODE), spec("gateway", GATEWAY)) == 0
    said = capfd.readouterr().out
    assert "Baton serves pocket at http://127.0.0.1:" in said
    assert "/v1/chat/completions" in said
    assert "admin nodes --admin-url http://127.0.0.1:" in said
    assert ("Authorization: Bearer YOUR_KEY" in said) == needs_key
    assert ("--num-prompts 50 --api-key YOUR_KEY" in said) == needs_key


@pytest.mark.parametrize(
    ("loaded", "expected"),
    [({}, ["secret\n"]), ({"BATON_ADMIN_TOKEN": "secret"}, [])],
    indirect=["loaded"],
)
def test_a_drawn_admin_token_is_left_while_it_serves_and_a_given_one_is_written_nowhere(
    with_children: Any, tmp_path: Path, expected: list[str]
) -> None:
    left: list[str] = []

    def look() -> None:
        left.extend(path.read_text() for path in tmp_path.rglob("admin-token-*"))
        interrupt()

    assert with_children(spec("decode", NODE), spec("gateway", GATEWAY), on_up=look) == 0
    assert left == expected
    assert not list(tmp_path.rglob("admin-token-*"))


def test_where_the_admin_token_cannot_be_left_it_is_said_and_all_serves(
    with_children: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "baton").write_text("a file in the way")
    assert with_children(spec("decode", NODE), spec("gateway", GATEWAY), on_up=interrupt) == 0
    assert "For this run pass --admin-token secret" in capfd.readouterr().err


def test_a_child_that_cannot_start_ends_all_with_its_message_once(
    with_children: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    assert with_children(spec("prefill", NODE), spec("decode", FAILS)) == EXIT_NOT_READY == 4
    shown = capfd.readouterr().err
    assert "baton serve: decode did not start: there are no weights." in shown
    assert shown.count("no weights") == 1


def test_a_person_who_gives_up_waiting_gets_no_error(
    with_children: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    parent = f"os.kill({os.getpid()}, signal.SIGTERM)\n"
    assert with_children(spec("decode", TELL + parent + "signal.pause()")) == 0
    assert "did not start" not in capfd.readouterr().err


def test_a_gateway_that_never_sees_the_nodes_is_not_ready(
    with_children: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(baton.serve, "MEETING_SECONDS", 0.2)
    blind = GATEWAY.replace("answers = [503, 200]", "answers = [503] * 1000")
    assert with_children(spec("gateway", blind)) == EXIT_NOT_READY
    assert "does not see the nodes" in capfd.readouterr().err


def test_work_that_fails_says_so_and_work_that_is_given_up_is_over() -> None:
    async def fail() -> None:
        raise ConfigError("no")

    async def body() -> None:
        stop = asyncio.Event()
        with pytest.raises(ConfigError):
            await done_unless_stopped(fail(), stop)
        stop.set()
        ended = asyncio.Event()

        async def hang() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        assert not await done_unless_stopped(hang(), stop)
        assert ended.is_set()

    asyncio.run(body())


def test_a_model_that_is_no_folder_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(asyncio, "run", lambda _: pytest.fail("something was started"))
    with pytest.raises(ConfigError, match="no model folder at /no/where"):
        baton.serve.main(["/no/where"])


def test_a_redis_that_does_not_answer_is_refused_before_anything_starts() -> None:
    arguments = ["--redis-url", "redis://:secret@127.0.0.1:1/0"]
    given = load_config("baton serve", SECTIONS, arguments, {}, positional="model")
    with pytest.raises(ConfigError, match="Redis does not answer at redis://") as caught:
        asyncio.run(serve(given))
    assert "secret" not in caught.value.message
