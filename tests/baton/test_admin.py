"""`baton admin` against a real HTTP server that answers as the admin API does."""

from __future__ import annotations

import json
import socket
import stat
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from baton.admin import EXIT_NOT_READY, EXIT_REFUSED, main
from baton.admin_client import local_token
from baton.admin_tables import NODES, render_rows, shown
from cluster.errors import ConfigError, UsageError
from gateway.admin.token_file import (
    admin_token_path,
    left_admin_token,
    read_admin_token,
    write_admin_token,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NODE = {
    "name": "decode-0",
    "incarnation": 2**62 + 1,
    "role": "decode",
    "state": "cordoned",
    "is_connected": True,
    "model": "pocket",
    "load": {
        "num_running": 3,
        "num_waiting": 1,
        "queued_tokens": 77,
        "num_blocks": 200,
        "num_free_blocks": 150,
        "num_transfers": 2,
    },
    "grpc_address": "127.0.0.1:9101",
    "transports": ["shm", "tcp"],
    "age_seconds": 0.44,
}


@dataclass
class AdminServer:
    """Answers by (method, path); remembers what it was sent."""

    answers: dict[tuple[str, str], tuple[int, Any]] = field(default_factory=dict)
    token: str | None = None
    seen: list[tuple[str, str, Any]] = field(default_factory=list)
    tokens_seen: list[str | None] = field(default_factory=list)
    url: str = ""
    port: int = 0

    def answer(self, method: str, path: str, body: Any, token: str | None) -> tuple[int, Any]:
        self.seen.append((method, path, body))
        self.tokens_seen.append(token)
        if self.token is not None and token != f"Bearer {self.token}":
            return 401, {"error": {"message": "no", "code": "invalid_api_key"}}
        not_found = {"error": {"message": f"There is no {path}.", "code": "not_found"}}
        return self.answers.get((method, path), (404, not_found))


@pytest.fixture
def server() -> Iterator[AdminServer]:
    admin = AdminServer()

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            token = self.headers.get("Authorization")
            status, document = admin.answer(self.command, self.path, body, token)
            if status == 307:
                self.send_response(status)
                self.send_header("Location", document)
                self.end_headers()
                return
            text = document if isinstance(document, bytes) else json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PATCH = handle_any

        def log_message(self, format: str, *arguments: Any) -> None:
            """Quiet."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    admin.port = http.server_address[1]
    admin.url = f"http://127.0.0.1:{admin.port}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield admin
    http.shutdown()
    http.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_RUNTIME_DIR", "BATON_ADMIN_URL", "BATON_ADMIN_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # must not be used


@pytest.fixture
def admin(server: AdminServer) -> Callable[..., int]:
    return lambda *arguments: main([*arguments, "--admin-url", server.url])


def test_nodes_are_shown_with_role_state_and_load(
    server: AdminServer, admin: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers["GET", "/admin/v1/nodes"] = 200, {"nodes": [NODE]}
    assert admin("nodes") == 0
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split()[:3] == ["NODE", "ROLE", "STATE"]
    assert " ".join(row.split()) == (
        "decode-0 decode cordoned up pocket 3 1 77 25% 2 shm,tcp 127.0.0.1:9101 0.4s"
    )


def test_json_output_is_the_answer_of_the_api(
    server: AdminServer, admin: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers["GET", "/admin/v1/nodes"] = 200, {"nodes": [NODE]}
    assert admin("nodes", "--output", "json") == 0
    assert json.loads(capsys.readouterr().out) == {"nodes": [NODE]}


def test_a_terminal_gets_a_table_with_colours() -> None:
    console = Console(force_terminal=True, width=200, color_system="standard")
    with console.capture() as captured:
        render_rows([NODE], NODES, empty="none", console=console)
    assert "\x1b[33mcordoned" in captured.get()


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_a_narrow_terminal_gets_whole_columns_and_hears_which_are_missing(width: int) -> None:
    console = Console(force_terminal=True, width=width, color_system=None)
    with console.capture() as captured:
        render_rows([NODE, NODE | {"name": "prefill-0"}], NODES, empty="none", console=console)
    table, _, told = captured.get().partition("Too narrow for ")
    lines = table.splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) <= max(width, 66)  # 66: what is never left out
    assert "\N{HORIZONTAL ELLIPSIS}" not in table
    for column in NODES:
        assert (column.heading in lines[0]) != (column.heading in " ".join(told.split()))


def test_what_the_server_sends_cannot_steer_the_terminal() -> None:
    assert "\x1b" not in shown("evil\x1b[2J\nname")
    assert "\n" not in shown("evil\x1b[2J\nname")
    console = Console(force_terminal=True, width=300)
    with console.capture() as captured:
        render_rows([NODE | {"name": "[red]x[/red]"}], NODES, empty="none", console=console)
    assert "[red]x[/red]" in captured.get()


@pytest.mark.parametrize("arguments", [("nodes", "-o", "json"), ("cordon", "x"), ("nodes",)])
def test_neither_json_nor_a_refusal_can_steer_the_terminal(
    server: AdminServer,
    admin: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
) -> None:
    evil = "\x1b[2J\x9b31m\u202e\U000e0001 caf\u00e9"
    document = {"nodes": [NODE | {"name": evil}]}
    server.answers["GET", "/admin/v1/nodes"] = 200, document
    refusal = {"message": evil, "param": "name"}
    server.answers["POST", "/admin/v1/nodes/x:cordon"] = 404, {"error": refusal}
    admin(*arguments)
    told = capsys.readouterr()
    assert not set(told.out + told.err) & set("\x1b\x9b\u202e\U000e0001")
    assert "caf\u00e9" in told.out + told.err
    if "json" in arguments:
        assert json.loads(told.out) == document


def test_an_empty_list_is_said_in_words(
    server: AdminServer, admin: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers["GET", "/admin/v1/leases"] = 200, {"leases": []}
    assert admin("leases") == 0
    assert capsys.readouterr().out == "No leases.\n"


@pytest.mark.parametrize(("other", "is_told"), [("prefill", True), ("decode", False)])
def test_a_node_without_a_partner_is_told_below_the_table(
    server: AdminServer,
    admin: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    other: str,
    is_told: bool,
) -> None:
    nodes = [NODE | {"num_partners": 0}, NODE | {"name": "p", "role": other, "num_partners": 1}]
    server.answers["GET", "/admin/v1/nodes"] = 200, {"nodes": nodes}
    assert admin("nodes") == 0
    told = capsys.readouterr().err
    assert ("decode-0 can exchange KV with no node of the other role" in told) == is_told
    assert "baton admin: p " not in told


def test_a_pair_that_is_held_back_is_told_once_below_the_table(
    server: AdminServer, admin: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    held = {"prefill_node": "p", "decode_node": "decode-0", "reason": "link_lost"}
    pairs = [held | {"tried_again_in_seconds": 3.8}]
    nodes = [NODE | {"name": "p", "role": "prefill"}, dict(NODE)]
    for seconds, told in ((3.8, "in 4 s"), (0.0, "with the next request that would go there")):
        pairs[0]["tried_again_in_seconds"] = seconds
        answer = {"nodes": [node | {"pairs_held_back": pairs} for node in nodes]}
        server.answers["GET", "/admin/v1/nodes"] = 200, answer
        assert admin("nodes") == 0
        assert capsys.readouterr().err == (
            "baton admin: p > decode-0 is held back: hand-offs between them fail (link_lost). "
            f"It is tried again {told}.\n"
        )


def test_nodes_that_did_not_answer_are_named(
    server: AdminServer, admin: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    lease = {"id": "ab12", "node": "decode-0", "peer": "prefill-0", "state": "receiving"}
    answer = {"leases": [lease | {"num_blocks": 4}], "unreachable": ["decode-1"]}
    server.answers["GET", "/admin/v1/leases"] = 200, answer
    assert admin("leases") == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1].split() == [
        "ab12",
        "decode-0",
        "receiving",
        "prefill-0",
        "4",
        "-",
    ]
    assert captured.err == "baton admin: decode-1 did not answer; its leases are missing.\n"


RUNNING = {
    "id": "r-1",
    "state": "running",
    "model": "pocket",
    "prefill_node": "prefill-0",
    "decode_node": "decode-0",
    "prompt_tokens": 12,
    "output_tokens": 3,
    "ttft_seconds": 0.0413,
    "age_seconds": 2.04,
    "num_retries": 1,
}
FAILED = {
    "id": "r-2",
    "ended_seconds_ago": 61.2,
    "status": 503,
    "error": "kv_load_failed",
    "reason": "digest_mismatch",
    "nodes": "prefill-0 > decode-0, prefill-1 > decode-0",
    "route": "chat",
    "model": "pocket",
    "prompt_tokens": 12,
    "output_tokens": 0,
    "ttft_seconds": None,
    "duration_seconds": 1.5,
    "num_retries": 1,
}


def test_running_requests_are_shown_with_their_time_to_first_token(
    server: AdminServer, admin: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    waiting = {**RUNNING, "ttft_seconds": None, "state": "waiting"}
    server.answers["GET", "/admin/v1/requests"] = 200, {"requests": [RUNNING, waiting]}
    assert admin("requests") == 0
    heading, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    shown_as = [dict(zip(heading, row, strict=True)) for row in rows]
    assert [each["TTFT"] for each in shown_as] == ["41ms", "-"]
    assert (shown_as[0]["AGE"], shown_as[0]["OUTPUT"], shown_as[0]["RETRIES"]) == ("2.0s", "3", "1")


def test_ended_requests_are_shown_with_why_they_failed(
    server: AdminServer, admin: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    well = {**FAILED, "status": 200, "error": None, "reason": None, "finish": "stop, length"}
    path = "/admin/v1/requests/ended?last=5&failed=true"
    server.answers["GET", path] = 200, {"requests": [FAILED, well]}
    assert admin("requests", "--failed", "--last", "5") == 0
    heading, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    failed, good = (dict(zip(heading, row, strict=True)) for row in rows)
    assert (failed["STATUS"], failed["HOW"], failed["REASON"]) == (
        *("503", "kv_load_failed", "digest_mismatch"),
    )
    assert failed["NODES"] == "prefill-0>decode-0,prefill-1>decode-0"
    assert (failed["AGO"], failed["TOOK"], failed["TTFT"]) == ("61.2s", "1.5s", "-")
    assert (good["HOW"], good["REASON"]) == ("stop,length", "-")


def test_an_id_finds_what_runs_else_how_it_ended(
    server: AdminServer, admin: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    running = "/admin/v1/requests?id=r%2F1"
    server.answers["GET", running] = 200, {"requests": [RUNNING]}
    assert admin("requests", "--id", "r/1") == 0
    assert "AGE" in capsys.readouterr().out
    assert len(server.seen) == 1
    server.answers["GET", running] = 200, {"requests": []}
    server.answers["GET", "/admin/v1/requests/ended?id=r%2F1&last=20"] = 200, {"requests": [FAILED]}
    assert admin("requests", "--id", "r/1") == 0
    assert "kv_load_failed" in capsys.readouterr().out
    server.answers["GET", "/admin/v1/requests/ended?id=r%2F1&last=20"] = 200, {"requests": []}
    assert admin("requests", "--id", "r/1") == 0
    assert capsys.readouterr().out.startswith("No request with this id runs")


def test_no_request_is_said_in_words(
    server: AdminServer, admin: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers["GET", "/admin/v1/requests"] = 200, {"requests": []}
    server.answers["GET", "/admin/v1/requests/ended?last=20"] = 200, {"requests": []}
    assert admin("requests") == admin("requests", "--ended") == 0
    assert capsys.readouterr().out.splitlines() == [
        "No requests run.",
        "No request that is remembered has ended so.",
    ]


def test_an_action_says_the_state_it_led_to(
    server: AdminServer, admin: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    answer = {"name": "decode-0", "state": "draining"}
    server.answers["POST", "/admin/v1/nodes/decode-0:drain"] = 200, answer
    assert admin("drain", "decode-0") == 0
    assert capsys.readouterr().out == "drain decode-0: draining\n"


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        (("cordon", "decode-0"), "/admin/v1/nodes/decode-0:cordon"),
        (("uncordon", "decode-0"), "/admin/v1/nodes/decode-0:uncordon"),
        (("drain", "a b"), "/admin/v1/nodes/a%20b:drain"),
        (("cancel", "chatcmpl-1"), "/admin/v1/requests/chatcmpl-1:cancel"),
    ],
)
def test_actions_post_to_the_thing_they_name(
    server: AdminServer, admin: Callable[..., int], arguments: tuple[str, ...], path: str
) -> None:
    server.answers["POST", path] = 200, {}
    assert admin(*arguments) == 0
    assert server.seen == [("POST", path, {})]


@pytest.mark.parametrize(
    ("states", "code", "told"),
    [
        (["draining", "draining", "drained"], 0, "drain d: drained"),
        (["draining", "lost", "draining", "drained"], 0, "drain d: drained"),
        (["draining", "lost", None], 0, "drain d: gone"),
        (["draining", "ready"], EXIT_REFUSED, "d is ready again"),
    ],
)
def test_a_drain_can_be_waited_for(
    server: AdminServer,
    admin: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    states: list[str | None],
    code: int,
    told: str,
) -> None:
    left = list(states)

    def show() -> None:
        nodes = [{"name": "d", "state": left[0]}] if left[0] else []
        server.answers["GET", "/admin/v1/nodes"] = 200, {"nodes": nodes}

    def polled(_: float) -> None:
        left.pop(0)
        show()

    show()
    server.answers["POST", "/admin/v1/nodes/d:drain"] = 200, {"name": "d", "state": "draining"}
    monkeypatch.setattr("baton.admin_drain.time.sleep", polled)
    assert admin("drain", "d", "--wait") == code
    captured = capsys.readouterr()
    assert told in captured.out + captured.err
    assert len(left) == 1
    assert admin("drain", "d") == 0
    assert capsys.readouterr().out == "drain d: draining\n", "unasked it does not wait"


@pytest.mark.parametrize(
    ("facts", "left"),
    [
        ({"load": {"num_running": 3, "num_waiting": 0}}, "3 running"),
        ({"awaited_gateways": ["gateway-1"]}, "gateway-1 yet to settle"),
        ({}, "nothing that its gateway knows of"),
    ],
)
def test_a_drain_that_does_not_end_in_time_is_told_with_what_is_left_and_goes_on(
    server: AdminServer,
    admin: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    facts: dict[str, Any],
    left: str,
) -> None:
    node = {"name": "d", "state": "draining", **facts}
    server.answers["GET", "/admin/v1/nodes"] = 200, {"nodes": [node]}
    server.answers["POST", "/admin/v1/nodes/d:drain"] = 200, {"name": "d", "state": "draining"}
    assert admin("drain", "d", "--wait", "--timeout", "0") == EXIT_REFUSED
    assert capsys.readouterr().err == (
        f"baton admin: d is draining after 0 s, with {left}. It goes on; `baton admin uncordon d` "
        "gives it work again, SIGTERM ends it within its --shutdown-timeout.\n"
    )


@pytest.mark.parametrize(
    "arguments", [("--timeout", "5"), ("--wait", "--timeout", "-1"), ("--wait", "--timeout", "nan")]
)
def test_a_timeout_that_makes_no_sense_is_refused(
    admin: Callable[..., int], arguments: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError, match="--timeout"):
        admin("drain", "d", *arguments)


def test_whom_a_draining_node_waits_for_is_told_below_the_table(
    server: AdminServer, admin: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = [NODE | {"awaited_gateways": ["gateway-1"]}, NODE | {"name": "other"}]
    server.answers["GET", "/admin/v1/nodes"] = 200, {"nodes": nodes}
    assert admin("nodes") == 0
    assert capsys.readouterr().err == (
        "baton admin: decode-0 drains, and waits until nothing is on its way there any more from "
        "gateway-1.\n"
    )


def test_the_prefix_cache_of_every_node_is_reset(
    server: AdminServer, admin: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers["POST", "/admin/v1/prefix-cache:reset"] = 200, {"nodes": ["p", "d"]}
    assert admin("reset-prefix-cache") == 0
    assert capsys.readouterr().out == "reset on p,d\n"


def test_policy_settings_are_typed_and_sent_together(
    server: AdminServer, admin: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    server.answers["PATCH", "/admin/v1/policy"] = 200, {"b": "recompute", "a": 5}
    assert admin("policy", "set", "a=5", "b=recompute", "c-x=true", "d=null") == 0
    changes = {"a": 5, "b": "recompute", "c_x": True, "d": None}
    assert server.seen == [("PATCH", "/admin/v1/policy", changes)]
    assert capsys.readouterr().out == "a = 5\nb = recompute\n"


def test_a_setting_too_deep_for_json_is_text(
    server: AdminServer, admin: Callable[..., int]
) -> None:
    deep = "[" * 10_000
    admin("policy", "set", f"a={deep}")
    assert server.seen == [("PATCH", "/admin/v1/policy", {"a": deep})]


def test_a_command_of_two_words_is_named_as_it_was_typed(admin: Callable[..., int]) -> None:
    with pytest.raises(UsageError, match="no command 'policy show'; there are: policy get, policy"):
        admin("policy", "show")


def test_a_setting_without_a_value_is_a_usage_error(
    server: AdminServer, admin: Callable[..., int]
) -> None:
    with pytest.raises(UsageError, match="'a' is not KEY=VALUE"):
        admin("policy", "set", "a")
    with pytest.raises(UsageError, match="SETTING"):
        admin("policy", "set")
    assert server.seen == []


def test_errors_are_one_line_that_says_what_to_do(
    server: AdminServer, admin: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    unknown = {"message": "There is no node ghost.", "param": "name"}
    server.answers["POST", "/admin/v1/nodes/ghost:cordon"] = 404, {"error": unknown}
    assert admin("cordon", "ghost") == EXIT_REFUSED
    assert capsys.readouterr().err == "baton admin: There is no node ghost.\n"
    server.token = "right"
    assert admin("nodes") == EXIT_REFUSED
    assert "wants a token; pass --admin-token" in capsys.readouterr().err
    assert admin("nodes", "--admin-token", "wrong") == EXIT_REFUSED
    assert "does not accept this token" in capsys.readouterr().err


def test_a_refusal_is_shown_in_the_words_of_the_server(
    server: AdminServer, admin: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    error = {"error": {"message": "x must be positive.", "code": "invalid_value"}}
    server.answers["PATCH", "/admin/v1/policy"] = 400, error
    assert admin("policy", "set", "x=-1") == EXIT_REFUSED
    assert capsys.readouterr().err == "baton admin: x must be positive.\n"


def test_a_public_port_is_told_from_an_admin_port(
    server: AdminServer, admin: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert admin("nodes") == EXIT_REFUSED  # the server of the test knows no route
    told = capsys.readouterr().err
    assert f"{server.url} has no /admin/v1/nodes; is it the public port?" in told
    assert "--admin-port, 8001" in told


def test_an_address_where_nothing_listens_is_not_ready(
    server: AdminServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["nodes", "--admin-url", "http://127.0.0.1:1"]) == EXIT_NOT_READY
    assert "No admin API answers at http://127.0.0.1:1" in capsys.readouterr().err


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"nodes": 3}'])
def test_another_server_at_that_address_is_recognised(
    server: AdminServer,
    admin: Callable[..., int],
    body: bytes,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.answers["GET", "/admin/v1/nodes"] = 200, body
    assert admin("nodes") == EXIT_NOT_READY
    assert "not as a Baton admin API" in capsys.readouterr().err


@pytest.mark.parametrize(
    "answer",
    [
        b"\0\0\x12\x04\0\0\0\0\0",  # as the gRPC port of a node does
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 100_000,
    ],
)
def test_who_does_not_speak_http_or_breaks_off_is_no_admin_api(
    answer: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _nodes_of_who_says(answer) == EXIT_NOT_READY
    assert "not as a Baton admin API" in capsys.readouterr().err


def test_a_refusal_that_breaks_off_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    answer = b"HTTP/1.1 500 Broken\r\nContent-Length: 1000\r\n\r\nabc"
    assert _nodes_of_who_says(answer) == EXIT_REFUSED
    assert "Broken (HTTP 500)" in capsys.readouterr().err


def _nodes_of_who_says(answer: bytes) -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def say() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=say)
        thread.start()
        code = main(["nodes", "--admin-url", f"http://127.0.0.1:{listener.getsockname()[1]}"])
        thread.join()
        return code


@pytest.mark.parametrize(
    "url",
    [
        *("127.0.0.1:8001", "http://127.0.0.1:abc", "http://127.0.0.1:99999", "http://[::1"),
        *("http://a b:1", "http://127.0.0.1:1/a\nb", "http://user:secret@127.0.0.1:1"),
    ],
)
def test_a_url_that_is_none_is_a_usage_error(url: str) -> None:
    with pytest.raises(UsageError, match="--admin-url must be"):
        main(["nodes", "--admin-url", url])


def test_a_host_that_cannot_be_one_is_not_ready() -> None:
    assert main(["nodes", "--admin-url", "http://a..b:1"]) == EXIT_NOT_READY


@pytest.mark.parametrize("token", ["a\nb", "t\u20ac"])
def test_a_token_that_no_header_can_carry_is_a_usage_error(
    server: AdminServer, admin: Callable[..., int], token: str
) -> None:
    with pytest.raises(UsageError, match="--admin-token must be"):
        admin("nodes", "--admin-token", token)


def test_a_name_that_is_no_text_is_passed_on_as_it_is(
    server: AdminServer, admin: Callable[..., int]
) -> None:
    assert admin("drain", "a\udcff") == EXIT_REFUSED
    assert server.seen[-1][:2] == ("POST", "/admin/v1/nodes/a%FF:drain")


@pytest.mark.parametrize("name", ["", "../../x"])
def test_a_name_that_no_node_can_have_is_asked_for_nowhere(
    server: AdminServer, admin: Callable[..., int], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert admin("cordon", name) == EXIT_REFUSED
    assert capsys.readouterr().err == f"baton admin: There is no node {name!r}.\n"
    assert server.seen == []


def test_the_token_of_a_local_cluster_is_found_by_its_address(
    server: AdminServer, admin: Callable[..., int]
) -> None:
    server.token = "left-by-serve"
    server.answers["GET", "/admin/v1/nodes"] = 200, {"nodes": []}
    with left_admin_token("127.0.0.1", server.port, "left-by-serve"):
        assert admin("nodes") == 0
    assert admin("nodes") == EXIT_REFUSED


def test_a_given_token_beats_the_one_that_was_left(
    server: AdminServer, admin: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_admin_token("127.0.0.1", server.port, "left")
    server.answers["GET", "/admin/v1/nodes"] = 200, {"nodes": []}
    monkeypatch.setenv("BATON_ADMIN_TOKEN", "from-environment")
    admin("nodes")
    admin("nodes", "--admin-token", "from-flag")
    assert server.tokens_seen == ["Bearer from-environment", "Bearer from-flag"]


def test_the_local_token_is_never_meant_for_another_host() -> None:
    write_admin_token("", 8001, "secret")
    assert local_token("127.0.0.1", 8001) == "secret"
    assert local_token("::1", 8001) == "secret"
    assert local_token("localhost", 8001) == "secret"
    assert local_token("example.com", 8001) is None
    assert local_token("10.0.0.5", 8001) is None


def test_redirects_do_not_carry_the_token_elsewhere(
    server: AdminServer, admin: Callable[..., int]
) -> None:
    server.answers["GET", "/admin/v1/nodes"] = 307, f"{server.url}/stolen"
    assert admin("nodes", "--admin-token", "t") == EXIT_REFUSED
    assert [path for _, path, _ in server.seen] == ["/admin/v1/nodes"]


def test_only_the_owner_can_read_the_token_file(tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path / "home")}
    path = write_admin_token("127.0.0.1", 8001, "one", env)
    path.chmod(0o644)
    write_admin_token("127.0.0.1", 8001, "two", env)
    assert read_admin_token("127.0.0.1", 8001, env) == "two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_link_in_the_place_of_the_token_file_is_replaced_not_followed(tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path)}
    path = write_admin_token("127.0.0.1", 8001, "one", env)
    elsewhere = tmp_path / "elsewhere"
    path.unlink()
    path.symlink_to(elsewhere)
    write_admin_token("127.0.0.1", 8001, "two", env)
    assert not elsewhere.exists()
    assert not path.is_symlink()


def test_the_runtime_folder_is_preferred_when_there_is_one(tmp_path: Path) -> None:
    env = {"HOME": "/home/me", "XDG_RUNTIME_DIR": str(tmp_path)}
    assert (
        admin_token_path("127.0.0.1", 8001, env)
        == tmp_path / "baton" / "admin-token-127.0.0.1-8001"
    )
    gone = env | {"XDG_RUNTIME_DIR": str(tmp_path / "gone")}
    assert admin_token_path("127.0.0.1", 8002, gone) == Path(
        "/home/me/.baton/admin-token-127.0.0.1-8002"
    )


def test_a_folder_that_cannot_be_written_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / ".baton").write_text("a file in the way")
    with pytest.raises(ConfigError, match="cannot write the admin token"):
        write_admin_token("127.0.0.1", 8001, "x", {"HOME": str(tmp_path)})
