"""The processes of the other ranks, as rank 0 sees them.

Life of a crew
    1. `Crew.start`: one process for each other rank, started anew (never forked: CUDA would not
       survive it). Each gets a socket, the read end of a pipe that only rank 0 holds open, and
       its orders as a JSON note. Then all ranks build the same engine, each with its shard.
    2. While serving, `announce` sends the inputs of a step to all of them before rank 0 runs it.
       They compute what rank 0 computes, and meet it in the sums of every layer.
    3. A watch looks whether they live, and whether a step takes longer than any can. When one is
       lost, so is the engine: `lost` is set, `on_lost` is called. On a GPU a kernel may wait for
       the lost rank for ever, and a thread that waits for that kernel cannot be woken: what has
       not ended by itself `EXIT_SECONDS` later is ended here, for a supervisor to start again.
    4. `close`: their sockets end, and with them the workers. When rank 0 is killed, its end of
       the pipe closes, and they end by themselves: no process stays behind.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cluster.clock import Clock, monotonic
from cluster.config import to_environment
from engine.tensor_parallel.failures import RankLost
from engine.tensor_parallel.ranks import STALL_SECONDS
from engine.tensor_parallel.rendezvous import FirstRank
from engine.tensor_parallel.seat import Seat
from engine.tensor_parallel.shard import Shard
from engine.tensor_parallel.wire import Channel, Closed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from engine.config import EngineConfig
    from engine.tensor_parallel.ranks import Ranks
    from engine.tensor_parallel.wire import StepHeader

logger = logging.getLogger(__name__)

WATCH_SECONDS = 0.2
CLOSE_SECONDS = 5.0
EXIT_SECONDS = 5.0
EXIT_LOST = 1
_WORKER = "engine.tensor_parallel.worker"


class Crew:
    """Ranks 1 to `size - 1`. `announce` is for the thread that steps."""

    def __init__(
        self,
        processes: list[subprocess.Popen[bytes]],
        channels: list[Channel],
        lifeline: int,
        folder: tempfile.TemporaryDirectory[str],
        *,
        exits_when_stuck: bool,
        clock: Clock = monotonic,
    ) -> None:
        """`lifeline`: the write end of the pipe that all workers watch. `exits_when_stuck`: end
        this process when a rank is lost and nobody closes the crew in time."""
        self.lost: RankLost | None = None
        self._processes = processes
        self._channels = channels
        self._lifeline = lifeline
        self._folder = folder
        self._exits_when_stuck = exits_when_stuck
        self._clock = clock
        self._stepping_since: float | None = None
        self._on_lost: Callable[[BaseException], None] | None = None
        self._ranks: Ranks | None = None
        self._closed = threading.Event()
        self._watch = threading.Thread(target=self._watch_all, name="rank-watch", daemon=True)
        self._watch.start()

    @classmethod
    def start(cls, config: EngineConfig, *, on_gpu: bool) -> Crew:
        """Start the workers; they wait for rank 0 at their first rendezvous."""
        folder = tempfile.TemporaryDirectory(prefix="baton-ranks-", ignore_cleanup_errors=True)
        watched, lifeline = os.pipe()
        processes, channels = [], []
        for rank in range(1, config.tensor_parallel_size):
            ours, theirs = socket.socketpair()
            processes.append(_spawn(theirs.fileno(), watched))
            theirs.close()
            channels.append(Channel(ours))
            channels[-1].send_note(
                rank=rank,
                size=config.tensor_parallel_size,
                folder=folder.name,
                options=to_environment(config),
            )
        os.close(watched)
        return cls(processes, channels, lifeline, folder, exits_when_stuck=on_gpu)

    @property
    def seat(self) -> Seat:
        """That of rank 0."""
        size = len(self._channels) + 1
        return Seat(Shard(0, size), FirstRank(self._channels), self._channels, self._folder.name)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def watch(self, on_lost: Callable[[BaseException], None]) -> None:
        """Call this, from any thread and at most once, when a rank is lost."""
        self._on_lost = on_lost
        if self.lost is not None:
            on_lost(self.lost)

    def connected(self, ranks: Ranks) -> None:
        """They are closed with the crew."""
        self._ranks = ranks

    def announce(self, header: StepHeader, inputs: memoryview) -> None:
        """Tell all workers to run this batch. Raises `RankLost`."""
        if self.lost is not None:
            raise self.lost
        try:
            for channel in self._channels:
                channel.send_step(header, inputs)
        except Closed:
            raise RankLost("A rank of this node is gone.") from None

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Around each step: what takes longer than any step can is a stall. A step that breaks
        off here leaves the others in the middle of it, so they are lost, too."""
        self._stepping_since = self._clock()
        try:
            yield
        except RankLost:
            raise
        except Exception as error:
            raise RankLost("Rank 0 broke off a step in which the others still are.") from error
        finally:
            self._stepping_since = None

    def close(self) -> None:
        """End the workers. Idempotent."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._watch.join()
        if self._ranks is not None and self.lost is None:
            self._ranks.close()
        os.close(self._lifeline)
        for channel in self._channels:
            channel.close()
        for process in self._processes:
            try:
                process.wait(CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._folder.cleanup()

    def _watch_all(self) -> None:
        while not self._closed.wait(WATCH_SECONDS):
            problem = self._problem()
            if problem is not None:
                self._lose(RankLost(problem))
                return

    def _problem(self) -> str | None:
        for rank, process in enumerate(self._processes, start=1):
            if process.poll() is not None:
                return f"Rank {rank} of this node ended with exit code {process.returncode}."
        since = self._stepping_since
        if since is not None and self._clock() - since > STALL_SECONDS:
            return f"The ranks of this node have not finished a step for {STALL_SECONDS:.0f} s."
        return None

    def _lose(self, error: RankLost) -> None:
        self.lost = error
        logger.error("%s", error.message)
        if self._on_lost is not None:
            self._on_lost(error)
        if self._exits_when_stuck and not self._closed.wait(EXIT_SECONDS):
            logger.error("this process did not end by itself: ended")
            os._exit(EXIT_LOST)


def _spawn(channel: int, lifeline: int) -> subprocess.Popen[bytes]:
    """A worker in its own session, so that a Ctrl-C in the terminal reaches rank 0 alone."""
    return subprocess.Popen(
        [sys.executable, "-m", _WORKER, str(channel), str(lifeline)],
        pass_fds=(channel, lifeline),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
