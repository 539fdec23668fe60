"""When a sequence is over, and why."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.request import FinishReason
from engine.sampling_plan import ending_token_ids
from engine.stopping import Finish, check_finished
from tests.sequences import make_sequence

EOS, STOP_ID, OTHER = 2, 7, 5
STOPPED_BY_EOS = Finish(FinishReason.STOP, EOS)
STOPPED_BY_ID = Finish(FinishReason.STOP, STOP_ID)
FULL = Finish(FinishReason.LENGTH)


@pytest.mark.parametrize(
    ("output", "sampling", "expected"),
    [
        ([OTHER], {}, None),
        ([EOS], {}, STOPPED_BY_EOS),
        ([OTHER, EOS], {}, STOPPED_BY_EOS),
        ([EOS, OTHER], {}, None),
        ([EOS], {"ignore_eos": True}, None),
        ([STOP_ID], {}, None),
        ([STOP_ID], {"stop_token_ids": (9, STOP_ID)}, STOPPED_BY_ID),
        ([EOS], {"ignore_eos": True, "stop_token_ids": (EOS,)}, STOPPED_BY_EOS),
        ([EOS], {"min_tokens": 2}, None),
        ([OTHER, EOS], {"min_tokens": 2}, STOPPED_BY_EOS),
        ([STOP_ID], {"min_tokens": 2, "stop_token_ids": (STOP_ID,)}, None),
        ([OTHER] * 3, {"max_tokens": 3}, FULL),
        ([OTHER] * 2, {"max_tokens": 3}, None),
        ([OTHER, OTHER, EOS], {"max_tokens": 3}, STOPPED_BY_EOS),
        ([OTHER] * 6, {}, FULL),  # 4 prompt tokens + 6 = the model's 10
        ([OTHER] * 6, {"min_tokens": 8}, FULL),
    ],
)
def test_the_last_token_decides(
    output: list[int], sampling: dict[str, Any], expected: Finish | None
) -> None:
    sequence = make_sequence(range(10, 14), output=output, **sampling)
    assert check_finished(sequence, eos_token_ids={EOS, 3}, max_model_len=10) == expected


def test_an_end_token_in_the_prompt_does_not_matter() -> None:
    sequence = make_sequence([EOS, STOP_ID], output=[OTHER], stop_token_ids=(STOP_ID,))
    assert check_finished(sequence, eos_token_ids={EOS}, max_model_len=10) is None


def test_what_ends_a_sequence_follows_its_parameters() -> None:
    sampling = make_sequence([1], stop_token_ids=(STOP_ID,)).sampling
    assert ending_token_ids(sampling, {EOS}) == {EOS, STOP_ID}
    ignoring = make_sequence([1], stop_token_ids=(STOP_ID,), ignore_eos=True).sampling
    assert ending_token_ids(ignoring, {EOS}) == {STOP_ID}
