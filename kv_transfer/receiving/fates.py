"""What the node is told of transfers that end without a start: failed, withdrawn, blocks free.

Whatever the node makes of it, the work in which it is told goes on (`telling.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.errors import InternalError
from kv_transfer.failures import failure_label
from kv_transfer.telling import told

if TYPE_CHECKING:
    from cluster.errors import ServingError
    from kv_transfer.receiving.block_source import BlockSource
    from kv_transfer.receiving.incoming import IncomingSequence
    from kv_transfer.receiving.intake import Intake
    from kv_transfer.stats import TransferStats


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
        stats.failed(error, sequence.kv_load_failure_policy)
        if num_good_blocks is not None and told(
            lambda: self._source.may_recompute(sequence_id, num_good_blocks)
        ):
            self.recomputing.add(sequence.transfer_id)
            self._intake.taken_over(sequence.transfer_id)
            stats.recomputes[failure_label(error)] += 1
        else:
            told(lambda: self._source.on_transfer_failed(sequence_id, error))

    def stranded(self, sequence: IncomingSequence, error: ServingError) -> None:
        """Its gateway waits for what cannot be computed in blocks that do not come back."""
        self.recomputing.discard(sequence.transfer_id)
        told(lambda: self._source.on_transfer_failed(sequence.sequence_id, error))

    def withdrawn(self, sequence: IncomingSequence) -> None:
        told(lambda: self._source.on_transfer_withdrawn(sequence.sequence_id))

    def free(self, sequence: IncomingSequence, num_good_blocks: int) -> None:
        sequence_id = sequence.sequence_id
        if sequence.transfer_id in self.recomputing:
            self.recomputing.discard(sequence.transfer_id)
            if told(lambda: self._source.recompute(sequence_id, num_good_blocks)):
                return
            error = InternalError("The decode node could not compute what is missing.")
            told(lambda: self._source.on_transfer_failed(sequence_id, error))
        told(lambda: self._source.release(sequence_id))
