"""Commands in their order, and rehearsals, which are none."""

from __future__ import annotations

import queue
from concurrent.futures import CancelledError

import pytest

from engine.commands import Commands


class Stage:
    """Commands, and how often a rehearsal was played."""

    def __init__(self) -> None:
        self.num_played = 0
        self.commands = Commands(self._play)

    def _play(self) -> None:
        self.num_played += 1


def test_who_waits_plays_a_rehearsal_once_and_then_gets_the_command() -> None:
    stage = Stage()
    stage.commands.rehearse()
    stage.commands.rehearse()
    asked = stage.commands.call(lambda: 7)
    command = stage.commands.wait()
    assert command is not None
    command.execute()
    assert asked.result(0) == 7
    assert stage.num_played == 1


def test_it_is_played_again_when_it_is_asked_for_again() -> None:
    stage = Stage()
    for num_played in (1, 2):
        stage.commands.rehearse()
        with pytest.raises(queue.Empty):
            stage.commands.wait(0.001)
        assert stage.num_played == num_played


def test_who_has_work_forgets_a_rehearsal() -> None:
    stage = Stage()
    stage.commands.rehearse()
    stage.commands.call(lambda: 7)
    assert stage.commands.take() is not None
    with pytest.raises(queue.Empty):
        stage.commands.take()
    assert stage.num_played == 0
    stage.commands.rehearse()
    with pytest.raises(queue.Empty):
        stage.commands.wait(0.001)
    assert stage.num_played == 1


def test_a_command_that_was_cancelled_is_not_run() -> None:
    stage = Stage()
    asked = stage.commands.call(lambda: pytest.fail("nobody wants it"))
    asked.cancel()
    command = stage.commands.take()
    assert command is not None
    command.execute()


def test_the_end_cancels_what_is_left_and_what_comes() -> None:
    stage = Stage()
    left = stage.commands.call(lambda: 1)
    stage.commands.rehearse()
    stage.commands.stop()
    stage.commands.end()
    late = stage.commands.call(lambda: 2)
    for future in (left, late):
        with pytest.raises(CancelledError):
            future.result(0)
