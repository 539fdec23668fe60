"""A cluster that rows of the fault matrix are run on, one after the other.

Life of a row
    1. `rows.set_policy`: what becomes of KV that does not arrive, and of a stream whose node is
       lost, as an operator changes it while the cluster runs.
    2. `rows.load()`: clients ask during the block; the row makes its fault there and verifies
       that it took place.
    3. `rows.check(history)`: every request against the oracle (I1, I2), every error of a kind
       that a fault may cause, what the witnesses in the nodes objected to (I3, I5, I7), how long
       it took (I6), and the gateways' counters against the clients (I8).
    4. `rows.check_recovered()`: all programs serve, nothing is held that should not be (I4), and
       the same prompts get the same tokens without an error.
"""

from __future__ import annotations

import itertools
import os
import random
import shlex
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pytest

from cluster.failpoints import VARIABLE
from tests.e2e.cluster_process import eventually
from tests.faults.accounts import account_of, beyond_budget, disagreements
from tests.faults.asks import Ask, draw_asks, draw_prompt
from tests.faults.checker import FAULT_CODES, FREED_WITHIN_SECONDS, not_freed, violations
from tests.faults.client import load
from tests.faults.cluster import FaultCluster
from tests.faults.faulty_node import PLAIN_VARIABLE
from tests.faults.history import ENDINGS, NO_REQUEST, Answer, History, save_for_row
from tests.faults.kv_link import Order, shots_done, withdraw
from tests.faults.leaks import await_quiescence, baseline
from tests.faults.metrics import scrape
from tests.faults.nemesis import Nemesis, verify
from tests.faults.witness import Evidence

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from tests.faults.leaks import Held
    from tests.faults.metrics import Scrape
    from tests.faults.spoiled_bytes import Spoil

SEED = int(os.environ.get("BATON_FAULT_SEED", "1"))
# More options of `baton serve`, for every row that does not say otherwise: `--device cuda`.
OPTIONS = shlex.split(os.environ.get("BATON_FAULT_OPTIONS", ""))
NUM_REQUESTS = 6
NUM_TOKENS = int(os.environ.get("BATON_FAULT_TOKENS", "48"))  # of each: more where they come fast
NUM_SHARED_TOKENS = 40  # two blocks, of two tenants, that prompts begin with
HALF = NUM_REQUESTS * NUM_TOKENS // 2  # of all tokens
PREFILL, DECODE = ("prefill-0", "prefill-1"), ("decode-0", "decode-1")
RECOVERS_WITHIN_SECONDS = 60.0
LEASE_SECONDS = 3.0
POLICIES = ("fail", "recompute")  # the second goes on with streams, too
SHOTS = {  # failpoint -> what it does when its file is there
    "prefill.after_chunk": "exit",
    "prefill.before_commit": "exit",
    "prefill.after_commit": "exit",
    "prefill.after_frame": "stop",
}
SIZES = ("--prefill", "2", "--decode", "2", "--dtype", "float32")
STALL_SECONDS = 10.0
COMMON = (
    *("--lease-seconds", f"{LEASE_SECONDS:g}", "--stall-seconds", f"{STALL_SECONDS:g}"),
    *("--max-recomputes", "16"),
)


