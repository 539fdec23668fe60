"""What takes a receiver time: to ask the node for blocks, to start a sequence, to cut a connection.

Each is a task, and the intake hears how it ended, well or not. Errors end here: a sender, and
all that waits for blocks, hang on the answer.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from cluster.errors import Cancelled, InternalError, ServingError
from cluster.isolation import isolated, tried
from kv_transfer.trace import TRACE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from cluster.clock import Clock
    from kv_transfer.agent import TransferAgent
    from kv_transfer.receiving.block_source import BlockSource, ReservedBlocks
    from kv_transfer.receiving.incoming import IncomingSequence
    from kv_transfer.receiving.intake import Intake
    from kv_transfer.receiving.intake_instructions import Instruction
    from kv_transfer.receiving.sessions import Sessions
    from kv_transfer.receiving.tasks import Tasks

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Errands:
    """`execute` carries out what the intake says to their ends."""

    def __init__(
        self,
        agent: TransferAgent,
        source: BlockSource,
        intake: Intake,
        sessions: Sessions,
        tasks: Tasks,
        execute: Callable[[Sequence[Instruction]], None],
        clock: Clock,
    ) -> None:
        self._agent = agent
        self._source = source
        self._intake = intake
        self._sessions = sessions
        self._tasks = tasks
        self._execute = execute
        self._clock = clock
        self._asking: dict[bytes, asyncio.Task[None]] = {}

    def ask(self, sequence: IncomingSequence) -> None:
        self._asking[sequence.transfer_id] = self._tasks.spawn(self._ask(sequence))

    def stop_asking(self, transfer_id: bytes) -> None:
        """Not before its first step: it would never say that it has ended."""
        asyncio.get_running_loop().call_soon(self._asking[transfer_id].cancel)

    def start(self, sequence: IncomingSequence, first_token_id: int) -> None:
        """The node hears of it at once: a client waits. How it ended, the intake hears later."""
        if TRACE.is_on:
            TRACE.mark("r.start")
        start = partial(self._source.start, sequence.sequence_id, first_token_id)
        self._tasks.spawn(self._start(sequence, tried(start)))

    def revoke(self, session_id: int) -> None:
        self._tasks.spawn(self._revoke(session_id))

    async def _ask(self, sequence: IncomingSequence) -> None:
        transfer_id = sequence.transfer_id
        asking = self._source.reserve(sequence.request, sequence.gateway_id)
        blocks: ReservedBlocks | ServingError
        try:
            blocks = await _outcome(asking, "The decode node could not reserve blocks.")
        except asyncio.CancelledError:
            blocks = Cancelled("The reservation is not wanted any more.")
        if isinstance(blocks, ServingError):
            instructions = self._intake.reserve_failed(transfer_id, blocks, self._clock())
        else:
            table = tuple(blocks.block_ids)
            self._prepare(table)
            instructions = self._intake.reserved(
                transfer_id, table, blocks.num_held_blocks, self._clock()
            )
        del self._asking[transfer_id]
        self._execute(instructions)

    def _prepare(self, table: tuple[int, ...]) -> None:
        """While nobody waits for it. What cannot be done now shows when the first frame is placed,
        as a failure that is told."""
        prepare = partial(self._agent.pool.prepare, table)
        isolated(prepare, "blocks could not be prepared for", logger)

    async def _start(
        self, sequence: IncomingSequence, starting: Awaitable[None] | Exception
    ) -> None:
        transfer_id = sequence.transfer_id
        error = await _outcome(starting, "The decode node could not start the sequence.")
        if error is not None:
            instructions = self._intake.start_failed(transfer_id, error, self._clock())
        else:
            began_at = self._intake.transfers[transfer_id].began_at
            self._agent.stats.transfers_done += 1
            self._agent.stats.transfer_seconds += self._clock() - began_at
            instructions = self._intake.started(transfer_id, self._clock())
        self._execute(instructions)

    async def _revoke(self, session_id: int) -> None:
        session = self._sessions.remove(session_id)
        self._agent.stats.revocations += 1
        is_revoked = await _outcome(session.revoke(), "A connection could not be cut.")
        if is_revoked is True:  # else, who knows what still writes
            self._execute(self._intake.session_revoked(session_id, self._clock()))
        else:
            self._execute(self._intake.revocation_failed(session_id, self._clock()))
            self._agent.quarantine.keep(
                num_blocks=self._intake.num_stuck_blocks(session_id),
                num_slots=self._agent.staging.num_owned_by(session_id),
                peer=session.peer.name,
            )


async def _outcome(errand: Awaitable[T] | Exception, apology: str) -> T | ServingError:
    """What it gives, or why it gives nothing, if only because it could not begin: of the task that
    runs it nobody else hears."""
    try:
        if isinstance(errand, Exception):
            raise errand
        return await errand
    except ServingError as refused:
        return refused
    except Exception:
        logger.exception("an errand failed: %s", apology)
        return InternalError(apology)
