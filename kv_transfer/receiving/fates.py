"""What the node is told of transfers that end without a start: failed, withdrawn, blocks free.

It is told in the middle of other work: of a sweep over all transfers, of a frame, of a lost link.
Whatever the node makes of it, that work goes on.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from cluster.errors import InternalError
from kv_transfer.failures import failure_label

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.errors import ServingError
    from kv_transfer.receiving.block_source import BlockSource
    from kv_transfer.receiving.incoming import IncomingSequence
    from kv_transfer.receiving.intake import Intake
    from kv_transfer.stats import TransferStats

logger = logging.getLogger(__name__)


class Fates:
    def __init__(self, source: BlockSource, intake: Intake, stats: TransferStats) -> None:
        self._source = source
        self._intake = intake
        self._stats = stats
        self.recomputing: set[bytes] = set()  # transfers whose blocks the node goes on with

    def failed(
        self, sequence: IncomingSequence, error: ServingError, num_good_blocks: int | None
    ) -> None:
        sequence_id, stats = sequence.sequence_id, self._stats
        policy = sequence.kv_load_failure_policy.value
        stats.failures[failure_label(error), policy] += 1
        if num_good_blocks is not None and _tell(
            lambda: self._source.may_recompute(sequence_id, num_good_blocks)
        ):
            self.recomputing.add(sequence.transfer_id)
            self._intake.taken_over(sequence.transfer_id)
            stats.recomputes[failure_label(error)] += 1
        else:
            _tell(lambda: self._source.on_transfer_failed(sequence_id, error))

    def withdrawn(self, sequence: IncomingSequence) -> None:
        _tell(lambda: self._source.on_transfer_withdrawn(sequence.sequence_id))

    def free(self, sequence: IncomingSequence, num_good_blocks: int) -> None:
        sequence_id = sequence.sequence_id
        if sequence.transfer_id in self.recomputing:
            self.recomputing.discard(sequence.transfer_id)
            if _tell(lambda: self._source.recompute(sequence_id, num_good_blocks)):
                return
            error = InternalError("The decode node could not compute what is missing.")
            _tell(lambda: self._source.on_transfer_failed(sequence_id, error))
        _tell(lambda: self._source.release(sequence_id))


def _tell(tell: Callable[[], bool | None]) -> bool:
    """Whether the node has taken it: False when it says so, or breaks."""
    try:
        return tell() is not False
    except Exception:  # the node's: all other transfers hang on who tells it
        logger.exception("the node could not be told of a transfer's end")
        return False
