"""A decode node that repeats itself, or says what no decode node may say."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from cluster.delta_codec import encode_error
from cluster.proto import node_pb2 as pb
from kv_transfer.failures import FailureReason, failure
from kv_transfer.receiving.intake_instructions import SendTicket
from kv_transfer.receiving.kv_session import encode_instruction
from kv_transfer.transports.loopback import LoopbackNetwork, LoopbackTransport
from tests.kv_transfer.catalogue_worlds import TABLE, stop_timers, with_hanging_link, with_pair
from tests.kv_twins import (
    DecodeSide,
    PrefillSide,
    decode_side,
    make_request,
    prefill_side,
    until,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.errors import ServingError
    from kv_transfer.sending.sendings import Sending

STALL_SECONDS, DRAIN_SECONDS = 25.0, 5.0


def ticket_again(sending: Sending) -> pb.ReceiverFrame:
    assert sending.machine.ticket is not None
    return encode_instruction(SendTicket(0, sending.machine.ticket))


def abort_again(sending: Sending) -> pb.ReceiverFrame:
    error = encode_error(failure(FailureReason.ABORTED))
    return pb.ReceiverFrame(abort=pb.ReceiverAbort(transfer_id=sending.transfer_id, error=error))


def test_a_decode_node_that_repeats_itself_holds_no_sources_for_longer() -> None:
    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        stop_timers(prefill, None)
        request = make_request(30)
        name = request.sequence_id
        prefill.hand_off(decode, request)
        prefill.compute(request, TABLE)
        [sending] = prefill.sender._sendings
        await until(lambda: sending.machine.num_posted == 1)

        def pass_time(seconds: float, repeated: Callable[[Sending], pb.ReceiverFrame]) -> None:
            for _ in range(5):
                prefill.sender.received(sending.peer, repeated(sending))
                prefill.clock.advance(seconds / 5)
                prefill.sender.sweep()

        pass_time(STALL_SECONDS, ticket_again)
        assert prefill.owner.of(name) == ["failed"], "its sends still read the blocks"
        assert prefill.owner.errors[name].reason == "transfer_timeout"
        pass_time(DRAIN_SECONDS, abort_again)
        await until(lambda: prefill.owner.of(name) == ["failed", "free"])

    with_hanging_link(scenario, stall_seconds=STALL_SECONDS, drain_seconds=DRAIN_SECONDS)


@pytest.mark.parametrize(
    "nonsense",
    [
        pb.ReceiverFrame(ticket=pb.Ticket(transfer_id=b"short")),
        pb.ReceiverFrame(ticket=pb.Ticket(transfer_id=b"t" * 16, expires_in_seconds=float("nan"))),
        pb.ReceiverFrame(hello=pb.ReceiverHello()),
        pb.ReceiverFrame(),
    ],
    ids=["short", "nan", "hello", "nothing"],
)
def test_no_client_is_told_that_its_request_is_wrong_when_a_decode_node_is(
    nonsense: pb.ReceiverFrame, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def say_nonsense(_: object) -> pb.ReceiverFrame:
        return nonsense

    monkeypatch.setattr("kv_transfer.receiving.kv_session.encode_instruction", say_nonsense)

    async def scenario(prefill: PrefillSide, decode: DecodeSide) -> None:
        request = make_request(30)
        name = request.sequence_id
        prefill.hand_off(decode, request)
        await until(lambda: prefill.owner.of(name) == ["failed", "free"])
        is_the_peers(prefill.owner.errors[name])
        assert any("d0 broke the protocol" in message for message in caplog.messages)

    with_pair(scenario)


def test_no_client_is_told_that_its_request_is_wrong_when_the_nodes_do_not_greet_each_other() -> (
    None
):
    async def main() -> None:
        network = LoopbackNetwork()
        async with (
            decode_side(LoopbackTransport(network)) as decode,
            prefill_side(LoopbackTransport(network), name="a line\nof a log") as prefill,
        ):
            request = make_request(30)
            name = request.sequence_id
            prefill.hand_off(decode, request)
            await until(lambda: prefill.owner.of(name) == ["failed", "free"])
            is_the_peers(prefill.owner.errors[name])

    asyncio.run(main())


def is_the_peers(error: ServingError) -> None:
    assert (error.code, error.reason, error.retryable) == ("kv_load_failed", "decode_lost", True)
