"""Prefixes that come from another node's cache instead of being computed.

Life of a fetch
    1. `fetch`: a prompt's request named a node that has more of it cached. If what it has and we
       lack is fetched sooner than computed (`fetch_estimate.py`), that node is asked. If the way
       from there is not known, it is asked as well, but the prompt does not wait.
    2. What it had in host memory alone is in its pool, if that was quick enough. It opens a
       hand-off to us, and our receiver asks for blocks (`reserve`): for whole blocks of the
       prompt's beginning and nothing else. What we have already is not sent.
    3. All of it has arrived and is verified: `start` gives the blocks to the prefix cache. The
       prompt is queued now, and finds them like any others.
    4. A refusal, a failure, or more time than computing would take: the prompt is queued as it
       is. Blocks that may still be written to stay with the transfer until it has ended.

No token depends on whether a fetch succeeds. All methods run on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import grpc

from cluster.clock import Clock, monotonic
from cluster.codec import encode_handoff, encode_sequence
from cluster.errors import Cancelled, NodeUnavailable, Overloaded, ServingError, TransferFailed
from cluster.proto import node_pb2 as pb
from cluster.proto import node_pb2_grpc as rpc
from cluster.request import Handoff
from prefill_node.fetch_estimate import Lacking
from prefill_node.holder_channels import HolderChannels

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from cluster.node import NodeId
    from cluster.request import PrefixHolder, SequenceRequest
    from engine.block_manager import BlockManager, Reservation
    from engine.loop import EngineLoop
    from engine.sequence import Sequence
    from kv_transfer.receiving.receiver import KVReceiver
    from prefill_node.fetch_estimate import FetchEstimate

logger = logging.getLogger(__name__)
MAX_FETCHES = 16
EXPLORE_SECONDS = 10.0  # the two nodes may have to connect first


@dataclass(frozen=True, slots=True)
class PrefixBlocks:
    """What the receiver is told of a reservation."""

    block_ids: tuple[int, ...]
    num_held_blocks: int


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The first `num_blocks` blocks of a prompt, from there; see `FetchEstimate` for the time."""

    sequence: Sequence
    num_blocks: int
    holder: PrefixHolder
    restore_seconds_per_token: float


@dataclass(slots=True)
class _Fetch:
    """One under way. `done` gives the tokens that are cached now."""

    sequence: Sequence
    num_blocks: int  # asked for
    done: asyncio.Future[int]
    num_tokens_moved: int = 0
    reserved_at: float = 0.0
    seconds: float = 0.0  # from the reservation to the last byte: what the way took, not the steps


@dataclass(slots=True)
class FetchStats:
    num_fetches: int = 0
    num_failed: int = 0
    num_done: int = 0
    num_tokens: int = 0


