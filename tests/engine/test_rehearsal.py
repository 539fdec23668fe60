"""A rehearsed launch is nobody's: the steps around it give what they give without it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.step_pipeline import InFlightStep
    from tests.engine.conftest import OpenEngine, RunGreedy

PROMPTS = [list(range(5, 5 + length)) for length in (3, 40, 17)]


def check_rehearsals(engine: Engine, run_greedy: RunGreedy) -> None:
    """On any device. One before each step, and one that nothing follows."""

    def tokens() -> list[list[int]]:
        engine.block_manager.reset_prefix_cache()
        sequences = run_greedy(engine, PROMPTS, chunk=32, num_tokens=8)
        return [list(sequence.output_token_ids) for sequence in sequences]

    expected = tokens()
    launch = engine.launch

    def launch_rehearsed(*args: Any, **named: Any) -> InFlightStep:
        engine.rehearse()
        return launch(*args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "launch", launch_rehearsed)
        assert tokens() == expected
    engine.rehearse()
    assert tokens() == expected


def test_a_rehearsed_launch_leaves_the_steps_around_it_alone(
    open_engine: OpenEngine, run_greedy: RunGreedy
) -> None:
    check_rehearsals(open_engine("llama3", max_model_len=128), run_greedy)
