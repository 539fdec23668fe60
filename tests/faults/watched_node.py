"""Puts a witness into a node, around the methods that its books hear of (`witness.py`)."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

from engine.block_manager import BlockManager
from engine.lent_blocks import LentBlocks
from kv_transfer.pool import TransferPool
from kv_transfer.receiving.arrivals import PiecesArrival
from kv_transfer.receiving.intake_instructions import Dropping, Landing
from kv_transfer.receiving.receiver import KVReceiver
from tests.faults.witness import BlockBooks, TransferBooks, Witness

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from engine.reservation import Reservation
    from engine.sequence import Sequence as EngineSequence
    from kv_transfer.frame_place import FramePlace
    from kv_transfer.protocol import CommitMessage, FrameHeader
    from kv_transfer.receiving.intake_instructions import Instruction


def watch(folder: Path) -> None:
    """Every node that is built from here on is watched."""
    witness = Witness(folder)
    books = TransferBooks(witness)
    _watch_messages(books)
    _watch_writes(books)
    _watch_blocks(BlockBooks(witness))


def _watch_messages(books: TransferBooks) -> None:
    execute, arrived = KVReceiver._execute, KVReceiver.frame_arrived
    commit_arrived = KVReceiver.commit_arrived

    @wraps(execute)
    def executed(self: KVReceiver, instructions: Sequence[Instruction]) -> None:
        for instruction in instructions:
            books.instructed(self, instruction)
        execute(self, instructions)

    @wraps(arrived)
    def frame_arrived(self: KVReceiver, session_id: int, header: FrameHeader) -> Landing | Dropping:
        fate = arrived(self, session_id, header)
        if isinstance(fate, Landing):
            books.accepted(self, header)
        return fate

    @wraps(commit_arrived)
    def commit_came(self: KVReceiver, session_id: int, commit: CommitMessage) -> None:
        books.commit_came(commit)
        commit_arrived(self, session_id, commit)

    KVReceiver._execute = executed  # type: ignore[method-assign]
    KVReceiver.frame_arrived = frame_arrived  # type: ignore[method-assign]
    KVReceiver.commit_arrived = commit_came  # type: ignore[method-assign]


def _watch_writes(books: TransferBooks) -> None:
    scatter, receive = TransferPool.begin_scatter, PiecesArrival.receive
    place_pieces = PiecesArrival.place

    def tell(done: asyncio.Future[bool], place: FramePlace) -> None:
        done.add_done_callback(
            lambda _: books.found(place, done.exception() is None and done.result())
        )

    @wraps(scatter)
    def scattered(
        self: TransferPool, slot: Any, place: FramePlace, **options: Any
    ) -> asyncio.Future[bool]:
        books.writes(place)
        done = scatter(self, slot, place, **options)
        done.add_done_callback(lambda _: books.wrote(place))
        tell(done, place)
        return done

    @wraps(receive)
    def received(self: PiecesArrival) -> asyncio.Future[None]:
        books.writes(self._place)
        done = receive(self)
        done.add_done_callback(lambda _: books.wrote(self._place))
        return done

    @wraps(place_pieces)
    def placed(self: PiecesArrival) -> asyncio.Future[bool]:
        done = place_pieces(self)
        tell(done, self._place)
        return done

    TransferPool.begin_scatter = scattered  # type: ignore[assignment, method-assign]
    PiecesArrival.receive = received  # type: ignore[method-assign]
    PiecesArrival.place = placed  # type: ignore[method-assign]


def _watch_blocks(books: BlockBooks) -> None:
    allocate, hand_over = BlockManager._allocate_first, LentBlocks.hand_over
    cache = LentBlocks.cache
    mark_computed, free = BlockManager.mark_computed, BlockManager.free

    @wraps(allocate)
    def allocated(self: BlockManager, sequence: EngineSequence, *arguments: Any) -> bool:
        is_allocated = allocate(self, sequence, *arguments)
        if is_allocated:
            books.hit(sequence, sequence.block_table[: sequence.num_registered_blocks])
        return is_allocated

    @wraps(hand_over)
    def handed_over(
        self: LentBlocks, reservation: Reservation, sequence: EngineSequence, num_tokens: int
    ) -> None:
        hand_over(self, reservation, sequence, num_tokens)
        books.hit(sequence, reservation.block_ids[: reservation.num_held_blocks])

    @wraps(cache)
    def cached(self: LentBlocks, reservation: Reservation, block_hashes: Iterable[Any]) -> None:
        cache(self, reservation, block_hashes)
        books.given(reservation.block_ids[reservation.num_held_blocks :])

    @wraps(mark_computed)
    def marked(self: BlockManager, sequence: EngineSequence) -> None:
        first = sequence.num_registered_blocks
        mark_computed(self, sequence)
        books.registered(sequence, first)

    @wraps(free)
    def freed(self: BlockManager, sequence: EngineSequence) -> None:
        books.freed(sequence)
        free(self, sequence)

    BlockManager._allocate_first = allocated  # type: ignore[assignment, method-assign]
    LentBlocks.cache = cached  # type: ignore[method-assign]
    LentBlocks.hand_over = handed_over  # type: ignore[assignment, method-assign]
    BlockManager.mark_computed = marked  # type: ignore[method-assign]
    BlockManager.free = freed  # type: ignore[method-assign]