class PrefixFetches:
    """The `BlockSource` of a prefill node's receiver."""

    def __init__(
        self,
        node_id: NodeId,
        block_manager: BlockManager,
        estimate: FetchEstimate,
        open_channel: Callable[[str], grpc.aio.Channel],
        clock: Clock = monotonic,
    ) -> None:
        self._node_id = node_id
        self._block_manager = block_manager
        self._estimate = estimate
        self._clock = clock
        self._fetches: dict[str, _Fetch] = {}
        self._reservations: dict[str, Reservation] = {}  # of fetches, maybe given up
        self._channels = HolderChannels(open_channel)
        self._exploring: dict[NodeId, asyncio.Task[None]] = {}
        self._counted = (0, 0.0)  # tokens and seconds of the engine's steps
        self._loop: EngineLoop
        self._receiver: KVReceiver
        self._address: Callable[[], str]
        self.stats = FetchStats()

    def bind(self, loop: EngineLoop, receiver: KVReceiver, address: Callable[[], str]) -> None:
        """`address`: where other nodes reach this one's control plane."""
        self._loop, self._receiver, self._address = loop, receiver, address

    async def close(self) -> None:
        exploring = list(self._exploring.values())
        for task in exploring:
            task.cancel()
        await asyncio.gather(*exploring, return_exceptions=True)
        await self._channels.close()

    async def fetch(self, sequence: Sequence, holder: PrefixHolder) -> None:
        """Bring what `holder` has of a sequence that is not queued yet, if that pays. Raises
        nothing but `CancelledError`."""
        num_blocks = min(holder.num_tokens, sequence.num_tokens - 1) // sequence.block_size
        lacking = await self._lacking(sequence, num_blocks)
        self._measure()
        if lacking.num_computed_tokens == 0 or len(self._fetches) >= MAX_FETCHES:
            return
        now = self._clock()
        seconds_per_token = self._estimate.restore_seconds_per_token(holder.node, lacking, now)
        wanted = _Wanted(sequence, num_blocks, holder, seconds_per_token)
        if self._estimate.pays(holder.node, lacking, now):
            await self._try(wanted, self._estimate.limit_seconds(lacking.num_computed_tokens))
        elif not self._estimate.is_known(holder.node, now):
            self._explore(wanted)

    def _explore(self, wanted: _Wanted) -> None:
        """Learn how fast the way from there is, while the prompt is computed."""
        node = wanted.holder.node
        if node not in self._exploring and not self._estimate.is_avoided(node, self._clock()):
            trying = self._try(wanted, EXPLORE_SECONDS)
            task = self._exploring[node] = asyncio.create_task(trying)
            task.add_done_callback(lambda _: self._exploring.pop(node))

    async def _try(self, wanted: _Wanted, limit_seconds: float) -> None:
        holder = wanted.holder
        self.stats.num_fetches += 1
        try:
            async with asyncio.timeout(limit_seconds):
                fetch = await self._bring(wanted)
        except (ServingError, grpc.aio.AioRpcError, TimeoutError) as error:
            logger.warning("a prefix on %s is computed here: %r", holder.node.name, error)
            self.stats.num_failed += 1
            self._estimate.failed(holder.node, self._clock())
        except Exception:  # the top of the task: the prefix is computed here
            logger.exception("a prefix could not be fetched from %s", holder.node.name)
            self.stats.num_failed += 1
            self._estimate.failed(holder.node, self._clock())
        else:
            self.stats.num_done += 1
            self.stats.num_tokens += fetch.done.result()
            now = self._clock()
            self._estimate.fetched(holder.node, fetch.num_tokens_moved, fetch.seconds, now)

    # ---- the receiver's source of blocks ----------------------------------------------------

    async def reserve(self, request: SequenceRequest, gateway_id: str) -> PrefixBlocks:
        fetch = self._fetches.get(request.sequence_id)
        if fetch is None:
            raise Cancelled("Nobody waits for this prefix.")
        sequence, size = fetch.sequence, fetch.sequence.block_size
        num_blocks, left = divmod(len(request.prompt_token_ids), size)
        if (
            left
            or num_blocks > fetch.num_blocks
            or request.cache_salt != sequence.request.cache_salt
            or request.prompt_token_ids != sequence.prompt_token_ids[: num_blocks * size]
        ):
            raise TransferFailed("This is not the prefix that was asked for.", reason="unknown")
        hashes = sequence.block_hashes[:num_blocks]
        owner = f"fetch for {sequence.sequence_id}"
        asking = self._loop.call(
            lambda: self._block_manager.reserve(hashes, num_blocks * size, owner)
        )
        try:
            reservation = await asyncio.wrap_future(asking)
        except asyncio.CancelledError:  # it may be on its way here
            asking.add_done_callback(self._give_back)
            raise
        if reservation is None:
            raise Overloaded("There are no blocks for a prefix.")
        self._reservations[request.sequence_id] = reservation
        fetch.num_tokens_moved = (num_blocks - reservation.num_held_blocks) * size
        fetch.reserved_at = self._clock()
        return PrefixBlocks(reservation.block_ids, reservation.num_held_blocks)

    def _give_back(self, late: Future[Reservation | None]) -> None:
        """On any thread."""
        if not late.cancelled() and late.exception() is None:
            reservation = late.result()
            if reservation is not None:
                self._loop.call(reservation.cancel)

    async def start(self, sequence_id: str, first_token_id: int) -> None:
        reservation = self._reservations.get(sequence_id)
        fetch = self._fetches.get(sequence_id)
        if reservation is None or fetch is None:
            raise Cancelled("Nobody waits for this prefix.")
        fetch.seconds = self._clock() - fetch.reserved_at
        hashes = fetch.sequence.block_hashes[: len(reservation.block_ids)]
        await asyncio.wrap_future(self._loop.call(lambda: reservation.keep(hashes)))
        self._reservations.pop(sequence_id, None)
        if not fetch.done.done():
            fetch.done.set_result(reservation.num_tokens)

    def release(self, sequence_id: str) -> None:
        reservation = self._reservations.pop(sequence_id, None)
        if reservation is not None:
            self._loop.call(reservation.cancel)

    def may_recompute(self, sequence_id: str, num_good_blocks: int) -> bool:
        return False

    def recompute(self, sequence_id: str, num_good_blocks: int) -> None:
        self.release(sequence_id)

    def on_transfer_failed(self, sequence_id: str, error: ServingError) -> None:
        fetch = self._fetches.get(sequence_id)
        if fetch is not None and not fetch.done.done():
            fetch.done.set_exception(error)

    def on_transfer_withdrawn(self, sequence_id: str) -> None:
        self.on_transfer_failed(sequence_id, NodeUnavailable("The holder withdrew its prefix."))

    # ---- steps --------------------------------------------------------------------------------

    async def _lacking(self, sequence: Sequence, num_blocks: int) -> Lacking:
        hashes, size = sequence.block_hashes[:num_blocks], sequence.block_size
        manager = self._block_manager

        def count() -> Lacking:
            num_cached, num_in_pool = manager.num_cached(hashes), len(manager.match_prefix(hashes))
            return Lacking((num_blocks - num_cached) * size, (num_blocks - num_in_pool) * size)

        return await asyncio.wrap_future(self._loop.call(count))

    async def _bring(self, wanted: _Wanted) -> _Fetch:
        """Cached here when it returns. Raises when it does not come."""
        sequence, num_blocks = wanted.sequence, wanted.num_blocks
        transfer_id = os.urandom(16)
        name = f"prefix-{transfer_id.hex()}"
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        fetch = self._fetches[name] = _Fetch(sequence, num_blocks, done)
        prefix = sequence.prompt_token_ids[: num_blocks * sequence.block_size]
        asked = replace(
            sequence.request, sequence_id=name, prompt_token_ids=prefix, num_emitted_tokens=0
        )
        handoff = Handoff(
            transfer_id=transfer_id,
            attempt=0,
            decode=self._node_id,
            decode_address=self._address(),
            gateway_id=self._node_id.name,
        )
        try:
            await self._stub(wanted.holder.address).FetchPrefix(
                pb.FetchPrefixRequest(
                    sequence=encode_sequence(asked),
                    handoff=encode_handoff(handoff),
                    restore_seconds_per_token=wanted.restore_seconds_per_token,
                )
            )
            await done
            return fetch
        finally:
            del self._fetches[name]
            if not done.done() or done.cancelled() or done.exception() is not None:
                self._receiver.cancel(name)

    def _stub(self, address: str) -> rpc.NodeStub:
        return rpc.NodeStub(self._channels.get(address))  # type: ignore[no-untyped-call]

    def _measure(self) -> None:
        """What the engine has computed since the last look."""
        stats = self._loop.stats
        now = stats.num_computed_tokens, stats.step_seconds
        self._estimate.computed(now[0] - self._counted[0], now[1] - self._counted[1])
        self._counted = now
