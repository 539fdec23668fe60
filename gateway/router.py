"""Which nodes take a sequence: a pure function of what is known now.

1. Nodes that cannot are left out: not ready, not connected, no partner with the same
   compatibility hash.
2. Each remaining node gets a cost in estimated milliseconds. A prefill node's is its queue plus
   the part of this prompt that it has not cached; a decode node's is the pace of its batch, the
   transfer of what it has not cached, and a penalty when its memory would run full.
3. The cheapest pair wins. The costs do not depend on each other, so it is the cheapest node of
   either role within one compatibility hash.
4. A prompt with few uncached tokens at its decode node is prefilled there, without a hand-off.
5. Where hand-offs between the two nodes of that pair fail (`pair_breaker.py`), the cheapest of the
   others wins, if there is any: no request is refused because of what is held back.

Prefix affinity needs no rule of its own: a cached prefix makes a node cheaper until its queue
costs more than computing the prefix elsewhere.

The rates below only weigh queue against transfer against batch; they are an 8B model's on one
H200 and need not be exact for the order of candidates to be right.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, NamedTuple

from cluster.errors import NodeUnavailable
from cluster.node import NodeInfo, NodeRole, NodeState
from cluster.request import PrefixHolder
from gateway.pair_breaker import NO_PAIRS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from collections.abc import Set as AbstractSet

    from cluster.node import NodeId
    from gateway.pair_breaker import Pair

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
    the prefill node, which may fetch it from there. `instead_of`: the cheapest pair, held back, as
    a log names it."""

    prefill: NodeInfo | None
    decode: NodeInfo
    costs: tuple[CandidateCost, ...] = ()
    holder: PrefixHolder | None = None
    instead_of: str | None = None


# A candidate for one demand: cost, sequences, name, itself. Equal costs go to the node with fewer
# sequences, then by name, so that ties are stable. A plain tuple: one is made of each node.
_Ranked = tuple[float, int, str, Candidate]
_order = itemgetter(0, 1, 2)
_cost_of = itemgetter(0)


class _RankedPair(NamedTuple):
    cost: float
    prefill: Candidate
    decode: Candidate
    pool: _Pool

    @property
    def ids(self) -> Pair:
        return self.prefill.node.id, self.decode.node.id

    @property
    def names(self) -> str:
        return f"{self.prefill.node.id.name} > {self.decode.node.id.name}"


class _Pool(NamedTuple):
    """Nodes of one compatibility hash, some of either role."""

    prefill: list[_Ranked]
    decode: list[_Ranked]

    def cheapest(self) -> _RankedPair:
        prefill, decode = min(self.prefill, key=_order), min(self.decode, key=_order)
        return self._pair(prefill, decode)

    def cheapest_but(self, held_back: AbstractSet[Pair]) -> _RankedPair | None:
        """None when all pairs are held back."""
        best: _RankedPair | None = None
        decode_nodes = sorted(self.decode, key=_order)
        for prefill in sorted(self.prefill, key=_order):
            if best is not None and prefill[0] + decode_nodes[0][0] >= best.cost:
                break
            pairs = (self._pair(prefill, decode) for decode in decode_nodes)
            pair = next((pair for pair in pairs if pair.ids not in held_back), None)
            if pair is not None and (best is None or pair.cost < best.cost):
                best = pair
        return best

    def _pair(self, prefill: _Ranked, decode: _Ranked) -> _RankedPair:
        return _RankedPair(prefill[0] + decode[0], prefill[3], decode[3], self)


def choose(
    candidates: Iterable[Candidate],
    demand: Demand,
    *,
    local_prefill_tokens: int = 0,
    held_back: AbstractSet[Pair] = NO_PAIRS,
) -> Placement:
    """The cheapest pair that is not held back; else the cheapest. `NodeUnavailable` when there is
    none."""
    costs: list[CandidateCost] = []
    pools = [
        _Pool(_ranked(prefill, demand, costs), _ranked(decode, demand, costs))
        for prefill, decode in _pools(candidates, demand)
    ]
    if not pools:
        raise NodeUnavailable(
            "No pair of prefill and decode nodes is ready.",
            reason="no_pair",
            retry_after_seconds=_RETRY_SECONDS,
        )

    def is_local(pair: _RankedPair) -> bool:
        return demand.num_prompt_tokens - pair.decode.num_cached_tokens <= local_prefill_tokens

    cheapest = taken = min((pool.cheapest() for pool in pools), key=_cost_of)
    if held_back and cheapest.ids in held_back and not is_local(cheapest):
        others = [pool.cheapest_but(held_back) for pool in pools]
        taken = min((each for each in others if each is not None), key=_cost_of, default=cheapest)
    nodes = (each[3] for role in taken.pool for each in role)
    return Placement(
        prefill=None if is_local(taken) else taken.prefill.node,
        decode=taken.decode.node,
        costs=tuple(costs),
        holder=_holder(nodes, taken.prefill),
        instead_of=None if taken is cheapest else cheapest.names,
    )


def choose_again(
    candidates: Sequence[Candidate],
    demand: Demand,
    *,
    suspects: AbstractSet[NodeId],
    avoided: AbstractSet[NodeId],
    parted: AbstractSet[NodeId] = frozenset(),
    held_back: AbstractSet[Pair] = NO_PAIRS,
) -> Placement:
    """A pair for what failed elsewhere: without `avoided` nodes if that is possible, else without
    `suspects`, else without `avoided` but for `parted` ones; one that is held back only if there is
    no other in any of these ways. `NodeUnavailable` when there is none."""
    ways = [
        [candidate for candidate in candidates if candidate.node.id not in excluded]
        for excluded in (avoided, suspects, avoided - parted)
    ]
    for allowed in ways:
        if _has_pair(allowed, demand, held_back):
            return choose(allowed, demand, held_back=held_back)
    return choose(next((way for way in ways if _pools(way, demand)), ways[0]), demand)


def _has_pair(
    candidates: Iterable[Candidate], demand: Demand, held_back: AbstractSet[Pair]
) -> bool:
    """One that is not held back."""
    return any(
        (prefill.node.id, decode.node.id) not in held_back
        for prefill_nodes, decode_nodes in _pools(candidates, demand)
        for prefill in prefill_nodes
        for decode in decode_nodes
    )


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


def _ranked(
    nodes: Sequence[Candidate], demand: Demand, costs: list[CandidateCost]
) -> list[_Ranked]:
    ranked: list[_Ranked] = []
    for candidate in nodes:
        cost = _cost(candidate, demand)
        name = candidate.node.id.name
        ranked.append((cost, candidate.num_sequences, name, candidate))
        costs.append(CandidateCost(name, candidate.node.role, cost, candidate.num_cached_tokens))
    return ranked


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
