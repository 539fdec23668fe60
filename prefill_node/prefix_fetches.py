"""Prefixes that come from another node's cache instead of being computed.

Life of a fetch
    1. `fetch`: a prompt's request named a node that has more of it cached. If what it has and we
       lack is fetched sooner than computed (`fetch_estimate.py`), that node is asked. If the way
       from there is not known, it is asked for one block, and the prompt does not wait: the two
       nodes are connected then, and the next prompt need not wait for that.
    2. What it had in host memory alone is in its pool, if that was quick enough. It opens a
       hand-off to us, which `incoming_prefixes.py` has blocks for.
    3. All of it has arrived and is in the prefix cache. The prompt is queued now, and finds it like
       any other.
    4. A refusal, a failure, or more time than computing would take: the prompt is queued as it
       is.

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
from cluster.errors import Overloaded, ServingError
from cluster.proto import node_pb2 as pb
from cluster.proto import node_pb2_grpc as rpc
from cluster.request import Handoff
from cluster.rpc import error_from_rpc, is_cancelled
from prefill_node.fetch_estimate import Lacking
from prefill_node.holder_channels import HolderChannels
from prefill_node.incoming_prefixes import IncomingPrefix, IncomingPrefixes

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.node import NodeId
    from cluster.request import PrefixHolder
    from engine.block_manager import BlockManager
    from engine.loop import EngineLoop
    from engine.sequence import Sequence
    from kv_transfer.receiving.receiver import KVReceiver
    from prefill_node.fetch_estimate import FetchEstimate

logger = logging.getLogger(__name__)
MAX_FETCHES = 16
EXPLORE_SECONDS = 10.0  # the two nodes may have to connect first
_HAS_NONE = "not_cached"


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The first `num_blocks` blocks of a prompt, from there; see `FetchEstimate` for the time."""

    sequence: Sequence
    num_blocks: int
    holder: PrefixHolder
    restore_seconds_per_token: float


@dataclass(slots=True)
class FetchStats:
    """Of prompts whose request named a holder that had more of them; each counts once, at most.
    `num_tokens`: that came for prompts that waited; `waited_seconds`: of these prompts, and of
    those for which nothing came in the end."""

    num_waited: int = 0  # for a fetch, which came
    num_explored: int = 0  # nobody waited
    num_not_worthwhile: int = 0  # computing was believed to be sooner
    num_failed: int = 0
    num_tokens: int = 0
    waited_seconds: float = 0.0


