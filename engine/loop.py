"""The thread that owns one engine.

Life of the thread
    1. `start()` begins it. From here only this thread touches the engine, its scheduler and
       its block manager; everyone else speaks to it through `call`.
    2. Commands given to `call` run between steps, in the order they were given.
    3. While the scheduler has work: decide, launch, collect, settle. The observer hears of a
       decision before it is launched and of its output after, both on this thread.
    4. Where the engine overlaps and the scheduler can decide without the tokens of the step that
       runs, the next step is launched before that one is collected. Then one step is always
       queued behind the one that the device computes, and what happens here between two steps,
       commands included, costs the device nothing.
    5. A step that raises ends the sequences of that step, and of one launched behind it, with
       `InternalError` or `OutOfMemory`; the others go on. After `MAX_FAILED_STEPS` in a row, or
       when a rank of the model is lost, the engine is beyond help: `on_fatal` is called and the
       thread ends.
    6. `call_and_stand_aside` leaves the interpreter to this thread until it waits for the device: a
       launch lets go of its lock in every call of the driver, and to get it back from a thread that
       computes takes longer than the call. With nothing in front of it on the device that shows.
    7. `stop()` ends it after the steps that run. However the thread ends, commands still
       queued are cancelled, and so are those given later: nobody waits for an answer in vain.

The loop knows no role: what it drives is any `Scheduler`, who listens is any `Observer`.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from typing import TYPE_CHECKING, TypeVar

from cluster.errors import InternalError, OutOfMemory
from cluster.isolation import isolated, tried
from cluster.request import TokenDelta
from engine.commands import Commands
from engine.loop_errors import error_delta
from engine.loop_parts import (
    Flight,
    LayerHook,
    LoopStats,
    Observer,
    Scheduler,
    StartCopies,
    Stepper,
)
from engine.schedule import ScheduleDecision
from engine.tensor_parallel.failures import RankLost

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from engine.commands import Command


logger = logging.getLogger(__name__)
T = TypeVar("T")
MAX_FAILED_STEPS = 3
BLOCKED_WAIT_SECONDS = 0.01
_STEP_FAILED = "The model step failed."


class EngineLoop:
    """Drives one engine on one thread. See the module for its life."""

    def __init__(
        self,
        engine: Stepper,
        scheduler: Scheduler,
        observer: Observer,
        *,
        on_fatal: Callable[[BaseException], None],
        layer_hook: LayerHook | None = None,
        start_copies: StartCopies | None = None,
        rehearse: Callable[[], None] = lambda: None,
    ) -> None:
        """`layer_hook` is asked before each launch who is to hear of its layers,
        `start_copies` called after each decision, `rehearse` while idle, when `rehearse` below
        was."""
        self._engine = engine
        self._layer_hook = layer_hook
        self._scheduler = scheduler
        self._observer = observer
        self._on_fatal = on_fatal
        self._copies_of = start_copies
        self._play = rehearse
        self._commands = Commands(self._rehearse)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stopping = False
        self._has_launched = threading.Event()  # or has nothing to launch
        self._may_rehearse = True
        self._num_failed_in_a_row = 0
        self._flight: Flight | None = None  # launched, and the next thing to collect
        self._settled_at = 0.0
        self._busy_since: float | None = None
        self._rehearsing_since: float | None = None
        self.stats = LoopStats()

    @property
    def seconds_without_progress(self) -> float:
        """How long the thread has been at one step, command or rehearsal; 0 while it waits for
        work. For health: a process whose event loop answers may have an engine that hangs. Any
        thread."""
        since = self._busy_since or self._rehearsing_since
        return 0.0 if since is None else time.perf_counter() - since

    @property
    def is_busy(self) -> bool:
        """Whether there is a step or command to run. Any thread."""
        return self._busy_since is not None

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_seconds: float = 10.0) -> None:
        self._commands.stop()
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)
        self._end()

    def call(self, run: Callable[[], T]) -> Future[T]:
        """Run `run` on the engine's thread between two steps; the future gets what it gives,
        or is cancelled when the thread has ended."""
        return self._commands.call(run)

    def call_and_stand_aside(self, run: Callable[[], T], seconds: float) -> Future[T]:
        """As `call`. If the thread is idle, the caller sleeps until it waits for a step to end, or
        for work, but no longer than so many seconds. One thread at a time."""
        if self.is_busy:
            return self.call(run)
        self._has_launched.clear()
        future = self.call(run)
        if not future.cancelled():
            self._has_launched.wait(seconds)
        return future

    def rehearse(self) -> None:
        """A first step is about to come, maybe: if the thread is idle, it plays its launch. Any
        thread."""
        if self._may_rehearse and not self.is_busy:
            self._commands.rehearse()

    def _rehearse(self) -> None:
        self._rehearsing_since = time.perf_counter()
        went_well = isolated(self._play, "launches are not rehearsed any more", logger)
        self._may_rehearse = went_well
        self._rehearsing_since = None

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._busy_since = time.perf_counter()
                self._start_copies()
                self._run_commands()
                if self._is_busy() and not self._stopping:
                    self._step()
            if self._flight is not None:
                self._settle(self._flight)
        except BaseException as error:  # top of the thread: say it, then end
            logger.exception("the engine thread ended")
            self._on_fatal(error)
        finally:
            self._end()

    def _start_copies(self) -> None:
        if self._copies_of is not None:
            self._copies_of(self.call)

    def _run_commands(self) -> None:
        """Run what is queued; wait for a command when there is nothing to step."""
        if not self._is_busy():
            self._observer.idle()
            self._has_launched.set()  # before who sees that it is idle clears it
            self._busy_since = None
            command = self._commands.wait()
            self._busy_since = time.perf_counter()
            self._execute(command)
        while not self._stopping:
            try:
                command = self._commands.take()
            except queue.Empty:
                return
            self._execute(command)

    def _is_busy(self) -> bool:
        return self._flight is not None or self._scheduler.has_work()

    def _execute(self, command: Command | None) -> None:
        if command is None:
            self._stopping = True
        else:
            command.execute()

    def _step(self) -> None:
        """Collect one step, with the next one launched before if possible."""
        flight = self._flight or self._launch_next()
        if flight is None:
            return
        self._flight = None
        decision = self._scheduler.schedule_ahead() if flight.step.can_be_followed else None
        self._start_copies()
        if decision is None:
            self._settle(flight)
            return
        behind = _tried(lambda: self._launch(decision))
        if self._settle(flight, decision):
            self._flight = self._launched(decision, behind)

    def _launch_next(self) -> Flight | None:
        decision = self._scheduler.schedule()
        self._start_copies()
        if decision.failed:
            self._observer.settled([error_delta(sequence) for sequence in decision.failed])
        if not decision.chunks:
            self._wait_for_blocks()
            return None
        return self._launched(decision, _tried(lambda: self._launch(decision)))

    def _launch(self, decision: ScheduleDecision) -> Flight:
        began = time.perf_counter()
        self._observer.before_step(decision)
        on_layer = None if self._layer_hook is None else self._layer_hook(decision)
        step = self._engine.launch(decision, on_layer=on_layer)
        return Flight(decision, step, began)

    def _launched(self, decision: ScheduleDecision, launch: Flight | Exception) -> Flight | None:
        """When it is its turn: what was launched, or nothing, of which its sequences hear."""
        if isinstance(launch, Exception):
            self._fail_step(decision, launch)
            return None
        return launch

    def _settle(self, flight: Flight, behind: ScheduleDecision | None = None) -> bool:
        """Collect a step and tell everybody. False if it failed, and with it the one behind."""
        self._has_launched.set()  # from here this thread waits for the device
        output = _tried(lambda: self._engine.collect(flight.step))
        if isinstance(output, Exception):
            chunks = flight.decision.chunks + (() if behind is None else behind.chunks)
            self._fail_step(ScheduleDecision(chunks), output)
            return False
        self._num_failed_in_a_row = 0
        now = time.perf_counter()
        self.stats.count(flight.decision, output, now - max(flight.began, self._settled_at))
        self._settled_at = now
        self._observer.after_step(flight.decision, output)
        self._scheduler.update(output)
        self._observer.settled(output.deltas)
        return True

    def _wait_for_blocks(self) -> None:
        """Everything waits for blocks that a command will free: do not spin meanwhile."""
        self._observer.idle()
        self._has_launched.set()
        try:
            self._execute(self._commands.wait(BLOCKED_WAIT_SECONDS))
        except queue.Empty:
            return

    def _fail_step(self, decision: ScheduleDecision, error: Exception) -> None:
        # A step without memory says nothing of the next, which may be smaller.
        has_memory = not isinstance(error, OutOfMemory)
        self._num_failed_in_a_row += has_memory
        self.stats.num_failed_steps += 1
        logger.error("step failed (%d in a row)", self._num_failed_in_a_row, exc_info=error)
        failed = []
        for sequence in dict.fromkeys(chunk.sequence for chunk in decision.chunks):
            if sequence.is_finished:  # aborted while the step was in flight
                continue
            sequence_id = sequence.sequence_id
            self._scheduler.abort(sequence_id)
            reason = error if isinstance(error, OutOfMemory) else InternalError(_STEP_FAILED)
            failed.append(TokenDelta(sequence_id=sequence_id, error=reason))
        self._observer.settled(failed)
        if has_memory and self._num_failed_in_a_row >= MAX_FAILED_STEPS:
            raise error

    def _end(self) -> None:
        self._commands.end()
        self._has_launched.set()  # behind the last command: nobody stands aside for it any more
        self._busy_since = self._rehearsing_since = None


def _tried(part: Callable[[], T]) -> T | Exception:
    """What this part of a step gives, or why it failed: one bad step must not end the node. A lost
    rank must, as no step can run any more."""
    output = tried(part)
    if isinstance(output, RankLost):
        raise output
    return output
