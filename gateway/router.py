"""Which nodes take a sequence: a pure function of what is known now.

1. Nodes that cannot are left out: not ready, not connected, no partner with the same
   compatibility hash.
2. Each remaining node gets a cost in estimated milliseconds. A prefill node's is its queue plus
   the part of this prompt that it has not cached; a decode node's is the pace of its batch, the
   transfer of what it has not cached, and a penalty when its memory would run full.
3. The cheapest pair wins. The costs do not depend on each other, so it is the cheapest node of
   either role within one compatibility hash.
4. A prompt with few uncached tokens at its decode node is prefilled there, without a hand-off.

Prefix affinity needs no rule of its own: a cached prefix makes a node cheaper until its queue
costs more than computing the prefix elsewhere.

The rates below only weigh queue against transfer against batch; they are an 8B model's on one
H200 and need not be exact for the order of candidates to be right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.errors import NodeUnavailable
from cluster.node import NodeInfo, NodeRole, NodeState
from cluster.request import PrefixHolder

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from collections.abc import Set as AbstractSet

    from cluster.node import NodeId

PREFILL_MS_PER_TOKEN = 1 / 37
DECODE_MS_PER_SEQUENCE = 0.5
TRANSFER_MS_PER_TOKEN = 1 / 400
FULL_MEMORY_MS = 2_000.0
MEMORY_WATERMARK = 0.85
_RETRY_SECONDS = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One node as a placement sees it, with this gateway's own debits already in."""

    node: NodeInfo
    is_connected: bool
    queued_tokens: int  # that wait for prefill there
    num_sequences: int  # that run or wait there
    reserved_tokens: int  # of sequences placed there that its last heartbeat cannot know
    num_cached_tokens: int = 0  # of this prompt

    @property
    def can_take_work(self) -> bool:
        return self.is_connected and self.node.state is NodeState.READY

    def can_take(self, demand: Demand) -> bool:
        """A node that has joined since the request was checked may be too small for it."""
        return self.can_take_work and demand.max_num_tokens <= self.node.max_model_len


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What is to be placed. `num_tokens` is the prompt with what it is expected to generate,
    `max_num_tokens` with the most that it may."""

    num_prompt_tokens: int
    num_tokens: int
    max_num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class CandidateCost:
    """Kept with each decision, so that it can be explained. Milliseconds."""

    name: str
    role: NodeRole
    cost: float
    num_cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """`prefill` None: the decode node does all of it. `holder`: has more of the prompt cached than
    the prefill node, which may fetch it from there."""

    prefill: NodeInfo | None
    decode: NodeInfo
    costs: tuple[CandidateCost, ...] = ()
    holder: PrefixHolder | None = None


def choose(
    candidates: Iterable[Candidate], demand: Demand, *, local_prefill_tokens: int = 0
) -> Placement:
    """The cheapest pair; `NodeUnavailable` when there is none."""
    pairs: list[tuple[float, Candidate, Candidate, PrefixHolder | None]] = []
    costs: list[CandidateCost] = []
    for prefill_nodes, decode_nodes in _pools(candidates, demand):
        prefill_cost, prefill = _cheapest(prefill_nodes, demand, costs)
        decode_cost, decode = _cheapest(decode_nodes, demand, costs)
        holder = _holder([*prefill_nodes, *decode_nodes], prefill)
        pairs.append((prefill_cost + decode_cost, prefill, decode, holder))
    if not pairs:
        raise NodeUnavailable(
            "No pair of prefill and decode nodes is ready.",
            reason="no_pair",
            retry_after_seconds=_RETRY_SECONDS,
        )
    _, prefill, decode, holder = min(pairs, key=lambda pair: pair[0])
    num_uncached = demand.num_prompt_tokens - decode.num_cached_tokens
    is_local = num_uncached <= local_prefill_tokens
    return Placement(
        prefill=None if is_local else prefill.node,
        decode=decode.node,
        costs=tuple(costs),
        holder=holder,
    )


def choose_again(
    candidates: Sequence[Candidate],
    demand: Demand,
    *,
    suspects: AbstractSet[NodeId],
    avoided: AbstractSet[NodeId],
) -> Placement:
    """A pair for what failed elsewhere: without `avoided` nodes if that is possible, else without
    `suspects`. `NodeUnavailable` when there is none."""
    fresh = [candidate for candidate in candidates if candidate.node.id not in avoided]
    if _pools(fresh, demand):
        return choose(fresh, demand)
    return choose((c for c in candidates if c.node.id not in suspects), demand)


def _pools(
    candidates: Iterable[Candidate], demand: Demand
) -> list[tuple[list[Candidate], list[Candidate]]]:
    """(prefill, decode) nodes by compatibility hash; only hashes that have both."""
    pools: dict[str, tuple[list[Candidate], list[Candidate]]] = {}
    for candidate in candidates:
        if candidate.can_take(demand):
            pool = pools.setdefault(candidate.node.compatibility_hash, ([], []))
            pool[candidate.node.role is NodeRole.DECODE].append(candidate)
    return [pool for pool in pools.values() if pool[0] and pool[1]]


def _holder(nodes: Iterable[Candidate], prefill: Candidate) -> PrefixHolder | None:
    """Who has most of the prompt cached and gives it away, if that is more than the prefill node
    has."""
    if not prefill.node.fetches_prefixes:
        return None
    givers = [prefill, *(each for each in nodes if each.node.fetches_prefixes)]
    best = max(givers, key=lambda candidate: candidate.num_cached_tokens)
    num_more = best.num_cached_tokens - prefill.num_cached_tokens
    if num_more <= 0:
        return None
    return PrefixHolder(best.node.id, best.node.grpc_address, best.num_cached_tokens, num_more)


def _cheapest(
    nodes: Sequence[Candidate], demand: Demand, costs: list[CandidateCost]
) -> tuple[float, Candidate]:
    """Equal costs go to the node with fewer sequences, then by name, so that ties are stable."""
    ranked: list[tuple[float, int, str, Candidate]] = []
    for candidate in nodes:
        cost = _cost(candidate, demand)
        name = candidate.node.id.name
        ranked.append((cost, candidate.num_sequences, name, candidate))
        costs.append(CandidateCost(name, candidate.node.role, cost, candidate.num_cached_tokens))
    best = min(ranked, key=lambda entry: entry[:3])
    return best[0], best[3]


def _cost(candidate: Candidate, demand: Demand) -> float:
    if candidate.node.role is NodeRole.PREFILL:
        return prefill_cost(candidate, demand)
    return decode_cost(candidate, demand)


def prefill_cost(candidate: Candidate, demand: Demand) -> float:
    num_uncached = demand.num_prompt_tokens - candidate.num_cached_tokens
    return (candidate.queued_tokens + num_uncached) * PREFILL_MS_PER_TOKEN


def decode_cost(candidate: Candidate, demand: Demand) -> float:
    num_uncached = demand.num_prompt_tokens - candidate.num_cached_tokens
    cost = candidate.num_sequences * DECODE_MS_PER_SEQUENCE
    cost += num_uncached * TRANSFER_MS_PER_TOKEN
    return cost + _memory_penalty(candidate, demand.num_tokens - candidate.num_cached_tokens)


def _memory_penalty(candidate: Candidate, num_tokens: int) -> float:
    """Grows from the watermark to full; 0 for a node that has not said how much it has."""
    load = candidate.node.load
    if load.num_blocks == 0:
        return 0.0
    used = load.num_blocks - load.num_free_blocks
    asked = (candidate.reserved_tokens + num_tokens) / candidate.node.block_size
    usage = (used + asked) / load.num_blocks
    return FULL_MEMORY_MS * max(0.0, usage - MEMORY_WATERMARK) / (1 - MEMORY_WATERMARK)