class PrefixFetches:
    """Decides which prefixes come here, and asks for them."""

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
        self.incoming = IncomingPrefixes(block_manager, clock)
        self._channels = HolderChannels(open_channel)
        self._exploring: dict[NodeId, asyncio.Task[None]] = {}
        self._counted = (0, 0, 0.0)  # tokens, steps and their seconds of the engine
        self._loop: EngineLoop
        self._receiver: KVReceiver
        self._address: Callable[[], str]
        self.stats = FetchStats()

    def bind(self, loop: EngineLoop, receiver: KVReceiver, address: Callable[[], str]) -> None:
        """`address`: where other nodes reach this one's control plane."""
        self._loop, self._receiver, self._address = loop, receiver, address
        self.incoming.bind(loop)

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
        if num_blocks == 0:
            return
        self._measure()
        node = holder.node
        if not self._estimate.is_known(node):
            self._explore(sequence, holder)
            return
        num_more = min(
            num_blocks * sequence.block_size, holder.num_more_tokens or holder.num_tokens
        )
        # The engine may be at a step: it is asked for what we lack only if that can matter.
        if not self._pays(node, Lacking(num_more, num_more)):
            self.stats.num_not_worthwhile += 1
            return
        lacking = await self._lacking(sequence, num_blocks)
        if lacking.num_computed_tokens == 0:
            return
        if not self._pays(node, lacking) or len(self.incoming) >= MAX_FETCHES:
            self.stats.num_not_worthwhile += 1
            return
        await self._wait_for(sequence, num_blocks, holder, lacking)

    def _pays(self, node: NodeId, lacking: Lacking) -> bool:
        return self._estimate.pays(node, lacking, self._clock())

    async def _wait_for(
        self, sequence: Sequence, num_blocks: int, holder: PrefixHolder, lacking: Lacking
    ) -> None:
        began, node, estimate = self._clock(), holder.node, self._estimate
        seconds_per_token = estimate.restore_seconds_per_token(node, lacking, began)
        limit = estimate.limit_seconds(lacking.num_computed_tokens)
        fetch = await self._try(_Wanted(sequence, num_blocks, holder, seconds_per_token), limit)
        now = self._clock()
        self.stats.waited_seconds += now - began
        if fetch is not None:
            self.stats.num_waited += 1
            self.stats.num_tokens += fetch.num_tokens_moved
            estimate.fetched(node, fetch.num_tokens_moved, fetch.seconds, now)
        elif now - began >= limit:  # it takes that long at least
            estimate.fetched(node, lacking.num_moved_tokens, now - began, now)

    def _explore(self, sequence: Sequence, holder: PrefixHolder) -> None:
        """Learn whether anything comes from there, while the prompt is computed."""
        node = holder.node
        if node not in self._exploring and not self._estimate.is_avoided(node, self._clock()):
            task = self._exploring[node] = asyncio.create_task(self._reach(sequence, holder))
            task.add_done_callback(lambda _: self._exploring.pop(node))

    async def _reach(self, sequence: Sequence, holder: PrefixHolder) -> None:
        wanted = _Wanted(sequence, 1, holder, EXPLORE_SECONDS)
        if await self._try(wanted, EXPLORE_SECONDS) is not None:
            self.stats.num_explored += 1
            self._estimate.reached(holder.node)

    async def _try(self, wanted: _Wanted, limit_seconds: float) -> IncomingPrefix | None:
        """What came; None if it failed, of which everybody has heard then."""
        name, told = wanted.holder.node.name, _ids_of(wanted.sequence)
        try:
            async with asyncio.timeout(limit_seconds):
                return await self._bring(wanted)
        except grpc.aio.AioRpcError as error:
            self._failed(wanted, error_from_rpc(error))
        except (ServingError, TimeoutError) as error:
            self._failed(wanted, error)
        except asyncio.CancelledError:
            if is_cancelled():
                raise
            self._failed(wanted, Overloaded("So many others were asked that the call was cut off."))
        except Exception as error:  # the top of the task: the prefix is computed here
            logger.exception("a prefix could not be fetched from %s", name, extra=told)
            self._failed(wanted, error)
        return None

    def _failed(self, wanted: _Wanted, error: Exception) -> None:
        node = wanted.holder.node
        told = _ids_of(wanted.sequence)
        self.stats.num_failed += 1
        # A refusal cost a call, and says nothing of the next prompt.
        is_refusal = isinstance(error, Overloaded) or getattr(error, "reason", None) == _HAS_NONE
        if not is_refusal:
            self._estimate.failed(node, self._clock())
        why = "it did not come in time" if isinstance(error, TimeoutError) else error
        level = logging.INFO if is_refusal else logging.WARNING
        logger.log(level, "a prefix cached on %s is computed here: %s", node.name, why, extra=told)

    # ---- steps --------------------------------------------------------------------------------

    async def _lacking(self, sequence: Sequence, num_blocks: int) -> Lacking:
        hashes, size = sequence.block_hashes[:num_blocks], sequence.block_size
        manager = self._block_manager

        def count() -> Lacking:
            num_cached, num_in_pool = manager.num_cached(hashes), len(manager.match_prefix(hashes))
            return Lacking((num_blocks - num_cached) * size, (num_blocks - num_in_pool) * size)

        return await asyncio.wrap_future(self._loop.call(count))

    async def _bring(self, wanted: _Wanted) -> IncomingPrefix:
        """Cached here when it returns. Raises when it does not come."""
        sequence, num_blocks = wanted.sequence, wanted.num_blocks
        transfer_id = os.urandom(16)
        name = f"prefix-{transfer_id.hex()}"
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        incoming = IncomingPrefix(sequence, num_blocks, done)
        self.incoming.expect(name, incoming)
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
            return incoming
        finally:
            self.incoming.forget(name)
            if not done.done() or done.cancelled() or done.exception() is not None:
                self._receiver.cancel(name)

    def _stub(self, address: str) -> rpc.NodeStub:
        return rpc.NodeStub(self._channels.get(address))  # type: ignore[no-untyped-call]

    def _measure(self) -> None:
        """What the engine has computed since the last look."""
        stats = self._loop.stats
        now = stats.num_computed_tokens, stats.num_steps, stats.step_seconds
        num_tokens, num_steps, seconds = self._counted
        self._estimate.computed(now[0] - num_tokens, now[1] - num_steps, now[2] - seconds)
        self._counted = now


def _ids_of(sequence: Sequence) -> dict[str, str]:
    """For the log."""
    request = sequence.request
    return {"request_id": request.request_id, "sequence_id": request.sequence_id}
