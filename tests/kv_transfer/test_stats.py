"""What both ends of a hand-off count of it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from cluster.errors import InternalError
from kv_transfer.agent import TransferAgent
from kv_transfer.failures import FailureReason, failure
from kv_transfer.metrics import TransferCollector
from kv_transfer.transports.loopback import LoopbackEndpoint, LoopbackNetwork, LoopbackTransport
from tests.kv_transfer.catalogue_worlds import TABLE, with_hanging_link, with_pair
from tests.kv_twins import (
    DecodeSide,
    PrefillSide,
    make_config,
    make_pool,
    make_request,
    until,
)

if TYPE_CHECKING:
    import torch

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


class UntoldTransport(LoopbackTransport):
    """What it sends arrives, but its sends end with the connection only: as where a receiver reads
    slots, and has not said yet that it has."""

    async def connect(self, host: str, port: int, session_id: int) -> LoopbackEndpoint:
        endpoint = await super().connect(host, port, session_id)
        send = endpoint.send

        def send_untold(buffer: torch.Tensor, tag: int) -> asyncio.Future[None]:
            send(buffer.clone(), tag)
            sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            endpoint.on_close(lambda: sent.set_exception(failure(FailureReason.LINK_LOST)))
            return sent

        endpoint.send = send_untold  # type: ignore[method-assign]
        return endpoint


def test_a_commit_behind_frames_that_were_not_given_back_is_no_failure_when_its_link_breaks() -> (
    None
):
    """It shows at the frames first; the decode node has them, and runs the sequence."""

    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        request = make_request(32)
        name, start = request.sequence_id, decode.source.start

        async def start_after_the_loss(sequence_id: str, first_token_id: int) -> None:
            [peer] = prefill.sender._peers.values()
            assert peer._endpoint is not None
            await peer._endpoint.close()
            await until(lambda: prefill.owner.of(name) == ["failed", "free"])
            await start(sequence_id, first_token_id)

        decode.source.start = start_after_the_loss  # type: ignore[method-assign]
        prefill.hand_off(decode, request)
        prefill.compute(request, TABLE)
        prefill.sender.commit(name, 7)
        await until(lambda: decode.receiver.agent.stats.transfers_done == 1)
        assert prefill.owner.errors[name].reason == "commit_unknown"
        sent = prefill.sender.agent.stats
        assert (sent.commits_unknown, sent.failures.total()) == (1, 0)

    with_hanging_link(scenario, UntoldTransport)


def test_slots_of_who_receives_beside_who_sends_are_counted_too() -> None:
    """A leak among them must show; what is lost of them is not taken from the others."""
    agent = TransferAgent((make_pool(1),), make_config(), LoopbackTransport(LoopbackNetwork()))
    staging = agent.beside(2).staging
    assert [staging.take(name) is not None for name in ("taken", "lost")] == [True, True]
    agent.quarantine.keep(num_blocks=0, num_slots=1, peer="lost")
    collector = TransferCollector(agent.stats, transports=tuple, agent=agent)
    [slots] = [each for each in collector.collect() if each.name == "baton_kv_staging_slots"]
    by_state = {sample.labels["state"]: sample.value for sample in slots.samples}
    assert by_state == {"free": 4, "taken": 1, "lost": 1}
    agent.pool.close()


def test_lost_slots_of_who_receives_beside_who_sends_are_a_share_of_all_slots() -> None:
    agent = TransferAgent(
        (make_pool(1),),
        make_config(num_staging_slots=8, max_quarantined_share=0.25),
        LoopbackTransport(LoopbackNetwork()),
    )
    ends: list[ServingError] = []
    agent.quarantine.watch(ends.append)
    beside = agent.beside(2)
    beside.quarantine.keep(num_blocks=0, num_slots=2, peer="lost")
    assert not ends, "two of ten"
    agent.quarantine.keep(num_blocks=0, num_slots=1, peer="lost")
    assert len(ends) == 1
    agent.pool.close()
