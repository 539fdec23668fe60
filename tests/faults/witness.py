"""What a node of a cluster for faults does to blocks, watched from inside and judged at once.

Life of a witness
    1. `watched_node` wraps classes of the node before it is built; nothing else differs.
    2. It keeps books of its own, from calls alone: tickets, writes, verdicts on digests, who has
       registered a block for whom, who holds blocks.
    3. What contradicts an invariant is a line in `FOLDER/witness`, as is who holds and frees
       blocks, and what was looked at: a witness that has seen nothing proves nothing.
    4. `Evidence` takes the lines that came during a load into its history, where the checker
       finds them.

Invariants: I3, nothing starts, or goes on, from a unit whose digest was not found right since its
ticket; I5, whoever hits a cached block has the salt of who computed it; I7, what is accepted
carries the ticket that is current, and no block is given back while something of it is written.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from kv_transfer.receiving.intake_instructions import (
    Free,
    ReportFailed,
    ReportWithdrawn,
    SendAbort,
    SendTicket,
    Start,
)
from tests.faults.history import NO_REQUEST, Event

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from engine.sequence import Sequence as EngineSequence
    from kv_transfer.frame_place import FramePlace
    from kv_transfer.protocol import CommitMessage, FrameHeader
    from kv_transfer.receiving.intake_instructions import Instruction
    from kv_transfer.receiving.receiver import KVReceiver
    from kv_transfer.transfer import Ticket
    from tests.faults.history import History


@dataclass(frozen=True, slots=True)
class Seen:
    """One line. `what`: "I3", "I5", "I7" for a contradiction; "held" or "freed" with the id of a
    request; "looked" with the name of an invariant that something was compared for."""

    what: str
    detail: str
    at: float  # monotonic seconds, the same clock for all processes


class Witness:
    """Writes lines; any thread may."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "witness"
        self._looked: set[str] = set()

    def note(self, what: str, detail: str) -> None:
        line = json.dumps(asdict(Seen(what, detail, time.monotonic()))) + "\n"
        with self._path.open("a") as file:
            file.write(line)

    def judge(self, invariant: str, is_right: bool, problem: str) -> None:
        if invariant not in self._looked:
            self._looked.add(invariant)
            self.note("looked", invariant)
        if not is_right:
            self.note(invariant, problem)


class TransferBooks:
    """Of the hand-offs that come in. On the event loop."""

    def __init__(self, witness: Witness) -> None:
        self._witness = witness
        self._live: dict[bytes, _Live] = {}
        self._commits: dict[bytes, tuple[int, int]] = {}

    def instructed(self, receiver: KVReceiver, instruction: Instruction) -> None:
        num_layers = receiver.agent.pool.num_layers
        match instruction:
            case SendTicket(_, ticket):
                transfer = receiver._intake.transfers[ticket.transfer_id]
                self._live[ticket.transfer_id] = _Live(
                    ticket, transfer.digest_seed, transfer.block_ids
                )
            case Start(sequence):
                self._started(sequence.transfer_id, num_layers)
            case SendAbort(_, transfer_id):
                self._ended(transfer_id)
            case ReportFailed(sequence) | ReportWithdrawn(sequence):
                self._ended(sequence.transfer_id)
            case Free(sequence, num_good_blocks):
                goes_on = sequence.transfer_id in receiver._fates.recomputing
                self._freed(sequence.transfer_id, num_good_blocks if goes_on else 0, num_layers)

    def accepted(self, receiver: KVReceiver, header: FrameHeader) -> None:
        live = self._live.get(header.transfer_id)
        named = header.incarnation, header.epoch, header.nonce
        is_current = live is not None and not live.is_over and named == live.names
        is_ours = header.incarnation == receiver.node_id.incarnation
        self._witness.judge("I7", is_current and is_ours, "a frame of no current ticket")

    def commit_came(self, commit: CommitMessage) -> None:
        self._commits[commit.transfer_id] = commit.epoch, commit.nonce

    def writes(self, place: FramePlace) -> None:
        """From now on, until `wrote`, something may write into these blocks."""
        live = self._of(place)
        is_owner = live is not None and set(place.block_ids) <= set(live.block_ids)
        self._witness.judge("I7", is_owner, f"blocks {place.block_ids} are written by a stranger")
        if live is not None:
            live.num_writing += 1

    def wrote(self, place: FramePlace) -> None:
        live = self._of(place)
        if live is not None:
            live.num_writing -= 1

    def found(self, place: FramePlace, is_right: bool) -> None:
        """The verdict on the digests of what was written."""
        live = self._of(place)
        if live is not None and is_right:
            for block_id in place.block_ids:
                live.num_verified[block_id] += place.num_layers

    def _of(self, place: FramePlace) -> _Live | None:
        return next((live for live in self._live.values() if live.seed == place.seal.seed), None)

    def _started(self, transfer_id: bytes, num_layers: int) -> None:
        live = self._live.pop(transfer_id)
        names = live.ticket.epoch, live.ticket.nonce
        is_asked = self._commits.pop(transfer_id, None) == names
        self._witness.judge("I7", is_asked and not live.is_over, "a start without its commit")
        self._judge_verified(live, len(live.block_ids), num_layers)

    def _ended(self, transfer_id: bytes) -> None:
        if live := self._live.get(transfer_id):
            live.is_over = True

    def _freed(self, transfer_id: bytes, num_good_blocks: int, num_layers: int) -> None:
        live = self._live.pop(transfer_id, None)
        self._commits.pop(transfer_id, None)
        if live is not None:
            problem = "blocks are given back while they are written"
            self._witness.judge("I7", live.num_writing == 0, problem)
            self._judge_verified(live, num_good_blocks, num_layers)

    def _judge_verified(self, live: _Live, num_blocks: int, num_layers: int) -> None:
        for position in live.ticket.missing_positions:
            if position < num_blocks:
                num_verified = live.num_verified[live.block_ids[position]]
                problem = f"block {position} has {num_verified} verified layers"
                self._witness.judge("I3", num_verified == num_layers, problem)


