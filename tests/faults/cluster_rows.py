"""A cluster that rows of the fault matrix are run on, one after the other."""

from __future__ import annotations

import random
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cluster.failpoints import VARIABLE
from tests.e2e.cluster_process import ClusterProcess, eventually
from tests.faults.checker import violations
from tests.faults.history import ENDINGS, Ask, History, stream
from tests.faults.nemesis import Nemesis, verify

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

NUM_REQUESTS, NUM_TOKENS = 6, 64
RECOVERS_WITHIN_SECONDS = 30.0
SHOTS = {  # failpoint -> what it does when its file is there
    "prefill.after_chunk": "exit",
    "prefill.before_commit": "exit",
    "prefill.after_commit": "exit",
    "prefill.after_frame": "stop",
}


@dataclass
class Rows:
    """`oracle`: the tokens of each prompt, from the same cluster before anything happened to it.
    Without a prefix cache, so that each hand-off carries the whole prompt."""

    cluster: ClusterProcess
    shots: Path
    seed: int
    prompts: list[tuple[int, ...]] = field(default_factory=list)
    oracle: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        draw = random.Random(self.seed)
        lengths = [draw.randrange(200, 400) for _ in range(NUM_REQUESTS)]
        self.prompts = [tuple(draw.randrange(10, 6000) for _ in range(n)) for n in lengths]
        with self.load() as history:
            pass
        assert history.kinds().count("finished") == NUM_REQUESTS
        self.oracle = {
            number: tuple(token for event in history.of(number) for token in event.token_ids)
            for number in range(NUM_REQUESTS)
        }

    @contextmanager
    def load(
        self, *, count: int = NUM_REQUESTS, leaves_after: Sequence[int | None] = ()
    ) -> Iterator[History]:
        """That many streams run during the block; all have ended when it is left."""
        history = History()
        leaves = [*leaves_after, *[None] * count]
        with ThreadPoolExecutor(count) as pool:
            streams: list[Future[None]] = []
            for number in range(count):
                ask = Ask(
                    number=number,
                    prompt=self.prompts[number],
                    num_tokens=NUM_TOKENS,
                    leaves_after=leaves[number],
                )
                streams.append(pool.submit(stream, history, self.cluster.url, ask))
            yield history
        for each in streams:
            each.result()

    def lose_prefill_node(
        self, nemesis: Nemesis, failpoint: str, *, count: int = NUM_REQUESTS
    ) -> History:
        """The first prefill node that gets to this failpoint under load ends there."""
        before = [self.cluster.child(name) for name in ("prefill-0", "prefill-1")]
        self.shoot(failpoint)
        with self.load(count=count) as history:
            self.verify_shot(failpoint)
            verify(lambda: len(nemesis.gone(before)) == 1, "no prefill node died")
        self.check(history, count=count)
        return history

    def shoot(self, failpoint: str) -> None:
        """Load the failpoint for one shot."""
        (self.shots / failpoint).touch()

    def verify_shot(self, failpoint: str) -> None:
        verify(lambda: not (self.shots / failpoint).exists(), f"{failpoint} was not reached")

    def check(self, history: History, *, count: int = NUM_REQUESTS) -> None:
        endings = Counter(event.detail for event in history.events if event.kind in ENDINGS)
        print("endings:", dict(endings))
        oracle = {number: self.oracle[number] for number in range(count)}
        found = violations(history, oracle)
        assert not found, f"seed {self.seed}: {found}"

    def check_recovered(self) -> None:
        """All nodes are back, all blocks free, and the same prompts get the same tokens."""
        eventually(self._is_whole, seconds=RECOVERS_WITHIN_SECONDS)
        with self.load() as history:
            pass
        self.check(history)
        assert history.codes() == set()
        eventually(self.cluster.all_blocks_are_back)

    def _is_whole(self) -> bool:
        nodes = self.cluster.nodes()
        return (
            len(nodes) == 4
            and all(node["state"] == "ready" for node in nodes.values())
            and self.cluster.all_blocks_are_back()
        )


@contextmanager
def running_rows(policy: str, *options: str, shots: Path, seed: int) -> Iterator[Rows]:
    """Two prefill and two decode nodes with the pocket model in float32."""
    armed = ";".join(f"{name}={action}@{shots / name}" for name, action in SHOTS.items())
    cluster = ClusterProcess(
        *("--prefill", "2", "--decode", "2", "--dtype", "float32", "--lease-seconds", "3"),
        *("--max-num-batched-tokens", "128", "--no-enable-prefix-caching"),
        *("--kv-load-failure-policy", policy, "--max-recomputes", "16", *options),
        env={VARIABLE: armed},
    )
    nemesis = Nemesis(cluster)
    try:
        yield Rows(cluster, shots, seed)
    finally:
        nemesis.heal()
        cluster.stop()
