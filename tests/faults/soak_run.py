"""One soak: what is asked, what is disturbed, and what must hold. `soak` is the command."""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from tests.faults.asks import FIRST_TOKEN, VOCABULARY, Ask, draw_prompt
from tests.faults.checker import FAULT_CODES, violations, wrong_tokens
from tests.faults.client import load
from tests.faults.history import NO_REQUEST, Answer, History
from tests.faults.kv_link import Order, Spoil, shots_done, withdraw
from tests.faults.nemesis import Nemesis, NotInjected, Planned, draw_schedule, verify
from tests.faults.proxy import Faults
from tests.faults.witness import Evidence

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tests.faults.cluster import FaultCluster

NUM_TEMPLATES = 48
NUM_STOP_IDS = 128
AT_ONCE = 8
PAUSE_SECONDS = (2.0, 8.0)  # between two faults
MIB = 1 << 20
NODES = ("prefill-0", "prefill-1", "decode-0", "decode-1")
FAULTS: tuple[tuple[str, str], ...] = (
    *(("kill", name) for name in (*NODES, "gateway-1", "redis") * 2),
    *(("stall", name) for name in (*NODES, "gateway-1", "redis") * 2),
    *(("unheard", name) for name in NODES * 2),
    ("slow", "redis"),
    *((spoil.value, name) for spoil in Spoil for name in NODES[:2]),
)
Oracle = dict[int, Answer]
STOPS = ("\n", ",", " the", "e ")


@dataclass
class Soak:
    """One run. `problems`: what broke an invariant, in words."""

    cluster: FaultCluster
    folder: Path
    seed: int
    templates: Sequence[Ask]
    oracle: Oracle
    history: History = field(default_factory=History)
    faults: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    num_wrong: int = 0
    nemesis: Nemesis = field(init=False)

    def __post_init__(self) -> None:
        self.nemesis = Nemesis(self.cluster, self.history)

    def run(self, minutes: float) -> None:
        """Ask and make faults for that long; all requests have ended afterwards."""
        ends_at = time.monotonic() + 60.0 * minutes
        asks = repeated(self.seed, self.templates, ends_at)
        with load(self.cluster.url_of, asks, at_once=AT_ONCE, history=self.history):
            for planned in draw_schedule(self.seed, 10_000, FAULTS, pause=PAUSE_SECONDS):
                if time.monotonic() + planned.pause_seconds + planned.lasts_seconds > ends_at:
                    break
                time.sleep(planned.pause_seconds)
                self.make(planned)
            self.heal()
        evidence = Evidence({name: self.folder / name for name in NODES})
        evidence.take(self.history)
        if evidence.looked != {"I3", "I5", "I7"}:
            self.problems.append(f"the witnesses in the nodes saw {sorted(evidence.looked)} only")
        numbers = {e.request for e in self.history.events if e.request != NO_REQUEST}
        expected = {number: self.oracle[number % NUM_TEMPLATES] for number in numbers}
        may_break = {n for n in numbers if n % 2} if self.faults["kill gateway-1"] else set()
        self.problems += violations(
            self.history,
            expected,
            allowed_codes=FAULT_CODES | {"overloaded"},
            may_break=may_break,
        )
        self.num_wrong = wrong_tokens(self.history, expected)

    def make(self, planned: Planned) -> None:
        """One fault, from its beginning to its end."""
        name, what = planned.name, planned.what
        was_there = self._is_there(name)
        try:
            if what in set(Spoil):
                self._spoil(Spoil(what), name)
            elif what == "kill":
                self._kill(name)
            elif what == "stall":
                pid = self.nemesis.stop(name)
                time.sleep(planned.lasts_seconds)  # how long the fault lasts
                self.nemesis.resume(pid)
            else:
                self._disturb(what, name, planned.lasts_seconds)
        except LookupError:
            return  # it is on its way up again from an earlier fault
        except NotInjected as error:
            if was_there and self._is_there(name):
                self.problems.append(f"a fault did not take place: {what} {name}: {error}")
            return
        self.faults[f"{what} {name}"] += 1

    def heal(self) -> None:
        self.nemesis.heal()
        self.cluster.proxies.heal()
        for name in NODES:
            withdraw(self.folder / name)

    def _kill(self, name: str) -> None:
        self.nemesis.kill(name)
        if name == "redis":
            self.cluster.redis.reap()
            self.cluster.redis.start()

    def _disturb(self, what: str, name: str, seconds: float) -> None:
        proxy = self.cluster.redis_proxy if name == "redis" else self.cluster.node_proxies[name]
        counter = "delayed" if what == "slow" else "blackholed"
        before = proxy.counters[counter]
        faults = Faults(delay_seconds=0.3) if what == "slow" else Faults(is_blackholed=True)
        self.nemesis.note(f"{what} {name}")
        proxy.faults_up = proxy.faults_down = faults
        time.sleep(seconds)  # how long the fault lasts
        try:
            verify(lambda: proxy.counters[counter] > before, "nothing passed the proxy")
        finally:
            proxy.heal()

    def _spoil(self, spoil: Spoil, name: str) -> None:
        folder = self.folder / name
        # Else a node that was lost before may be asked for nothing: others have all prompts cached.
        self.cluster.admin("prefix-cache:reset", "POST")
        Order(spoil=spoil, seconds=1.0, bytes_per_second=0.5 * MIB).write(folder)
        self.nemesis.note(f"{spoil} at {name}")
        try:
            # At that rate a large frame takes long.
            verify(lambda: shots_done(folder) > 0, "no frame came to be spoiled", seconds=30.0)
        finally:
            withdraw(folder)

    def _is_there(self, name: str) -> bool:
        """It runs and its peers use it: a fault should have met something."""
        return name == "redis" or self.cluster.is_whole()


