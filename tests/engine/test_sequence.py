"""A sequence's own books: hashes, ends, and what a model must refuse."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.errors import ContextLengthExceeded, InternalError, InvalidRequest
from cluster.prefix_hash import hash_blocks
from cluster.request import FinishReason
from engine.sequence import SequenceStatus, check_request
from tests.sequences import BLOCK_SIZE, ROOT, make_request, make_sequence


def test_hashes_extended_token_by_token_are_those_of_the_whole() -> None:
    sequence = make_sequence(range(6))
    for token_id in range(100, 111):
        sequence.append_token(token_id)
        sequence.extend_block_hashes()
    assert sequence.block_hashes == hash_blocks(sequence.token_ids, BLOCK_SIZE, ROOT)
    assert len(sequence.block_hashes) == 4


def test_tokens_drawn_elsewhere_are_output() -> None:
    sequence = make_sequence([1, 2, 3], output=[9])
    assert sequence.num_output_tokens == 1
    assert sequence.output_token_ids == [9]
    assert sequence.num_uncomputed_tokens == 4


def test_a_sequence_ends_once() -> None:
    sequence = make_sequence([1])
    sequence.finish(FinishReason.STOP, 7)
    assert sequence.status is SequenceStatus.FINISHED
    assert sequence.stop_token_id == 7
    with pytest.raises(RuntimeError, match="ended twice"):
        sequence.fail(InternalError("late"))
    assert sequence.error is None


def test_a_request_for_this_model_passes() -> None:
    request = make_request([0, 99], logit_bias=((99, 1.0),), stop_token_ids=(3,))
    check_request(request, vocab_size=100, max_model_len=3)


@pytest.mark.parametrize(
    ("prompt", "sampling", "param"),
    [
        ([], {}, "prompt"),
        ([1, 100], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([1], {"logit_bias": ((100, 1.0),)}, "logit_bias"),
        ([1], {"stop_token_ids": (100,)}, "stop_token_ids"),
    ],
)
def test_ids_that_the_model_does_not_have_are_refused(
    prompt: list[int], sampling: dict[str, Any], param: str
) -> None:
    request = make_request(prompt, **sampling)
    with pytest.raises(InvalidRequest) as caught:
        check_request(request, vocab_size=100, max_model_len=50)
    assert caught.value.param == param


def test_a_prompt_that_leaves_no_room_for_a_token_is_refused() -> None:
    with pytest.raises(ContextLengthExceeded):
        check_request(make_request(range(50)), vocab_size=100, max_model_len=50)
