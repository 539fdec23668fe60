"""Start-up reports: phases in order, on the pipe of a supervisor or as log lines."""

from __future__ import annotations

import json
import logging
import os
import socket
from typing import TYPE_CHECKING

import pytest

from cluster.errors import ConfigError
from cluster.startup import (
    PROGRESS_FD_VARIABLE,
    StartupReport,
    log_sink,
    pipe_sink,
    sink_from_environment,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from cluster.startup import Fact


class Recorder:
    def __init__(self) -> None:
        self.facts: list[dict[str, Fact]] = []
        self.now = 10.0

    def sink(self, fact: Mapping[str, Fact]) -> None:
        self.facts.append(dict(fact))

    def clock(self) -> float:
        return self.now

    def report(self) -> StartupReport:
        return StartupReport(self.sink, self.clock)


def test_phases_are_told_and_timed_and_ready_counts_from_the_start() -> None:
    recorder = Recorder()
    report = recorder.report()
    with report.phase("load weights", total=2) as phase:
        phase.advance(1)
        phase.advance(1)
        recorder.now += 1.5
    recorder.now += 0.5
    report.ready(grpc="127.0.0.1:9")
    assert recorder.facts[0] == {"event": "begin", "phase": "load weights", "total": 2}
    assert recorder.facts[-2] == {"event": "end", "phase": "load weights", "seconds": 1.5}
    assert recorder.facts[-1] == {"event": "ready", "seconds": 2.0, "grpc": "127.0.0.1:9"}
    advances = [fact["done"] for fact in recorder.facts if fact["event"] == "advance"]
    assert advances[-1] == 2, "the last step is always told"


def test_many_small_steps_are_told_now_and_then_only() -> None:
    recorder = Recorder()
    with recorder.report().phase("load weights", total=10_000) as phase:
        for _ in range(10_000):
            phase.advance(1)
    advances = [fact for fact in recorder.facts if fact["event"] == "advance"]
    assert len(advances) < 1_000


def test_a_phase_that_fails_never_ends() -> None:
    recorder = Recorder()
    with pytest.raises(ConfigError), recorder.report().phase("load weights"):
        raise ConfigError("no weights")
    assert [fact["event"] for fact in recorder.facts] == ["begin"]


def test_a_phase_that_was_given_up_never_ends() -> None:
    recorder = Recorder()
    with recorder.report().phase("wait for nodes") as phase:
        phase.is_given_up = True
    assert [fact["event"] for fact in recorder.facts] == ["begin"]


def test_the_pipe_that_a_supervisor_names_gets_one_json_line_per_fact() -> None:
    reader, writer = os.pipe()
    report = StartupReport(sink_from_environment({PROGRESS_FD_VARIABLE: str(writer)}))
    report.failed("port taken")
    os.close(writer)
    with os.fdopen(reader) as stream:
        assert json.loads(stream.read()) == {"event": "failed", "message": "port taken"}


@pytest.mark.parametrize("value", ["nine", "99999"])
def test_a_pipe_that_is_not_there_is_a_configuration_error(value: str) -> None:
    with pytest.raises(ConfigError, match=PROGRESS_FD_VARIABLE):
        sink_from_environment({PROGRESS_FD_VARIABLE: value})


def test_a_supervisor_that_has_gone_does_not_stop_the_start() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    sink = pipe_sink(writer)
    sink({"event": "begin", "phase": "a", "total": None})
    sink({"event": "begin", "phase": "b", "total": None})
    os.close(writer)


def test_without_a_supervisor_phases_are_log_lines(caplog: pytest.LogCaptureFixture) -> None:
    assert sink_from_environment({}) is log_sink
    with caplog.at_level(logging.INFO):
        report = StartupReport(log_sink)
        with report.phase("load weights"):
            pass
        report.ready(grpc="127.0.0.1:9")
    first, second = caplog.messages
    assert first.startswith("load weights took")
    assert second.endswith("s: grpc 127.0.0.1:9")


def test_a_unit_that_waits_is_told_once_it_is_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(address)
        systemd.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        report = Recorder().report()
        with report.phase("load weights"):
            pass
        report.ready()
        assert systemd.recv(100) == b"READY=1"
    report.ready()  # nobody listens any more: no reason to end
