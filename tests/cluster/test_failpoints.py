"""Failpoints do nothing unless armed, and then exactly what they were armed with."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cluster import failpoints
from cluster.errors import ConfigError
from cluster.failpoints import EXIT_CODE, NAMES, VARIABLE, FailpointError, arm, failpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent.parent
ROOMS = ("baton", "gateway", "prefill_node", "decode_node", "engine", "kv_transfer", "cluster")


@pytest.fixture(autouse=True)
def _disarm() -> Iterator[None]:
    yield
    arm({})


def test_nothing_is_armed_by_default() -> None:
    assert VARIABLE not in os.environ
    assert failpoints.armed_names() == frozenset()
    for name in NAMES:
        failpoint(name)


def test_an_empty_environment_disarms() -> None:
    arm({VARIABLE: "decode.on_frame=raise"})
    arm({})
    failpoint("decode.on_frame")


def test_nothing_shipped_arms_one() -> None:
    shipped = [*ROOT.glob("deploy/**/*"), ROOT / "Makefile"]
    assert not [path for path in shipped if path.is_file() and VARIABLE in path.read_text()]


def test_every_name_is_placed_once_and_every_place_has_a_name() -> None:
    placed = []
    for path in (path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "failpoint":
                assert isinstance(node.args[0], ast.Constant)
                placed.append(str(node.args[0].value))
    assert sorted(placed) == sorted(NAMES)


def test_an_armed_failpoint_raises_its_typed_error_and_no_other_does() -> None:
    arm({VARIABLE: "decode.on_frame=raise"})
    failpoint("decode.before_start")
    for _ in range(2):
        with pytest.raises(FailpointError) as raised:
            failpoint("decode.on_frame")
        assert raised.value.reason == "failpoint"


def test_with_a_hit_it_fires_at_that_one_alone() -> None:
    arm({VARIABLE: " decode.on_frame=raise#3 ; prefill.after_chunk=sleep:0 "})
    failpoint("decode.on_frame")
    failpoint("decode.on_frame")
    with pytest.raises(FailpointError):
        failpoint("decode.on_frame")
    failpoint("decode.on_frame")


def test_with_a_file_it_fires_once_for_each_time_the_file_is_there(tmp_path: Path) -> None:
    shot = tmp_path / "shot"
    arm({VARIABLE: f"decode.on_frame=raise@{shot}"})
    for _ in range(2):
        failpoint("decode.on_frame")
        shot.touch()
        with pytest.raises(FailpointError):
            failpoint("decode.on_frame")
        assert not shot.exists()
        failpoint("decode.on_frame")


def test_sleep_takes_its_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("cluster.failpoints.time.sleep", slept.append)
    arm({VARIABLE: "prefill.after_chunk=sleep:1.5"})
    failpoint("prefill.after_chunk")
    assert slept == [1.5]


def run_armed(action: str) -> subprocess.Popen[str]:
    code = (
        "import os; from cluster.failpoints import arm, failpoint; arm(os.environ); "
        "failpoint('prefill.before_commit'); print('went on')"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, VARIABLE: f"prefill.before_commit={action}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_exit_ends_the_process_and_says_so() -> None:
    process = run_armed("exit")
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (EXIT_CODE, "")
    assert err == f"failpoint prefill.before_commit: exit (pid {process.pid})\n"


def test_stop_stops_the_process_until_it_is_continued() -> None:
    process = run_armed("stop")
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    process.send_signal(18)  # SIGCONT
    out, _ = process.communicate(timeout=20)
    assert out == "went on\n"


@pytest.mark.parametrize(
    "text",
    [
        "decode.on_frame",
        "decode.nowhere=exit",
        "decode.on_frame=explode",
        "decode.on_frame=exit:1",
        "decode.on_frame=sleep",
        "decode.on_frame=sleep:1.2.3",
        "decode.on_frame=exit#0",
        "decode.on_frame=exit;decode.on_frame=stop",
    ],
)
def test_what_cannot_be_understood_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=VARIABLE):
        arm({VARIABLE: text})
    assert failpoints.armed_names() == frozenset()