@dataclass
class Rows:
    """`oracle`: the answer to each request, from the same cluster before anything happened."""

    cluster: FaultCluster
    folder: Path
    asks: list[Ask] = field(default_factory=list)
    oracle: dict[int, Answer] = field(default_factory=dict)
    before: dict[str, Held] = field(default_factory=dict)
    evidence: Evidence = field(init=False)
    nemesis: Nemesis = field(init=False)

    def __post_init__(self) -> None:
        self.nemesis = Nemesis(self.cluster)
        self.evidence = Evidence({name: self.folder / name for name in (*PREFILL, *DECODE)})
        draw = random.Random(SEED)
        stem = draw_prompt(draw, NUM_SHARED_TOKENS, NUM_SHARED_TOKENS)
        self.asks = [
            Ask(
                number=number,
                prompt=(*stem, *draw_prompt(draw, 160, 360)),
                num_tokens=NUM_TOKENS,
                cache_salt=f"tenant-{number % 2}",
            )
            for number in range(NUM_REQUESTS)
        ]
        self.oracle = self.undisturbed(self.asks)
        assert len({answer.token_ids for answer in self.oracle.values()}) == NUM_REQUESTS
        self.before = baseline(self.cluster)

    # ---- load ------------------------------------------------------------------------------

    def undisturbed(self, asks: Sequence[Ask]) -> dict[int, Answer]:
        """The answers to these requests."""
        with self.load(asks) as history:
            pass
        assert history.kinds().count("finished") == len(asks), history.codes()
        return {ask.number: history.answer_of(ask.number) for ask in asks}

    @contextmanager
    def load(
        self,
        asks: Sequence[Ask] | None = None,
        *,
        count: int = NUM_REQUESTS,
        leaves_after: Sequence[int | None] = (),
        is_counted: bool = True,
    ) -> Iterator[History]:
        """These requests, all at once, during the block; all have ended when it is left. Not
        `is_counted`: a gateway cannot be asked what it counts."""
        asked = list(self.asks[:count] if asks is None else asks)
        for number, leaves in enumerate(leaves_after):
            asked[number] = replace(asked[number], leaves_after=leaves)
        history = History()
        self.nemesis.history = history
        account = account_of(self.cluster) if is_counted else None
        with load(self.cluster.url_of, asked, at_once=len(asked), history=history):
            yield history
        self.evidence.take(history)
        save_for_row(history)
        self._accounts = history, account, self._gateways()

    def forget_rows_before(self) -> None:
        """Until all requests of a row may be tried again, and go through any pair of nodes."""
        eventually(self.cluster.is_whole, seconds=RECOVERS_WITHIN_SECONDS)
        addresses = [self.cluster.metrics_address(name) for name in self.cluster.gateway_ports]
        for seed in itertools.count():
            if not any(_remembers(scrape(address)) for address in addresses):
                return
            # Of many lengths, as what costs the same goes through the same pairs for ever; of two
            # tokens, as the first needs no hand-off.
            self.undisturbed(draw_asks(seed, count=20, prompt=(8, 200), num_tokens=2))

    # ---- faults ----------------------------------------------------------------------------

    def set_policy(self, policy: str) -> None:
        change = {"kv_load_failure_policy": policy, "stream_recovery": policy == "recompute"}
        self.cluster.admin("policy", "PATCH", change)

    def lose_prefill_node(self, failpoint: str, *, count: int = NUM_REQUESTS) -> History:
        """The first prefill node that gets to this failpoint under load ends there."""
        before = [self.cluster.child(name) for name in PREFILL]
        self.shoot(failpoint)
        with self.load(count=count) as history:
            self.verify_shot(failpoint)
            verify(lambda: len(self.nemesis.gone(before)) == 1, "no prefill node died")
        return history

    def shoot(self, failpoint: str) -> None:
        """Load the failpoint for one shot."""
        (self.folder / failpoint).touch()

    def verify_shot(self, failpoint: str) -> None:
        verify(lambda: not (self.folder / failpoint).exists(), f"{failpoint} was not reached")
        self.nemesis.note(f"failpoint {failpoint}")

    def spoil(self, order: Order, names: Sequence[str] = PREFILL) -> None:
        """Give this order to the links of these nodes."""
        if os.environ.get(PLAIN_VARIABLE):
            pytest.skip("links follow no orders")
        for name in names:
            order.write(self.folder / name)

    def verify_spoiled(self, spoil: Spoil, count: int = 1) -> None:
        verify(lambda: self.num_spoiled() >= count, f"{spoil} was not done {count} times")
        self.nemesis.note(f"{spoil} of {self.num_spoiled()} frames")

    def num_spoiled(self) -> int:
        return sum(shots_done(self.folder / name) for name in PREFILL)

    def heal(self) -> None:
        """End whatever a row has left: stopped processes, bad links, loaded failpoints."""
        self.nemesis.heal()
        self.cluster.proxies.heal()
        for name in PREFILL:
            withdraw(self.folder / name)
        for failpoint in SHOTS:
            (self.folder / failpoint).unlink(missing_ok=True)

    # ---- counters --------------------------------------------------------------------------

    def counted(self, name: str, nodes: Sequence[str] = DECODE, **labels: str) -> float:
        """A counter, summed over these programs."""
        addresses = [self.cluster.metrics_address(node) for node in nodes]
        return sum(scrape(address).value(name, **labels) for address in addresses)

    # ---- checks ----------------------------------------------------------------------------

    def check(
        self,
        history: History,
        oracle: Mapping[int, Answer] | None = None,
        *,
        also_allowed: Collection[str] = (),
        may_err: Collection[int] | None = None,
        may_break: Collection[int] = (),
    ) -> None:
        endings = Counter(event.detail for event in history.events if event.kind in ENDINGS)
        print("endings:", dict(endings))
        asked = {event.request for event in history.events if event.request != NO_REQUEST}
        expected = self.oracle if oracle is None else oracle
        found = violations(
            history,
            {number: expected[number] for number in sorted(asked)},
            allowed_codes=FAULT_CODES | set(also_allowed),
            may_err=may_err,
            may_break=may_break,
        )
        assert not found, f"seed {SEED}: {found}"
        self._check_accounts(history)
        self._check_freed(history)

    def check_recovered(self) -> None:
        """All nodes are back, nothing is held, and the same prompts get the same tokens."""
        self.heal()
        eventually(self.cluster.is_whole, seconds=RECOVERS_WITHIN_SECONDS)
        self.check_nothing_is_held()  # a link that a transfer still drains on may be cut
        with self.load() as history:
            pass
        self.check(history)
        assert history.codes() == set()
        self.check_nothing_is_held()

    def check_nothing_is_held(self) -> None:
        found = await_quiescence(self.cluster, self.before)
        assert not found, f"seed {SEED}: {found}"

    def _check_accounts(self, history: History) -> None:
        """The gateways have counted what clients saw; nothing can be said of one that died."""
        recorded, before, gateways = self._accounts
        is_same = recorded is history and gateways == self._gateways()
        if before is None or not is_same or "broken" in history.kinds():
            return
        deadline = time.monotonic() + RECOVERS_WITHIN_SECONDS
        while found := disagreements(history, account_of(self.cluster).since(before)):
            assert time.monotonic() < deadline, f"seed {SEED}: {found}"
            time.sleep(0.1)
        assert not beyond_budget(history, account_of(self.cluster).since(before))

    def _check_freed(self, history: History) -> None:
        """Blocks of clients that have left came back in time."""
        deadline = time.monotonic() + FREED_WITHIN_SECONDS
        while found := not_freed(history):
            assert time.monotonic() < deadline, f"seed {SEED}: {found}"
            time.sleep(0.1)
            self.evidence.take(history)

    def _gateways(self) -> list[int | None]:
        return [self.cluster.pid_of(name) for name in self.cluster.gateway_ports]


