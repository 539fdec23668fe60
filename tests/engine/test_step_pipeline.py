"""A launch that fails: when that is told, the device is through with what was queued of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest

from engine.block_manager import BlockManager
from engine.schedule import ScheduledChunk, ScheduleDecision
from engine.step_pipeline import StepPipeline
from engine.tensor_parallel.failures import RankLost
from tests.sequences import BLOCK_SIZE, make_sequence

if TYPE_CHECKING:
    from engine.model_runner import ModelRunner


class FailingRunner:
    """Queues work on its device, then fails."""

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.is_running = False

    def launch(self, *_: object, **__: object) -> None:
        self.is_running = True
        raise self.error

    def wait(self) -> None:
        self.is_running = False


def launch(error: Exception) -> FailingRunner:
    runner = FailingRunner(error)
    manager = BlockManager(4, BLOCK_SIZE)
    pipeline = StepPipeline(cast("ModelRunner", runner), manager, frozenset(), 100)
    sequence = make_sequence(range(5))
    assert manager.allocate(sequence, 5)
    with pytest.raises(type(error)):
        pipeline.launch(ScheduleDecision((ScheduledChunk(sequence, 5),)), None)
    assert (sequence.num_launched_tokens, sequence.num_launched_draws) == (0, 0)
    manager.free(sequence)
    assert manager.num_free_blocks == 4, "its blocks can be given away at once"
    return runner


def test_what_a_failed_launch_has_queued_does_not_run_on_under_who_gets_its_blocks() -> None:
    assert not launch(RuntimeError("no memory for the logits")).is_running


def test_nobody_waits_for_a_device_that_may_wait_for_a_lost_rank() -> None:
    assert launch(RankLost("gone")).is_running
