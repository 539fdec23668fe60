"""What a receiver tells its node, and what it does when the node breaks over it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from cluster.request import KVLoadFailurePolicy
from kv_transfer.failures import FailureReason, failure
from kv_transfer.receiving.fates import Fates
from kv_transfer.receiving.incoming import IncomingSequence
from kv_transfer.stats import TransferStats
from tests.kv_twins import BLOCK_SIZE, Source, make_request

if TYPE_CHECKING:
    from cluster.request import SequenceRequest


class Recomputing(Source):
    """It allows to recompute, and cannot: that raises."""

    def may_recompute(self, sequence_id: str, num_good_blocks: int) -> bool:
        return True


def fates_of(source: Source) -> Fates:
    intake = cast("Any", SimpleNamespace(taken_over=lambda _: None))
    return Fates(source, intake, TransferStats())


def recomputable(request: SequenceRequest) -> IncomingSequence:
    return IncomingSequence(
        transfer_id=bytes(16),
        attempt=1,
        request=request,
        gateway_id="gateway",
        kv_load_failure_policy=KVLoadFailurePolicy.RECOMPUTE,
    )


def test_a_sequence_that_cannot_be_recomputed_after_all_fails_and_gives_its_blocks_back() -> None:
    request = make_request(BLOCK_SIZE)
    source = Recomputing([], owned={request.sequence_id: (3,)})
    fates, sequence = fates_of(source), recomputable(request)
    fates.failed(sequence, failure(FailureReason.LINK_LOST), 1)
    assert source.log == []
    fates.free(sequence, 1)
    assert source.of(request.sequence_id) == ["failed", "released"]
    assert source.free == [3]


def test_a_sequence_whose_blocks_never_come_back_is_not_recomputed_after_all() -> None:
    request = make_request(BLOCK_SIZE)
    source = Recomputing([], owned={request.sequence_id: (3,)})
    fates, sequence = fates_of(source), recomputable(request)
    fates.failed(sequence, failure(FailureReason.LINK_LOST), 1)
    fates.stranded(sequence, failure(FailureReason.LINK_LOST))
    assert source.of(request.sequence_id) == ["failed"]
    assert not fates.recomputing
    assert source.free == []