def draw_templates(seed: int) -> list[Ask]:
    """Kinds of requests of three tenants: some begin alike, some are sampled, some are not
    streamed."""
    draw = random.Random(seed)
    stems = [draw_prompt(draw, 100, 300) for _ in range(4)]
    templates = []
    for number in range(NUM_TEMPLATES):
        stem = draw.choice(stems)[: draw.randrange(0, 300)] if draw.random() < 0.5 else ()
        is_sampled = draw.random() < 0.25
        templates.append(
            Ask(
                number=number,
                prompt=stem + draw_prompt(draw, 1, 200),
                num_tokens=draw.choice((1, 2, 16, 48, 96)),
                is_stream=draw.random() < 0.8,
                temperature=0.8 if is_sampled else 0.0,
                top_p=0.9 if is_sampled else 1.0,
                seed=number if is_sampled else None,
                cache_salt=f"tenant-{number % 3}",
            )
        )
    return [_stopping(draw, ask) for ask in templates]


def _stopping(draw: random.Random, ask: Ask) -> Ask:
    """One in four may end before it has all of its tokens."""
    if draw.random() < 0.75:
        return ask
    if draw.random() < 0.5:
        return replace(ask, stop=draw.choice(STOPS))
    ids = draw.sample(range(FIRST_TOKEN, VOCABULARY), NUM_STOP_IDS)
    return replace(ask, stop_token_ids=tuple(ids))


def repeated(seed: int, templates: Sequence[Ask], ends_at: float) -> Iterator[Ask]:
    """These requests in random order until then; one of ten clients leaves early."""
    draw = random.Random(seed + 1)
    round_number = 0
    while True:
        round_number += 1
        for template in draw.sample(list(templates), len(templates)):
            if time.monotonic() > ends_at:
                return
            leaves = template.is_stream and draw.random() < 0.1
            yield replace(
                template,
                number=template.number + NUM_TEMPLATES * round_number,
                leaves_after=draw.randrange(template.num_tokens) if leaves else None,
                leaves_by_reset=draw.random() < 0.5,
            )


def steady(cluster: FaultCluster, templates: Sequence[Ask]) -> tuple[list[Ask], Oracle]:
    """Those whose tokens are the same alone and among others, with cached prefixes and without,
    and their answers. A sum of floats in another order may tip a close choice: where it does
    undisturbed, nothing could be said of it disturbed."""
    first = answers(cluster, templates)
    again = [answers(cluster, templates)]
    cluster.admin("prefix-cache:reset", "POST")
    again += [answers(cluster, templates, at_once=1), answers(cluster, templates)]
    kept = [
        ask
        for ask in templates
        if {each[ask.number].token_ids for each in again} == {first[ask.number].token_ids}
    ]
    if any(each[ask.number] != first[ask.number] for ask in kept for each in again):
        raise RuntimeError("the same tokens were counted otherwise, or ended for another reason")
    return kept, {ask.number: first[ask.number] for ask in kept}


def answers(cluster: FaultCluster, templates: Sequence[Ask], *, at_once: int = AT_ONCE) -> Oracle:
    """Of each request, asked in peace. Raises `RuntimeError` when one fails."""
    with load(cluster.url_of, templates, at_once=at_once) as history:
        pass
    if history.erred():
        raise RuntimeError(f"requests failed although nothing was disturbed: {history.codes()}")
    return {ask.number: history.answer_of(ask.number) for ask in templates}
