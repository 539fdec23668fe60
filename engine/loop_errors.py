"""What a node says of a sequence that its engine refused or failed, and of commands that failed."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from cluster.errors import InternalError, ServingError
from cluster.request import TokenDelta

if TYPE_CHECKING:
    import asyncio
    from concurrent.futures import Future

    from engine.sequence import Sequence

logger = logging.getLogger(__name__)


def refusal(adding: asyncio.Future[None]) -> ServingError | None:
    """Why a scheduler did not take a sequence, which this node can never run; None if it did, or
    if the engine has ended, and the process ends with it."""
    if adding.cancelled():
        return None
    error = adding.exception()
    if error is None or isinstance(error, ServingError):
        return error
    logger.error("a sequence could not be queued", exc_info=error)
    return InternalError("The node could not queue the sequence.")


def unawaited(command: Future[Any]) -> None:
    """Of a command that nobody waits for: what it raised is logged, else nobody would know why
    blocks are missing."""
    command.add_done_callback(_log)


def _log(command: Future[Any]) -> None:
    error = None if command.cancelled() else command.exception()
    if error is not None:
        logger.error("a command to the engine failed", exc_info=error)


def error_delta(sequence: Sequence) -> TokenDelta:
    """The last delta of a sequence that ended in an error."""
    error = sequence.error or InternalError("The sequence ended without a reason.")
    return TokenDelta(sequence_id=sequence.sequence_id, error=error)