class _Live:
    """A ticket that is out, and what became of its blocks since."""

    def __init__(self, ticket: Ticket, seed: int, block_ids: Sequence[int]) -> None:
        self.ticket, self.seed, self.block_ids = ticket, seed, block_ids
        self.names = ticket.incarnation, ticket.epoch, ticket.nonce
        self.is_over = False
        self.num_writing = 0
        self.num_verified: Counter[int] = Counter()  # layers, by block


class BlockBooks:
    """Whose the cached blocks are. On the engine's thread."""

    def __init__(self, witness: Witness) -> None:
        self._witness = witness
        self._salts: dict[int, bytes] = {}  # of who has registered the block

    def registered(self, sequence: EngineSequence, first: int) -> None:
        for block_id in sequence.block_table[first : sequence.num_registered_blocks]:
            self._salts[block_id] = sequence.request.cache_salt

    def given(self, block_ids: Iterable[int]) -> None:
        """They went to the cache without a sequence: whose they were before counts for nothing."""
        for block_id in block_ids:
            self._salts.pop(block_id, None)

    def hit(self, sequence: EngineSequence, block_ids: Iterable[int]) -> None:
        salt = sequence.request.cache_salt
        for block_id in block_ids:
            owner = self._salts.get(block_id, salt)
            self._witness.judge("I5", owner == salt, f"{salt!r} reads a block of {owner!r}")
        self._witness.note("held", sequence.request.request_id)

    def freed(self, sequence: EngineSequence) -> None:
        if sequence.block_table:
            self._witness.note("freed", sequence.request.request_id)


class Evidence:
    """What the witnesses of a cluster have seen, read piece by piece. `looked`: invariants that
    some of them has compared something for."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        """`folders`: of each node by name."""
        self.looked: set[str] = set()
        self._folders = folders
        self._num_read = Counter[str]()

    def take(self, history: History) -> None:
        """Add what is new."""
        for name, folder in self._folders.items():
            for seen in self._new_of(name, folder):
                if seen.what == "looked":
                    self.looked.add(seen.detail)
                elif seen.what in ("held", "freed"):
                    detail = f"{seen.detail} {name}"
                    history.add(Event(NO_REQUEST, seen.what, seen.at, detail=detail))
                else:
                    detail = f"{name}: {seen.what}, {seen.detail}"
                    history.add(Event(NO_REQUEST, "contradiction", seen.at, detail=detail))

    def _new_of(self, name: str, folder: Path) -> list[Seen]:
        try:
            text = (folder / "witness").read_text()
        except FileNotFoundError:
            return []
        lines = text[: text.rfind("\n") + 1].splitlines()[self._num_read[name] :]
        self._num_read[name] += len(lines)
        return [Seen(**json.loads(line)) for line in lines]
