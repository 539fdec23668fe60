"""What both ends of a hand-off count of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cluster.errors import InternalError
from tests.kv_transfer.catalogue_worlds import TABLE, with_pair
from tests.kv_twins import DecodeSide, PrefillSide, make_request, until

if TYPE_CHECKING:
    from cluster.errors import ServingError


@pytest.mark.parametrize("error", [None, InternalError("It could not.")], ids=["starts", "fails"])
def test_what_became_of_a_commit_that_was_not_answered_is_counted_by_who_knows(
    error: ServingError | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: a sequence that runs is no KV load that failed, and one that does not is one."""

    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        request = make_request(32)
        name, start = request.sequence_id, decode.source.start

        async def start_after_the_loss(sequence_id: str, first_token_id: int) -> None:
            [peer] = prefill.sender._peers.values()
            peer.cut()
            await until(lambda: prefill.owner.of(name) == ["failed", "free"])
            if error is not None:
                raise error
            await start(sequence_id, first_token_id)

        monkeypatch.setattr(decode.source, "start", start_after_the_loss)
        prefill.hand_off(decode, request)
        prefill.compute(request, TABLE)
        prefill.sender.commit(name, 7)
        await until(lambda: decode.receiver.num_transfers == 0 and name in prefill.owner.errors)
        assert prefill.owner.errors[name].reason == "commit_unknown"
        sent, received = prefill.sender.agent.stats, decode.receiver.agent.stats
        assert (sent.commits_unknown, sent.failures.total(), sent.transfers_done) == (1, 0, 0)
        assert received.transfers_done == (1 if error is None else 0)
        assert received.failures.total() == (0 if error is None else 1)

    with_pair(scenario)
