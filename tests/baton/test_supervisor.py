"""Children are kept alive under their names, and ended in order; none is left behind."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import TYPE_CHECKING

import pytest

from baton.child import Child, ChildSpec, Facts
from baton.supervisor import Restart, StartFailed, Supervisor

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

TELL = "import os, json; pipe = os.fdopen(int(os.environ['BATON_PROGRESS_FD']), 'w', buffering=1)\n"
READY = "pipe.write(json.dumps({'event': 'ready', 'seconds': 0.1}) + '\\n')\n"
STAYS = TELL + READY + "import signal; signal.pause()"
IGNORES = (
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    + TELL
    + READY
    + "while True: signal.pause()"
)
FAILS = "import sys; print('baton decode: the model has no weights.'); sys.exit(3)"


def spec(name: str, program: str, *arguments: str) -> ChildSpec:
    return ChildSpec(name, arguments, program=(sys.executable, "-c", program))


class Harness:
    def __init__(self, *specs: ChildSpec, timeout: float = 20.0) -> None:
        self.facts: list[tuple[str, Facts]] = []
        self.changed = asyncio.Event()
        self.supervisor = Supervisor(
            specs,
            on_fact=self._on_fact,
            on_line=lambda child, line: None,
            shutdown_timeout_seconds=timeout,
            first_pause_seconds=0.001,
        )

    def _on_fact(self, child: Child, fact: Facts) -> None:
        self.facts.append((child.spec.name, fact))
        self.changed.set()

    def events(self, name: str) -> list[str]:
        return [fact["event"] for who, fact in self.facts if who == name]

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.changed.clear()
            await self.changed.wait()

    async def until_ready(self, name: str, times: int) -> None:
        await self.until(lambda: self.events(name).count("ready") == times)

    def child(self, name: str) -> Child:
        return next(c for c in self.supervisor.children if c.spec.name == name)


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await body()

    asyncio.run(bounded())


def is_alive(pid: int | None) -> bool:
    assert pid is not None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_child_that_dies_after_the_start_comes_back_under_its_name() -> None:
    async def body() -> None:
        harness = Harness(spec("a", STAYS), spec("b", STAYS))
        await harness.supervisor.start()
        first, other = harness.child("a"), harness.child("b").pid
        first.kill()
        await harness.until(lambda: harness.events("a") == ["ready", "died", "ready"])
        second = harness.child("a")
        assert second.pid != first.pid
        assert harness.child("b").pid == other, "the others go on"
        await harness.supervisor.stop()
        assert not is_alive(second.pid)

    run(body)


def test_one_that_dies_again_and_again_is_started_again_each_time() -> None:
    async def body() -> None:
        harness = Harness(spec("a", STAYS))
        await harness.supervisor.start()
        for deaths in range(1, 3):
            harness.child("a").kill()
            await harness.until_ready("a", deaths + 1)
        pauses = [fact["pause_seconds"] for _, fact in harness.facts if fact["event"] == "died"]
        assert pauses == [0.001, 0.002]
        await harness.supervisor.stop()

    run(body)


def test_a_child_that_ends_before_it_is_ready_ends_the_start_in_its_own_words() -> None:
    async def body() -> None:
        harness = Harness(spec("prefill-0", STAYS), spec("decode-0", FAILS, "decode"))
        with pytest.raises(StartFailed) as failed:
            await harness.supervisor.start()
        assert failed.value.message == "decode-0 did not start: the model has no weights."
        survivor = harness.child("prefill-0").pid
        await harness.supervisor.stop()
        assert not is_alive(survivor)

    run(body)


def test_a_child_that_says_nothing_is_named_with_its_exit_code() -> None:
    async def body() -> None:
        harness = Harness(spec("gateway", "raise SystemExit(7)"))
        with pytest.raises(StartFailed, match=r"gateway did not start: .*exit code 7"):
            await harness.supervisor.start()
        await harness.supervisor.stop()

    run(body)


def test_stop_ends_the_last_before_all_others() -> None:
    async def body() -> None:
        harness = Harness(*(spec(name, STAYS) for name in ("prefill-0", "decode-0", "gateway")))
        await harness.supervisor.start()
        order: list[str] = []
        watching = [
            asyncio.create_task(_note_end(child, order)) for child in harness.supervisor.children
        ]
        await harness.supervisor.stop()
        await asyncio.gather(*watching)
        assert order[0] == "gateway"
        assert sorted(order[1:]) == ["decode-0", "prefill-0"]
        assert "died" not in harness.events("gateway")

    run(body)


def test_the_others_are_stopped_together(tmp_path: Path) -> None:
    """Each has ended only when the other has been told, too."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    meets = (
        "import signal, sys\n"
        "meet = lambda *_: sys.exit(open(sys.argv[1], sys.argv[2]).close())\n"
        "signal.signal(signal.SIGTERM, meet)\n"
    ) + STAYS

    async def body() -> None:
        nodes = [spec("prefill-0", meets, str(fifo), "r"), spec("decode-0", meets, str(fifo), "w")]
        harness = Harness(*nodes, spec("gateway", STAYS), timeout=10.0)
        await harness.supervisor.start()
        await harness.supervisor.stop()
        codes = [harness.child(name).exit_code for name in ("prefill-0", "decode-0")]
        assert codes == [0, 0]

    run(body)


async def _note_end(child: Child, order: list[str]) -> None:
    await child.ended.wait()
    order.append(child.spec.name)


def test_who_does_not_end_in_time_is_killed() -> None:
    async def body() -> None:
        harness = Harness(spec("a", IGNORES), timeout=0.01)
        await harness.supervisor.start()
        await harness.supervisor.stop()
        assert harness.child("a").exit_code == -9

    run(body)


def test_a_start_that_is_cancelled_leaves_no_process_behind() -> None:
    async def body() -> None:
        harness = Harness(spec("a", STAYS), spec("b", STAYS))
        starting = asyncio.create_task(harness.supervisor.start())
        await asyncio.sleep(0)  # the first spawn is under way
        await asyncio.sleep(0)
        starting.cancel()
        await harness.supervisor.stop()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert len(harness.supervisor.children) == 1
        assert harness.child("a").exit_code is not None

    run(body)


def test_nothing_is_started_again_once_stopping() -> None:
    async def body() -> None:
        harness = Harness(spec("a", STAYS))
        await harness.supervisor.start()
        harness.supervisor.kill()
        child = harness.child("a")
        await child.ended.wait()
        await harness.supervisor.stop()
        assert harness.child("a") is child

    run(body)


def test_pauses_double_up_to_a_bound_and_start_over_after_a_long_life() -> None:
    restart = Restart(0.5)
    assert [restart.next_pause(1.0) for _ in range(9)] == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert restart.next_pause(61.0) == 0.5
