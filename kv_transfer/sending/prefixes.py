"""Cached prefixes for other nodes: what a prefill node may fetch instead of computing it.

Life of a prefix that is given away
    1. `send`: another node asks, with the tokens and where to. What of them is cached here is held;
       who holds it may bring some out of host memory first, as long as who asks can wait for it.
    2. It goes over a hand-off like any other, under the same rules: ticket, digests, lease, drain.
       All of its blocks are computed, and there is no first token: the commit carries 0.
    3. `on_sources_free`: nothing reads the blocks any more; the hold is released.
Failures need nobody here: who asked hears of them and computes.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cluster.errors import NodeUnavailable, Overloaded

if TYPE_CHECKING:
    from cluster.errors import ServingError
    from cluster.node import NodeId
    from cluster.request import Handoff, SequenceRequest
    from kv_transfer.sending.sender import KVSender, SenderEvents

logger = logging.getLogger(__name__)
MAX_GIVEN_AWAY = 16
MAX_TO_ONE_PEER = 8  # one that reads slowly keeps nobody else from his


@dataclass(frozen=True, slots=True)
class HeldPrefix:
    """Cached blocks of a prompt's beginning, and how to let go of them."""

    block_ids: tuple[int, ...]
    release: Callable[[], object]


@dataclass(frozen=True, slots=True)
class _Given:
    held: HeldPrefix
    to: NodeId


# Of a prompt, with the seconds that each token may take that is not in the pool yet.
HoldPrefix = Callable[["SequenceRequest", float], Awaitable[HeldPrefix]]


class PrefixSender:
    """A `PrefixSource`. It hears of its own hand-offs what the sender reports; what belongs to
    others it passes on to `others`, if there are any."""

    def __init__(
        self, hold: HoldPrefix, block_size: int, others: SenderEvents | None = None
    ) -> None:
        self._hold = hold
        self._block_size = block_size
        self._others = others
        self._given: dict[str, _Given] = {}
        self._asked: Counter[NodeId] = Counter()
        self._sender: KVSender

    def bind(self, sender: KVSender) -> None:
        self._sender = sender

    @property
    def num_asked(self) -> int:
        """Prefixes whose blocks are about to be held, and then handed off."""
        return self._asked.total()

    @property
    def num_given_away(self) -> int:
        """Prefixes whose blocks are held, or about to be, and will come back."""
        return self._num_given_away().total()

    def _num_given_away(self) -> Counter[NodeId]:
        """The same by peers. What is stuck is held, too, and counted in quarantine: should others
        wait for it, nobody would get a prefix from here any more."""
        given = self._given.items()
        return self._asked + Counter(
            each.to for name, each in given if not self._sender.is_stuck(name)
        )

    async def send(
        self, prefix: SequenceRequest, handoff: Handoff, restore_seconds_per_token: float
    ) -> int:
        """See `PrefixSource`."""
        given, to = self._num_given_away(), handoff.decode
        if given.total() >= MAX_GIVEN_AWAY or given[to] >= MAX_TO_ONE_PEER:
            raise Overloaded("This node gives as many prefixes away as it may.")
        self._asked[to] += 1
        try:
            held = await self._hold(prefix, restore_seconds_per_token)
        finally:
            self._asked -= Counter((to,))  # without an entry of who asks for none
        num_tokens = len(held.block_ids) * self._block_size
        if num_tokens == 0:
            held.release()
            raise NodeUnavailable("Nothing of this prefix is cached here.", reason="not_cached")
        request = replace(prefix, prompt_token_ids=prefix.prompt_token_ids[:num_tokens])
        with ExitStack() as undo:
            undo.callback(held.release)
            try:
                self._sender.open(request, handoff)
            except ValueError:
                raise NodeUnavailable("This prefix is being sent.", reason="not_offered") from None
            undo.pop_all()
        sequence_id = prefix.sequence_id
        self._given[sequence_id] = _Given(held, to)
        self._sender.chunk_computed(sequence_id, num_tokens, held.block_ids, None)
        self._sender.commit(sequence_id, 0)
        return num_tokens

    # ---- reports of the sender (`SenderEvents`) ------------------------------------------------

    def on_committed(self, sequence_id: str) -> None:
        if sequence_id not in self._given and self._others is not None:
            self._others.on_committed(sequence_id)

    def on_failed(self, sequence_id: str, error: ServingError) -> None:
        if sequence_id in self._given:
            logger.warning("a prefix was not fetched: %s", error.message)
        elif self._others is not None:
            self._others.on_failed(sequence_id, error)

    def on_sources_free(self, sequence_id: str) -> None:
        given = self._given.pop(sequence_id, None)
        if given is not None:
            given.held.release()
        elif self._others is not None:
            self._others.on_sources_free(sequence_id)
