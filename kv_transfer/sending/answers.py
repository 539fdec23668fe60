"""What a decode node says of the hand-offs to it: each message to the machine of its own.

A message that names another peer's transfer, or one that is over, changes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.delta_codec import decode_error
from cluster.errors import InvalidRequest
from kv_transfer.sending.kv_session import decode_ticket, encode_instruction
from kv_transfer.sending.outgoing_instructions import SendAbortAck

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.clock import Clock
    from cluster.proto import node_pb2 as pb
    from kv_transfer.lease import LeaseTable
    from kv_transfer.sending.outgoing import Instruction
    from kv_transfer.sending.peer import Peer
    from kv_transfer.sending.sendings import Sending, Sendings


class Answers:
    """`did` carries out what the machine of a hand-off says to them."""

    def __init__(
        self,
        sendings: Sendings,
        leases: LeaseTable,
        did: Callable[[Sending, list[Instruction]], None],
        clock: Clock,
    ) -> None:
        self._sendings = sendings
        self._leases = leases
        self._did = did
        self._clock = clock

    def received(self, peer: Peer, frame: pb.ReceiverFrame) -> None:
        match frame.WhichOneof("frame"):
            case "ticket":
                self._on_ticket(peer, frame.ticket)
            case "refused":
                self._on_refused(peer, frame.refused)
            case "committed":
                self._on_committed(peer, frame.committed)
            case "abort":
                self._on_abort(peer, frame.abort)
            case "renew":
                renew = frame.renew
                if self._sendings.find(renew.transfer_id, peer) is not None:
                    self._leases.renew(renew.transfer_id, renew.extend_seconds, self._clock())
            case other:
                raise InvalidRequest(f"A KV session does not answer with {other} here.")

    def _on_ticket(self, peer: Peer, message: pb.Ticket) -> None:
        ticket = decode_ticket(message)
        sending = self._sendings.find(ticket.transfer_id, peer)
        if sending is not None:
            self._did(sending, sending.machine.ticketed(ticket))
            if sending.machine.has_frame:
                peer.wake()

    def _on_refused(self, peer: Peer, message: pb.Refused) -> None:
        sending = self._sendings.find(message.transfer_id, peer)
        if sending is not None:
            self._did(sending, sending.machine.refused(decode_error(message.error)))

    def _on_committed(self, peer: Peer, message: pb.Committed) -> None:
        sending = self._sendings.find(message.transfer_id, peer)
        if sending is not None:
            error = decode_error(message.error) if message.HasField("error") else None
            self._did(sending, sending.machine.committed(error))

    def _on_abort(self, peer: Peer, message: pb.ReceiverAbort) -> None:
        """Always answered, so that the receiver can free: also for what ended here long ago."""
        sending = self._sendings.find(message.transfer_id, peer)
        if sending is not None:
            error = decode_error(message.error)
            self._did(sending, sending.machine.abort_asked(message.epoch, error))
            return
        tombstone = self._sendings.tombstone(message.transfer_id)
        if tombstone is not None:
            ack = SendAbortAck(message.epoch, tombstone.num_frames_posted)
            peer.send(encode_instruction(ack, message.transfer_id))
