"""One token stream, from its prompt to its last token.

Life of a sequence
    1. Built from a `SequenceRequest`: WAITING, no blocks, nothing computed. On a decode node
       it may wait for KV that another node sends: WAITING_FOR_KV.
    2. A scheduler gives it blocks and chunks: RUNNING. `num_computed_tokens` says how far the
       KV in `block_table` reaches; what is left of `token_ids` is still to be computed.
    3. When the last token's KV is computed, its successor is sampled and appended. While a step
       is launched and not collected, `num_launched_tokens` more are being computed and
       `num_launched_draws` more drawn.
    4. Out of blocks, it may lose them: PREEMPTED, `num_computed_tokens` 0. It keeps every
       token it has. When there is room, their KV comes back from host memory or is computed
       again, and it continues identically, because a draw depends on the seed and the position
       alone.
    5. FINISHED, once: with a `finish_reason`, or with an `error`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from cluster.errors import ContextLengthExceeded, InvalidRequest
from cluster.prefix_hash import hash_blocks

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cluster.errors import ServingError
    from cluster.prefix_hash import BlockHash
    from cluster.request import FinishReason, SamplingParams, SequenceRequest
    from engine.sampling_plan import SamplingRow


class SequenceStatus(StrEnum):
    WAITING = "waiting"
    WAITING_FOR_KV = "waiting_for_kv"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class Sequence:
    """Tokens, and where their KV is. Compared by identity.

    `block_table` belongs to the `BlockManager`, which only appends to the list or replaces it
    by another: who knows the list knows its first blocks. `num_registered_blocks`,
    `is_cacheable` and `is_loading` are the block manager's notes, `sampling_row` is the sampler's,
    `arrival` the scheduler's.
    """

    __slots__ = (
        "__weakref__",
        "arrival",
        "block_hashes",
        "block_size",
        "block_table",
        "error",
        "finish_reason",
        "is_cacheable",
        "is_loading",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_launched_draws",
        "num_launched_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "num_registered_blocks",
        "request",
        "root",
        "sampling_row",
        "status",
        "stop_token_id",
        "token_ids",
    )

    def __init__(
        self,
        request: SequenceRequest,
        *,
        block_size: int,
        root: BlockHash,
        output_token_ids: Iterable[int] = (),
    ) -> None:
        """`root` is `root_hash(model_key, request.cache_salt)`. `output_token_ids` were drawn
        elsewhere, e.g. the first token on the prefill node."""
        self.request = request
        self.block_size = block_size
        self.root = root
        self.num_prompt_tokens = len(request.prompt_token_ids) - request.num_emitted_tokens
        self.token_ids: list[int] = [*request.prompt_token_ids, *output_token_ids]
        self.block_table: list[int] = []
        self.block_hashes: list[BlockHash] = []
        self.num_computed_tokens = 0
        self.num_launched_tokens = 0  # beyond: to be computed by steps launched, not collected
        self.num_launched_draws = 0  # tokens that those steps draw
        self.num_cached_tokens = 0  # prompt tokens found in the prefix cache at first admission
        self.num_preemptions = 0
        self.status = SequenceStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_token_id: int | None = None
        self.error: ServingError | None = None
        self.arrival = 0
        self.num_registered_blocks = 0
        self.is_cacheable = True
        self.is_loading = False  # what its blocks lack comes from host memory
        self.sampling_row: SamplingRow | None = None
        self.extend_block_hashes()

    def __repr__(self) -> str:
        return (
            f"Sequence({self.sequence_id!r}, {self.status}, {self.num_computed_tokens} of "
            f"{self.num_tokens} tokens computed, {len(self.block_table)} blocks)"
        )

    @property
    def sequence_id(self) -> str:
        return self.request.sequence_id

    @property
    def sampling(self) -> SamplingParams:
        return self.request.sampling

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        return self.request.prompt_token_ids

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """1 while decoding; more while a prompt, or what preemption dropped, is computed."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    def append_token(self, token_id: int) -> None:
        self.token_ids.append(token_id)

    def finish(self, reason: FinishReason, stop_token_id: int | None = None) -> None:
        """End it in a completion. The blocks stay until the block manager is told."""
        self._end()
        self.finish_reason = reason
        self.stop_token_id = stop_token_id

    def fail(self, error: ServingError) -> None:
        """End it in a typed error."""
        self._end()
        self.error = error

    def extend_block_hashes(self) -> None:
        """Make `block_hashes` cover every full block of `token_ids`."""
        known = len(self.block_hashes)
        num_full_blocks = len(self.token_ids) // self.block_size
        if known < num_full_blocks:
            parent = self.block_hashes[-1] if known else self.root
            new_ids = self.token_ids[known * self.block_size :]
            self.block_hashes += hash_blocks(new_ids, self.block_size, parent)

    def _end(self) -> None:
        if self.is_finished:
            raise RuntimeError(f"{self!r} ended twice.")
        self.status = SequenceStatus.FINISHED


def check_request(request: SequenceRequest, *, vocab_size: int, max_model_len: int) -> None:
    """Raise what this model must refuse, before any work: ids it does not have, or a prompt
    that leaves no room for one token."""
    prompt = request.prompt_token_ids
    if not prompt:
        raise InvalidRequest("The prompt is empty.", param="prompt")
    if len(prompt) >= max_model_len:
        raise ContextLengthExceeded(
            f"The prompt has {len(prompt)} tokens; this model takes fewer than {max_model_len}.",
            param="prompt",
        )
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise InvalidRequest("The prompt has a token id outside the vocabulary.", param="prompt")
    sampling = request.sampling
    biased = (token_id for token_id, _ in sampling.logit_bias)
    for name, ids in (("logit_bias", biased), ("stop_token_ids", sampling.stop_token_ids)):
        if not all(0 <= token_id < vocab_size for token_id in ids):
            raise InvalidRequest(f"{name} has an id outside the vocabulary.", param=name)
