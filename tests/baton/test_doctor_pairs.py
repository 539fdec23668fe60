"""`baton doctor --pairs`: rates beside plain copies; whatever a probe does is a row."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from baton import doctor_pairs
from baton.doctor_pairs import (
    MeasuredPair,
    Pair,
    all_pairs,
    measure_machine,
    measure_pair,
    note_on,
    pair_table,
)
from baton.pair_plan import host_and_port

if TYPE_CHECKING:
    from collections.abc import Callable

TCP = Pair("two processes", "cpu", "cpu", "tcp")
GPUS = Pair("GPU 0 to GPU 1", "cuda:0", "cuda:1", "all")


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let probes run a program of the test's instead."""

    def answer(program: str, seconds: float = 30.0) -> None:
        def run(*_: str, **__: float) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-c", program]
            return subprocess.run(
                command, capture_output=True, text=True, timeout=seconds, check=False
            )

        monkeypatch.setattr(doctor_pairs, "_run_probe", run)

    return answer


def measured(transport: str, share: float) -> MeasuredPair:
    return MeasuredPair("pair", transport, share * 1e9, "plain copy", 1e9, "")


def test_every_two_gpus_are_one_pair() -> None:
    labels = [pair.label for pair in all_pairs(3) if pair.source != "cpu"]
    assert labels == ["GPU 0 to GPU 1", "GPU 0 to GPU 2", "GPU 1 to GPU 2"]
    assert [pair.source for pair in all_pairs(0)] == ["cpu", "cpu"]


def test_a_probe_that_answers_is_a_row_with_both_rates(answering: Callable[..., None]) -> None:
    facts = {"transport": "tcp", "rate": 2e9, "reference": "plain socket", "reference_rate": 2.5e9}
    answering(f"print('a banner'); print('''{json.dumps(facts)}''')")
    row = measure_pair(TCP)
    assert (row.transport, row.share, row.note) == ("tcp", 0.8, "")


@pytest.mark.parametrize(
    ("program", "seconds", "words"),
    [
        ("import sys; sys.exit('no such device')", 30.0, "no such device"),
        ("import signal; signal.pause()", 0.01, "no answer"),
        ("print('hello')", 30.0, "own words"),
        ("print('{}')", 30.0, "own words"),
        ("", 30.0, "own words"),
    ],
)
def test_a_probe_that_fails_is_a_row_that_says_how(
    answering: Callable[..., None], program: str, seconds: float, words: str
) -> None:
    answering(program, seconds)
    row = measure_pair(TCP)
    assert row.rate == 0.0
    assert words in row.note
    console = Console(record=True, width=150)
    console.print(pair_table([row]))
    assert words in console.export_text()


@pytest.mark.parametrize(
    ("pair", "found", "words"),
    [
        (GPUS, measured("cuda_ipc", 0.95), ""),
        (GPUS, measured("tcp", 0.01), "not over NVLink"),
        (TCP, measured("tcp", 0.95), ""),
        (TCP, measured("tcp", 0.3), "far below"),
        (Pair("x", "cpu", "cpu", "sm,tcp"), measured("tcp", 0.9), "no shared memory"),
    ],
)
def test_what_is_not_as_it_should_be_has_a_note(
    pair: Pair, found: MeasuredPair, words: str
) -> None:
    note = note_on(pair, found)
    assert words in note
    assert bool(note) == bool(words)


def test_a_machine_that_does_not_listen_is_a_row_that_says_so() -> None:
    row = measure_machine("127.0.0.1:1", "cpu")
    assert row.rate == 0.0
    assert "nobody listens" in row.note


@pytest.mark.parametrize(
    ("address", "host"), [("[::1]:9300", "::1"), ("::1:9300", "::1"), (":9300", "")]
)
def test_the_host_of_an_address_may_stand_in_brackets(address: str, host: str) -> None:
    assert host_and_port(address) == (host, 9300)


def test_a_machine_without_torch_measures_nothing_to_another_one_and_says_so(
    answering: Callable[..., None],
) -> None:
    """In a process of its own: it was the end of the doctor, and of all that it had found."""
    answering("raise ModuleNotFoundError(\"No module named 'torch'\")")
    row = measure_machine("127.0.0.1:1", "cpu")
    assert row.rate == 0.0
    assert "No module named 'torch'" in row.note


def test_a_gpu_that_is_not_there_is_a_row_that_says_so() -> None:
    row = measure_machine("127.0.0.1:1", "cuda:99")
    assert row.note == "torch sees no cuda:99 on this machine."


@pytest.mark.slow
@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_another_machine_is_measured_where_it_listens(host: str) -> None:
    program = [sys.executable, "-m", "baton", "doctor", "--listen", f"{host}:0"]
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True) as listener:
        assert listener.stderr is not None
        waiting = next(line for line in listener.stderr if line.startswith("waiting"))
        port = int(re.findall(r"HOST:(\d+)", waiting)[0])
        row = measure_machine(f"{host}:{port}", "cpu")
        listener.kill()
    assert row.transport == "tcp", row.note
    assert min(row.rate, row.reference_rate) > 0


@pytest.mark.slow
def test_two_processes_are_measured_over_tcp() -> None:
    row = measure_pair(TCP)
    assert row.transport == "tcp", row.note
    assert row.reference == "plain socket"
    assert row.rate > 0
    assert row.reference_rate > 0
