"""One supervised process: what it says is read to the end, however it says it."""

from __future__ import annotations

import asyncio
import json
import os
import sys

import pytest

from baton.child import Child, ChildSpec, ChildState, Facts, parse_fact
from baton.child_pipe import ChildPipe, lines_of

TELL = "import os, json; pipe = os.fdopen(int(os.environ['BATON_PROGRESS_FD']), 'w', buffering=1)\n"
READY = "pipe.write(json.dumps({'event': 'ready', 'seconds': 0.1, 'grpc': 'here'}) + '\\n')\n"


def spec(program: str, *arguments: str) -> ChildSpec:
    return ChildSpec("child", arguments, program=(sys.executable, "-c", program))


class Heard:
    def __init__(self, spec: ChildSpec) -> None:
        self.facts: list[Facts] = []
        self.lines: list[str] = []
        self.child = Child(
            spec,
            on_fact=lambda _, fact: self.facts.append(fact),
            on_line=lambda _, line: self.lines.append(line),
        )


def run_to_its_end(program: str, *arguments: str) -> Heard:
    async def run() -> Heard:
        heard = Heard(spec(program, *arguments))
        await heard.child.start()
        async with asyncio.timeout(20):
            await heard.child.ended.wait()
        return heard

    return asyncio.run(run())


def test_a_child_is_ready_once_it_says_so_and_its_facts_are_kept() -> None:
    heard = run_to_its_end(TELL + READY)
    assert heard.child.ready.is_set()
    assert heard.child.ready_facts["grpc"] == "here"
    assert heard.child.exit_code == 0
    assert heard.child.state is ChildState.ENDED


def test_garbage_on_the_progress_pipe_is_skipped_and_facts_after_it_count() -> None:
    garbage = ["not json", "[1, 2]", '{"event": "begin"}', '{"event": 5}', '"x"', "\udcff{"]
    written = "".join(f"{line}\n" for line in garbage)
    heard = run_to_its_end(
        TELL + f"pipe.buffer.write({written.encode(errors='surrogateescape')!r})\n" + READY
    )
    assert [fact["event"] for fact in heard.facts] == ["ready"]
    assert heard.child.ready.is_set()


def test_a_line_longer_than_any_buffer_comes_in_pieces_and_the_next_one_whole() -> None:
    heard = run_to_its_end("print('x' * 300_000); print('after')")
    assert "".join(heard.lines[:-1]) == "x" * 300_000
    assert heard.lines[-1] == "after"


def test_an_endless_line_on_the_progress_pipe_does_not_end_the_reading() -> None:
    heard = run_to_its_end(TELL + "pipe.write('y' * 300_000 + '\\n')\n" + READY)
    assert [fact["event"] for fact in heard.facts] == ["ready"]


def test_last_words_before_ready_are_kept_for_the_supervisor_and_not_shown() -> None:
    heard = run_to_its_end(
        "import sys; print('loading'); print('baton decode: no such model.'); sys.exit(3)",
        "decode",
    )
    assert heard.child.failure == "no such model."
    assert heard.lines == ["loading"]
    assert heard.child.exit_code == 3


def test_a_failure_that_is_both_a_fact_and_last_words_is_kept_once() -> None:
    failed = "pipe.write(json.dumps({'event': 'failed', 'message': 'port taken'}) + '\\n')\n"
    heard = run_to_its_end(TELL + failed + "print('baton decode: port taken')", "decode")
    assert heard.child.failure == "port taken"
    assert heard.lines == []


def test_a_program_that_cannot_be_spawned_has_ended_with_the_reason() -> None:
    async def run() -> Child:
        heard = Heard(ChildSpec("child", (), program=("/nowhere/baton",)))
        await heard.child.start()
        assert heard.child.ended.is_set()
        return heard.child

    child = asyncio.run(run())
    assert child.failure is not None
    assert "cannot be started" in child.failure


def test_terminate_asks_and_the_child_may_end_in_its_own_way() -> None:
    async def run() -> Heard:
        heard = Heard(
            spec(
                "import signal, sys\n"
                "signal.signal(signal.SIGTERM, lambda *_: (print('drained'), sys.exit(0)))\n"
                + TELL
                + READY
                + "signal.pause()"
            )
        )
        await heard.child.start()
        async with asyncio.timeout(20):
            await heard.child.ready.wait()
            heard.child.terminate()
            assert heard.child.state is ChildState.STOPPING
            await heard.child.ended.wait()
        return heard

    heard = asyncio.run(run())
    assert heard.lines == ["drained"]
    assert heard.child.exit_code == 0


@pytest.mark.parametrize(
    "line",
    [
        b'{"event": "advance", "phase": "load", "done": "many", "total": 3}',
        b'{"event": "end", "phase": "load"}',
        b'{"event": "failed"}',
        b'{"event": "surprise"}',
        b"",
    ],
)
def test_a_fact_without_what_it_must_carry_is_none(line: bytes) -> None:
    assert parse_fact(line) is None


def test_a_fact_with_all_it_must_carry_is_taken() -> None:
    fact = {"event": "begin", "phase": "load", "total": None}
    assert parse_fact(json.dumps(fact).encode()) == fact


def test_lines_of_gives_the_end_of_a_stream_that_has_no_line_feed() -> None:
    async def run() -> list[bytes]:
        stream = asyncio.StreamReader(limit=4)
        stream.feed_data(b"ab\nlonger than the limit\nend")
        stream.feed_eof()
        return [line async for line in lines_of(stream)]

    lines = asyncio.run(run())
    assert lines[0] == b"ab\n"
    assert b"".join(lines[1:]) == b"longer than the limit\nend"


def test_a_grandchild_that_keeps_the_pipes_open_does_not_hide_the_end() -> None:
    stays = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', %r])"
    waits = "import signal; signal.alarm(15); signal.pause()"

    async def run() -> Child:
        heard = Heard(spec(stays % waits))
        await heard.child.start()
        async with asyncio.timeout(10):
            await heard.child.ended.wait()
        heard.child.kill()
        return heard.child

    assert asyncio.run(run()).exit_code == 0


def test_all_that_a_child_has_said_is_read_however_late_its_pipe_is_looked_at() -> None:
    """Somebody else keeps the pipe open, and nothing was read before the child had ended."""

    async def run() -> list[bytes]:
        reading, writing = os.pipe()
        pipe = await ChildPipe.open(reading)
        os.write(writing, b"x" * 60_000 + b"\nlast words")
        pipe.child_has_ended()
        os.write(writing, b" of a grandchild\n")
        lines = [line async for line in pipe.lines()]
        os.close(writing)
        return lines

    assert asyncio.run(run()) == [b"x" * 60_000 + b"\n", b"last words"]
