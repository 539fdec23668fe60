"""What a receiver needs of the node that owns the blocks: to give some, and to hear their fate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from cluster.errors import ServingError
    from cluster.request import SequenceRequest


class ReservedBlocks(Protocol):
    """All block ids of a prompt, by position; the first `num_held_blocks` need no transfer."""

    @property
    def block_ids(self) -> tuple[int, ...]: ...
    @property
    def num_held_blocks(self) -> int: ...


class BlockSource(Protocol):
    """The node that owns the blocks. Calls for one sequence never overlap: an attempt asks
    only after the one before it was released."""

    async def reserve(self, request: SequenceRequest, gateway_id: str) -> ReservedBlocks:
        """Waits for room. Raises `ServingError`; cancelled when it is not wanted any more."""

    def start(self, sequence_id: str, first_token_id: int) -> Awaitable[None]:
        """Take the blocks over and run; what it gives is awaited later. When either raises,
        `release` follows."""

    def release(self, sequence_id: str) -> None:
        """Nothing writes into the reserved blocks any more; they were not started."""

    def may_recompute(self, sequence_id: str, num_good_blocks: int) -> bool:
        """The transfer failed, its policy is to recompute. True: instead of `on_transfer_failed`
        and `release`, `recompute` follows when nothing writes into the blocks any more; or
        `on_transfer_failed` alone, should that never be."""

    def recompute(self, sequence_id: str, num_good_blocks: int) -> None:
        """Take the blocks over and compute the KV after the first `num_good_blocks`. When it
        raises, `on_transfer_failed` and `release` follow."""

    def on_transfer_failed(self, sequence_id: str, error: ServingError) -> None:
        """The sequence will not start. At once, maybe before `release`."""

    def on_transfer_withdrawn(self, sequence_id: str) -> None:
        """The sequence is not needed here any more and nobody failed: it ended on the prefill
        node, was cancelled here, or a newer attempt of it follows."""
