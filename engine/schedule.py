"""What one step is to compute, as data: a scheduler decides it, the engine carries it out.

A decision is either all decode (one token for each sequence) or it holds prefill chunks; the
schedulers never mix the two, so each phase has one attention path.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from cluster.errors import ContextLengthExceeded

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from engine.block_manager import BlockManager
    from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """The next `num_scheduled_tokens` tokens of a sequence, from `begin` on.

    The sequence's block table already covers them. What is asked here holds until the chunk is
    launched, which moves `begin`.
    """

    sequence: Sequence
    num_scheduled_tokens: int

    @property
    def begin(self) -> int:
        """Where steps that are launched already leave off."""
        sequence = self.sequence
        return sequence.num_computed_tokens + sequence.num_launched_tokens

    @property
    def samples(self) -> bool:
        """Whether the chunk ends at the sequence's last token, whose successor is drawn."""
        sequence = self.sequence
        num_tokens = len(sequence.token_ids) + sequence.num_launched_draws
        return self.begin + self.num_scheduled_tokens == num_tokens


@dataclass(frozen=True, slots=True)
class ScheduleDecision:
    """The chunks of one step.

    `preempted` lost their blocks to make room. `failed` ended here with an `error`, their
    blocks freed: they can never run on this node. Both may be there without any chunk.
    `decodes`: set by who knows that it is a decode step, which saves looking at each chunk.
    """

    chunks: tuple[ScheduledChunk, ...] = ()
    preempted: tuple[Sequence, ...] = ()
    failed: tuple[Sequence, ...] = ()
    decodes: bool = False

    @property
    def num_scheduled_tokens(self) -> int:
        return sum(chunk.num_scheduled_tokens for chunk in self.chunks)

    @property
    def is_decode(self) -> bool:
        """Whether each chunk is a sequence's last token: one query row, one draw."""
        return self.decodes or all(
            chunk.num_scheduled_tokens == 1 and chunk.samples for chunk in self.chunks
        )


class StepResult(Protocol):
    """What a scheduler reads of a step's output."""

    @property
    def sampled_sequences(self) -> SequenceOf[Sequence]:
        """The sequences whose next token was drawn, finished or not."""
        ...

    @property
    def finished_sequences(self) -> SequenceOf[Sequence]:
        """Those of them that ended with it."""
        ...


def check_fits(sequence: Sequence, block_manager: BlockManager) -> None:
    """Raise `ContextLengthExceeded` if its tokens need more blocks than this node has in all:
    it could never run here, however long it waits."""
    num_blocks = block_manager.num_blocks_for(sequence.num_tokens)
    if num_blocks > block_manager.num_blocks:
        raise ContextLengthExceeded(
            f"The sequence has {sequence.num_tokens} tokens; this node's KV cache holds "
            f"{block_manager.num_blocks * block_manager.block_size}.",
            param="prompt",
        )