def _remembers(gateway: Scrape) -> bool:
    """What was lost before: its budget is spent, or it holds pairs back."""
    return (
        gateway.value("baton_retries_left") < NUM_REQUESTS
        or gateway.value("baton_pairs_held_back") > 0
    )


@contextmanager
def running_rows(
    *options: str,
    folder: Path,
    num_gateways: int = 1,
    sizes: Sequence[str] = SIZES,
    env: Mapping[str, str] | None = None,
    node_env: Mapping[str, Mapping[str, str]] | None = None,
) -> Iterator[Rows]:
    """A cluster of the pocket model in float32, and its rows."""
    armed = ";".join(f"{name}={action}@{folder / name}" for name, action in SHOTS.items())
    cluster = FaultCluster(
        *sizes,
        *COMMON,
        *OPTIONS,
        *options,
        seed=SEED,
        num_gateways=num_gateways,
        env={VARIABLE: armed, **(env or {})},
        node_env=node_env,
        kv_orders=folder,
    )
    rows: Rows | None = None
    try:
        rows = Rows(cluster, folder)
        yield rows
    finally:
        if rows is not None:
            rows.heal()
        cluster.stop()


@contextmanager
def row_of(rows: Rows, request: pytest.FixtureRequest) -> Iterator[Rows]:
    """One row: healed at its end, and what happened told where it fails."""
    print(f"seed {SEED}")
    rows.forget_rows_before()
    num_lines = len(rows.cluster.lines)
    del rows.nemesis.log[:]
    yield rows
    rows.heal()
    print(f"{request.node.name}: {rows.nemesis.log}")
    print("\n".join(rows.cluster.lines[num_lines:][-60:]))
