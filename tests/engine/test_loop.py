"""The engine thread: commands between steps, and bad steps that hurt only their own."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, Future
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from cluster.errors import OutOfMemory
from cluster.prefix_hash import root_hash
from cluster.request import SamplingParams, SequenceRequest, TokenDelta
from engine.loop import MAX_FAILED_STEPS, EngineLoop
from engine.loop_errors import unawaited
from engine.schedule import ScheduledChunk, ScheduleDecision
from engine.sequence import Sequence
from engine.tensor_parallel.failures import RankLost

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as SequenceOf

T = TypeVar("T")


def make_sequence(name: str) -> Sequence:
    request = SequenceRequest(
        sequence_id=name,
        request_id=name,
        prompt_token_ids=(1, 2, 3),
        sampling=SamplingParams(max_tokens=4, seed=0),
    )
    return Sequence(request, block_size=16, root=root_hash("m", b""))


class OneStepEach:
    """A scheduler whose sequences are done after one step, one sequence per step."""

    def __init__(self) -> None:
        self.queue: list[Sequence] = []
        self.aborted: list[str] = []

    def add(self, sequence: Sequence) -> None:
        self.queue.append(sequence)

    def abort(self, sequence_id: str) -> Sequence | None:
        self.aborted.append(sequence_id)
        self.queue = [s for s in self.queue if s.sequence_id != sequence_id]
        return None

    def schedule(self) -> ScheduleDecision:
        return ScheduleDecision((ScheduledChunk(self.queue[0], 3),))

    def schedule_ahead(self) -> None: ...

    def update(self, output: Any) -> list[Sequence]:
        return [self.queue.pop(0)]

    def has_work(self) -> bool:
        return bool(self.queue)


class Recorder:
    def __init__(self) -> None:
        self.deltas: list[TokenDelta] = []
        self.settled_once = threading.Semaphore(0)

    def before_step(self, decision: ScheduleDecision) -> None: ...
    def after_step(self, decision: ScheduleDecision, output: Any) -> None: ...

    def idle(self) -> None:
        pass

    def settled(self, deltas: SequenceOf[TokenDelta]) -> None:
        self.deltas.extend(deltas)
        self.settled_once.release()


class ScriptedEngine:
    """Fails the steps of sequences whose name begins with "bad", or "big" for its memory; "lost"
    loses a rank."""

    def launch(self, decision: ScheduleDecision, *, on_layer: object = None) -> Any:
        return SimpleNamespace(decision=decision, can_be_followed=False)

    def collect(self, step: Any) -> Any:
        name = step.decision.chunks[0].sequence.sequence_id
        if name.startswith("lost"):
            raise RankLost("Rank 1 is gone.")
        if name.startswith("bad"):
            raise RuntimeError("the device is unhappy")
        if name.startswith("big"):
            raise OutOfMemory("no memory", reason="out_of_memory")
        delta = TokenDelta(sequence_id=name, token_ids=(5,))
        return SimpleNamespace(deltas=[delta], sampled_sequences=[], done=None)


class Harness:
    def __init__(self) -> None:
        self.scheduler, self.recorder = OneStepEach(), Recorder()
        self.fatal: list[BaseException] = []
        self.fatal_event = threading.Event()
        self.loop = EngineLoop(
            ScriptedEngine(), self.scheduler, self.recorder, on_fatal=self._on_fatal
        )

    def _on_fatal(self, error: BaseException) -> None:
        self.fatal.append(error)
        self.fatal_event.set()

    def add(self, *names: str) -> None:
        def run() -> None:
            for name in names:
                self.scheduler.add(make_sequence(name))

        self.loop.call(run).result(10)

    def wait_for_steps(self, count: int) -> None:
        for _ in range(count):
            assert self.recorder.settled_once.acquire(timeout=10)


def test_a_step_takes_its_launch_too(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("engine.loop.time", SimpleNamespace(perf_counter=lambda: now[0]))
    harness = Harness()
    launch = ScriptedEngine.launch

    def slow(self: ScriptedEngine, decision: ScheduleDecision, **options: Any) -> Any:
        now[0] += 7.0
        return launch(self, decision, **options)

    monkeypatch.setattr(ScriptedEngine, "launch", slow)
    harness.loop.start()
    harness.add("first", "second")
    harness.wait_for_steps(2)
    harness.loop.stop()
    assert harness.loop.stats.step_seconds == 14.0


def _note_thread(order: list[tuple[int, int]], number: int) -> None:
    order.append((number, threading.get_ident()))


def test_commands_run_in_order_on_one_thread() -> None:
    harness = Harness()
    harness.loop.start()
    order: list[tuple[int, int]] = []
    futures = [harness.loop.call(partial(_note_thread, order, number)) for number in range(20)]
    for future in futures:
        future.result(10)
    harness.loop.stop()
    assert [number for number, _ in order] == list(range(20))
    assert len({thread for _, thread in order}) == 1
    assert order[0][1] != threading.get_ident()


def test_an_error_of_a_command_is_its_callers_and_the_thread_goes_on() -> None:
    harness = Harness()
    harness.loop.start()
    with pytest.raises(ZeroDivisionError):
        harness.loop.call(lambda: 1 // 0).result(10)
    assert harness.loop.call(lambda: 7).result(10) == 7
    harness.loop.stop()


def test_an_error_of_a_command_that_nobody_waits_for_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    harness = Harness()
    harness.loop.start()
    unawaited(harness.loop.call(lambda: 1 // 0))
    assert harness.loop.call(lambda: 7).result(10) == 7
    harness.loop.stop()
    assert "a command to the engine failed" in caplog.messages


def test_a_bad_step_ends_its_sequence_typed_and_the_others_go_on() -> None:
    harness = Harness()
    harness.loop.start()
    harness.add("bad", "good")
    harness.wait_for_steps(2)
    harness.loop.stop()
    assert harness.scheduler.aborted == ["bad"]
    failed, good = harness.recorder.deltas
    assert failed.sequence_id == "bad"
    assert failed.error is not None
    assert failed.error.code == "internal"
    assert good.token_ids == (5,)
    assert not harness.fatal


def test_an_engine_that_only_fails_is_fatal() -> None:
    harness = Harness()
    harness.loop.start()
    harness.add(*(f"bad{i}" for i in range(MAX_FAILED_STEPS)))
    assert harness.fatal_event.wait(10)
    assert isinstance(harness.fatal[0], RuntimeError)
    assert len(harness.recorder.deltas) == MAX_FAILED_STEPS
    harness.loop.stop()


def test_steps_without_memory_end_their_sequences_however_many_they_are() -> None:
    harness = Harness()
    harness.loop.start()
    names = [f"big{i}" for i in range(MAX_FAILED_STEPS + 2)]
    harness.add(*names, "good")
    harness.wait_for_steps(len(names) + 1)
    harness.loop.stop()
    *failed, good = harness.recorder.deltas
    assert [delta.sequence_id for delta in failed] == names
    assert all(isinstance(delta.error, OutOfMemory) for delta in failed)
    assert failed[0].error is not None
    assert failed[0].error.retryable
    assert good.token_ids == (5,)
    assert not harness.fatal


def test_stop_cancels_what_is_still_queued() -> None:
    harness = Harness()
    queued = harness.loop.call(lambda: None)  # the thread never started
    harness.loop.stop()
    with pytest.raises(CancelledError):
        queued.result(0)


def test_nobody_waits_for_a_thread_that_has_ended() -> None:
    harness = Harness()
    harness.loop.start()
    harness.add(*(f"bad{i}" for i in range(MAX_FAILED_STEPS)))
    assert harness.fatal_event.wait(10)
    late = harness.loop.call(lambda: None)
    harness.loop.stop()
    with pytest.raises(CancelledError):
        late.result(10)
    with pytest.raises(CancelledError):
        harness.loop.call(lambda: None).result(0)


def test_a_lost_rank_ends_the_thread_at_its_first_step() -> None:
    harness = Harness()
    harness.loop.start()
    harness.add("lost-1")
    assert harness.fatal_event.wait(10)
    assert [type(error) for error in harness.fatal] == [RankLost]
    assert harness.loop.stats.num_failed_steps == 0
    harness.loop.stop()


def test_a_thread_that_hangs_shows_and_one_that_waits_for_work_does_not() -> None:
    harness = Harness()
    harness.loop.start()
    harness.loop.call(lambda: None).result(10)
    entered, leave = threading.Event(), threading.Event()

    def hang() -> None:
        entered.set()
        leave.wait(10)

    hanging = harness.loop.call(hang)
    assert entered.wait(10)
    assert harness.loop.seconds_without_progress > 0.0
    leave.set()
    hanging.result(10)
    harness.loop.stop()
    assert harness.loop.seconds_without_progress == 0.0


class HeldEngine(ScriptedEngine):
    """Computes each step until it may give it back."""

    def __init__(self) -> None:
        self.launched: list[str] = []
        self.may_collect = threading.Event()

    def launch(self, decision: ScheduleDecision, *, on_layer: object = None) -> Any:
        self.launched.append(decision.chunks[0].sequence.sequence_id)
        return super().launch(decision, on_layer=on_layer)

    def collect(self, step: Any) -> Any:
        assert self.may_collect.wait(20)
        return super().collect(step)


def idle_loop(
    scheduler: OneStepEach, rehearse: Callable[[], None] = lambda: None
) -> tuple[HeldEngine, EngineLoop]:
    """Its thread waits for work."""
    engine = HeldEngine()
    loop = EngineLoop(engine, scheduler, Recorder(), on_fatal=print, rehearse=rehearse)
    loop.start()
    loop.call(lambda: None).result(20)
    while loop.is_busy:
        pass
    return engine, loop


FOR_EVER = 1e6  # seconds


def test_who_stands_aside_goes_on_when_a_step_is_launched() -> None:
    engine, loop = idle_loop(scheduler := OneStepEach())
    loop.call_and_stand_aside(lambda: scheduler.add(make_sequence("a")), FOR_EVER)
    assert engine.launched == ["a"]
    engine.may_collect.set()
    loop.stop()


def test_who_stands_aside_goes_on_when_there_is_nothing_to_launch() -> None:
    _, loop = idle_loop(OneStepEach())
    refused = loop.call_and_stand_aside(lambda: 1 // 0, FOR_EVER)
    with pytest.raises(ZeroDivisionError):
        refused.result(10)
    loop.stop()


def test_who_stands_aside_goes_on_when_all_there_is_waits_for_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, loop = idle_loop(scheduler := OneStepEach())
    monkeypatch.setattr(scheduler, "schedule", lambda: ScheduleDecision(()))
    loop.call_and_stand_aside(lambda: scheduler.add(make_sequence("a")), FOR_EVER)
    assert not engine.launched
    loop.stop()


def test_nobody_stands_aside_for_a_step_that_runs() -> None:
    engine, loop = idle_loop(scheduler := OneStepEach())
    loop.call_and_stand_aside(lambda: scheduler.add(make_sequence("a")), FOR_EVER)
    loop.call_and_stand_aside(lambda: None, FOR_EVER)
    engine.may_collect.set()
    loop.stop()


def test_nobody_stands_aside_for_a_thread_that_has_ended() -> None:
    loop = Harness().loop
    loop.start()
    loop.stop()
    with pytest.raises(CancelledError):
        loop.call_and_stand_aside(lambda: None, FOR_EVER).result(0)


def test_who_stands_aside_goes_on_when_the_thread_ends_before_it_hears_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = Harness().loop
    call, end, queued = loop.call, loop._commands.end, threading.Event()
    waiting = threading.Thread(
        target=lambda: loop.call_and_stand_aside(lambda: None, FOR_EVER), daemon=True
    )

    def call_and_say_so(run: Callable[[], T]) -> Future[T]:
        future = call(run)
        queued.set()
        return future

    def end_behind_a_call() -> None:
        waiting.start()
        assert queued.wait(20)
        end()

    monkeypatch.setattr(loop, "call", call_and_say_so)
    monkeypatch.setattr(loop._commands, "end", end_behind_a_call)
    loop.stop()
    waiting.join(20)
    assert not waiting.is_alive()


def test_an_idle_thread_rehearses_and_counts_as_idle_meanwhile() -> None:
    entered, leave = threading.Event(), threading.Event()

    def rehearse() -> None:
        entered.set()
        assert leave.wait(20)

    engine, scheduler = HeldEngine(), OneStepEach()
    loop = EngineLoop(engine, scheduler, Recorder(), on_fatal=print, rehearse=rehearse)
    loop.rehearse()  # nobody plays it before the thread waits for commands
    loop.start()
    assert entered.wait(20)
    assert not loop.is_busy
    assert loop.seconds_without_progress > 0.0, "one that hangs shows"
    leave.set()
    assert loop.call(lambda: 7).result(20) == 7
    loop.stop()


def test_a_rehearsal_that_ends_the_thread_is_over() -> None:
    def rehearse() -> None:
        raise SystemExit

    fatal: list[BaseException] = []
    loop = EngineLoop(
        ScriptedEngine(), OneStepEach(), Recorder(), on_fatal=fatal.append, rehearse=rehearse
    )
    loop.rehearse()
    loop.start()
    loop.stop()
    assert isinstance(fatal[0], SystemExit)
    assert loop.seconds_without_progress == 0.0


def test_a_thread_with_a_step_to_compute_rehearses_none() -> None:
    played: list[bool] = []
    engine, loop = idle_loop(scheduler := OneStepEach(), rehearse=lambda: played.append(True))
    loop.call_and_stand_aside(lambda: scheduler.add(make_sequence("a")), FOR_EVER)
    loop.rehearse()
    engine.may_collect.set()
    loop.stop()
    assert not played


def test_a_rehearsal_that_breaks_is_the_last_and_costs_no_step() -> None:
    played: list[bool] = []

    def rehearse() -> None:
        played.append(True)
        raise RuntimeError("it cannot be played here")

    scheduler, recorder = OneStepEach(), Recorder()
    loop = EngineLoop(ScriptedEngine(), scheduler, recorder, on_fatal=print, rehearse=rehearse)
    loop.rehearse()
    loop.start()
    loop.call(lambda: None).result(20)
    loop.rehearse()
    loop.call(lambda: scheduler.add(make_sequence("a"))).result(20)
    assert recorder.settled_once.acquire(timeout=20)
    loop.stop()
    assert played == [True]
