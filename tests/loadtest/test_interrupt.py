"""Ctrl-C ends a measurement in order, and loses nothing of what was measured."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest

from loadtest.__main__ import EXIT_INTERRUPTED
from loadtest.interrupt import interrupts_set, unless_cut
from loadtest.report import render_notes
from loadtest.result import Cut
from loadtest.result_file import to_json
from loadtest.run import measure

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

NUM_ANSWERED = 3
NUM_PROMPTS = 8
CONCURRENCY = 2  # requests 4 and 5 are sent, and hang; three are never sent


class HangsAfter:
    """A script that answers the first requests; `is_hanging` once all of its places hang."""

    def __init__(self, answer: Callable[..., Awaitable[Any]]) -> None:
        self._answer = answer
        self.is_hanging = asyncio.Event()
        self.is_cancelled = asyncio.Event()  # all of them
        self._num_hanging = 0

    async def __call__(self, server: Any, request: Any, body: Any) -> Any:
        if len(server.bodies) <= NUM_ANSWERED:
            return await self._answer(server, request, body)
        self._num_hanging += 1
        if self._num_hanging == CONCURRENCY:
            self.is_hanging.set()
        try:
            await asyncio.Event().wait()
        finally:
            self._num_hanging -= 1
            if not self._num_hanging:
                self.is_cancelled.set()


def test_a_cut_stops_sending_cancels_what_runs_and_keeps_what_had_ended(
    wire: Any, bench_config: Callable[..., Any]
) -> None:
    async def scenario() -> Any:
        script, cut = HangsAfter(wire.answer_all_tokens), asyncio.Event()
        async with wire.serving(script) as server:
            config = bench_config(
                base_url=server.url, num_prompts=NUM_PROMPTS, max_concurrency=CONCURRENCY
            )
            measuring = asyncio.create_task(measure(config, cut))
            await script.is_hanging.wait()
            cut.set()
            result = await measuring
            await script.is_cancelled.wait()
            return result, server

    result, server = asyncio.run(asyncio.wait_for(scenario(), 30))
    assert (result.summary.completed, result.summary.failed) == (NUM_ANSWERED, 0)
    assert [record.index for record in result.records] == list(range(NUM_ANSWERED))
    assert result.cut == Cut(num_running=2, num_unsent=3)
    assert len(server.bodies) == NUM_ANSWERED + CONCURRENCY
    assert to_json(result)["cut"] == {"num_running": 2, "num_unsent": 3}
    told = render_notes(result).splitlines()[0]
    assert told.startswith("Cut short after ")
    assert told.endswith("3 requests had ended and count, 2 were running, 3 not sent yet.")


def test_a_whole_run_is_not_marked(measured: Callable[..., Any]) -> None:
    result, _ = measured()
    assert result.cut is None
    assert to_json(result)["cut"] is None
    assert "Cut" not in render_notes(result)


def test_ctrl_c_reports_and_saves_what_was_measured(wire: Any, tmp_path: Path) -> None:
    saved = tmp_path / "cut.json"

    async def scenario() -> tuple[int | None, str, str]:
        script = HangsAfter(wire.answer_all_tokens)
        async with wire.serving(script) as server:
            command = [sys.executable, "-m", "baton", "bench", "run", "--base-url", server.url]
            command += ["--num-prompts", str(NUM_PROMPTS), "--max-concurrency", str(CONCURRENCY)]
            command += ["--result-filename", str(saved), "--random-input-len", "4"]
            pipe = asyncio.subprocess.PIPE
            bench = await asyncio.create_subprocess_exec(*command, stdout=pipe, stderr=pipe)
            await script.is_hanging.wait()
            bench.send_signal(signal.SIGINT)
            out, errors = await bench.communicate()
            return bench.returncode, out.decode(), errors.decode()

    code, out, errors = asyncio.run(asyncio.wait_for(scenario(), 60))
    assert code == EXIT_INTERRUPTED
    assert errors == "Cut short; what was measured follows. Ctrl-C again ends at once.\n"
    assert "Successful requests:                     3" in out
    assert "Cut short after" in out
    assert out.splitlines()[-1] == f"Saved {saved}"
    document = json.loads(saved.read_text())
    assert (document["completed"], document["cut"]["num_unsent"]) == (3, 3)


def test_a_second_ctrl_c_ends_at_once() -> None:
    async def scenario() -> None:
        cut = asyncio.Event()
        with interrupts_set(cut):
            signal.raise_signal(signal.SIGINT)
            await cut.wait()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    asyncio.run(scenario())


def test_work_that_fails_fails_and_is_no_cut() -> None:
    async def broken() -> None:
        raise ValueError("broken")

    async def scenario() -> None:
        with pytest.raises(ValueError, match="broken"):
            await unless_cut(broken(), asyncio.Event())

    asyncio.run(scenario())
