"""A gateway that was given no admin token can be steered by its user, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from baton.admin import main as admin
from cluster.errors import ConfigError
from gateway.admin.token_file import (
    admin_token_path,
    left_admin_token,
    read_admin_token,
    write_admin_token,
)
from gateway.server import drawn_token_told

if TYPE_CHECKING:
    from collections.abc import Iterator

HOST, PORT = "127.0.0.1", 8001
POCKET_MODEL = Path(__file__).parents[2] / "baton" / "pocket_model"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_one_that_was_drawn_is_there_until_the_end_and_in_no_log(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"), drawn_token_told("drawn", HOST, PORT):
        assert read_admin_token(HOST, PORT) == "drawn"
    assert not admin_token_path(HOST, PORT).exists()
    assert str(admin_token_path(HOST, PORT)) in caplog.text
    assert "is drawn" not in caplog.text


def test_where_it_cannot_be_left_the_log_has_it(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (home / ".baton").write_text("a file in the way")
    with drawn_token_told("drawn", HOST, PORT):
        pass
    assert "For this run it is drawn" in caplog.text


def test_one_that_was_given_is_written_nowhere(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"), drawn_token_told(None, HOST, PORT):
        assert not admin_token_path(HOST, PORT).exists()
    assert caplog.text == ""


def test_who_reads_it_while_it_is_replaced_has_one_of_both(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_admin_token(HOST, PORT, "old")
    replace, read = os.replace, []

    def replace_between_reads(source: str, target: Path) -> None:
        read.append(read_admin_token(HOST, PORT))
        replace(source, target)
        read.append(read_admin_token(HOST, PORT))

    monkeypatch.setattr(os, "replace", replace_between_reads)
    write_admin_token(HOST, PORT, "new")
    assert read == ["old", "new"]
    assert [path.name for path in home.rglob("*") if path.is_file()] == [
        f"admin-token-{HOST}-{PORT}"
    ]


def test_nothing_is_left_beside_one_that_cannot_be_replaced(home: Path) -> None:
    admin_token_path(HOST, PORT).mkdir(parents=True)
    with pytest.raises(ConfigError, match="cannot write the admin token"):
        write_admin_token(HOST, PORT, "new")
    assert not [path for path in home.rglob("*") if path.is_file()]


def test_who_has_taken_the_port_since_keeps_its_token(home: Path) -> None:
    with left_admin_token(HOST, PORT, "mine"):
        write_admin_token(HOST, PORT, "another's")
    assert read_admin_token(HOST, PORT) == "another's"


def test_each_address_of_a_port_has_a_token_of_its_own(home: Path) -> None:
    with left_admin_token("127.0.0.1", PORT, "one"), left_admin_token("127.0.0.2", PORT, "two"):
        found = [read_admin_token(f"127.0.0.{number}", PORT) for number in (1, 2, 3)]
    assert found == ["one", "two", None]
    assert read_admin_token("127.0.0.1", PORT) is None


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_who_listens_everywhere_is_found_at_every_address(home: Path, host: str) -> None:
    with left_admin_token(host, PORT, "mine"):
        for address in ("127.0.0.1", "127.0.0.2", "localhost", "::1", "0:0:0:0:0:0:0:1"):
            assert read_admin_token(address, PORT) == "mine"
    assert read_admin_token("127.0.0.1", PORT) is None


def test_a_name_and_an_address_of_it_are_the_same(home: Path) -> None:
    with left_admin_token("localhost", PORT, "mine"):
        found = [read_admin_token(address, PORT) for address in ("127.0.0.1", "::1", "localhost")]
    assert found in (["mine", None, "mine"], [None, "mine", "mine"])


@pytest.mark.parametrize(("killed", "next_one"), [("127.0.0.1", ""), ("", "127.0.0.1")])
def test_what_one_left_who_was_killed_hides_no_token_of_who_has_its_port_now(
    home: Path, killed: str, next_one: str
) -> None:
    write_admin_token(killed, PORT, "of one that was killed")
    write_admin_token(killed, PORT + 1, "of another port")
    with left_admin_token(next_one, PORT, "now"):
        assert read_admin_token("127.0.0.1", PORT) == "now"
        assert read_admin_token("127.0.0.1", PORT + 1) == "of another port"
    assert read_admin_token("127.0.0.1", PORT) is None


@pytest.fixture
def lone_gateway(home: Path) -> Iterator[subprocess.Popen[str]]:
    """As one types it, with no Redis there."""
    command = [sys.executable, "-m", "baton", "gateway", str(POCKET_MODEL), "--port", "0"]
    command += ["--admin-port", "0", "--redis-url", "redis://127.0.0.1:1"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("BATON_")}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.timeout(60)
def test_baton_admin_steers_a_gateway_that_was_started_alone(
    lone_gateway: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert lone_gateway.stderr is not None
    told = next(line for line in lone_gateway.stderr if "where baton admin finds it" in line)
    found = re.search(r"one is in (\S+),", told)
    assert found is not None
    path = Path(found[1])
    port = path.name.removeprefix(f"admin-token-{HOST}-")
    assert admin(["nodes", "--admin-url", f"http://127.0.0.1:{port}"]) == 0
    assert capsys.readouterr().out == "No nodes.\n"
    lone_gateway.send_signal(signal.SIGTERM)
    lone_gateway.stderr.read()
    assert lone_gateway.wait() == 0
    assert not path.exists()
