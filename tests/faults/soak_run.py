"""One soak: clients ask, faults are made, and what happened is judged. `soak` is the command."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.faults.accounts import account_of, beyond_budget, disagreements
from tests.faults.asks import DEADLINE_SECONDS
from tests.faults.checker import FAULT_CODES, violations, wrong_tokens
from tests.faults.client import load
from tests.faults.history import NO_REQUEST, History
from tests.faults.nemesis import Nemesis
from tests.faults.soak_asks import AT_ONCE, NUM_TEMPLATES, repeated
from tests.faults.soak_faults import KINDS, Disturbances
from tests.faults.witness import Evidence

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from tests.faults.accounts import Account
    from tests.faults.asks import Ask
    from tests.faults.cluster import FaultCluster
    from tests.faults.soak_asks import Oracle

COUNTED_WITHIN_SECONDS = 30.0


@dataclass
class Soak:
    """One run. `problems`: what broke an invariant, in words."""

    cluster: FaultCluster
    folder: Path
    seed: int
    templates: Sequence[Ask]
    oracle: Oracle
    kinds: Collection[str] = KINDS
    history: History = field(default_factory=History)
    problems: list[str] = field(default_factory=list)
    num_wrong: int = 0
    hurried: set[int] = field(default_factory=set)  # may not be answered in time
    faults: Disturbances = field(init=False)

    def __post_init__(self) -> None:
        nemesis = Nemesis(self.cluster, self.history)
        self.faults = Disturbances(self.cluster, self.folder, self.seed, nemesis, self.kinds)

    def run(self, minutes: float) -> None:
        """Ask and make faults for that long; all requests have ended afterwards."""
        before = account_of(self.cluster)
        ends_at = time.monotonic() + 60.0 * minutes
        asks = repeated(self.seed, self.templates, ends_at)
        with load(self._url_of, asks, at_once=AT_ONCE, history=self.history):
            self.faults.make_until(ends_at)
        self.problems += self.faults.problems
        self._judge_witnesses()
        self._judge_answers()
        if not self.faults.lost_gateways():
            self._judge_accounts(before)

    def _url_of(self, ask: Ask) -> str:
        if ask.deadline_seconds < DEADLINE_SECONDS:
            self.hurried.add(ask.number)
        return self.cluster.url_of(ask)

    def _judge_witnesses(self) -> None:
        evidence = Evidence({name: self.folder / name for name in self.cluster.node_names})
        evidence.take(self.history)
        if evidence.looked != {"I3", "I5", "I7"}:
            self.problems.append(f"the witnesses in the nodes saw {sorted(evidence.looked)} only")

    def _judge_answers(self) -> None:
        numbers = {e.request for e in self.history.events if e.request != NO_REQUEST}
        expected = {number: self.oracle[number % NUM_TEMPLATES] for number in numbers}
        self.problems += violations(
            self.history,
            expected,
            allowed_codes=FAULT_CODES | {"overloaded"},
            may_break=self._asked_of_lost(numbers),
            may_err=self.hurried if self.faults.are_in_order else None,
        )
        self.num_wrong = wrong_tokens(self.history, expected)

    def _asked_of_lost(self, numbers: Collection[int]) -> set[int]:
        """Requests to gateways that were killed."""
        names = list(self.cluster.gateway_ports)
        lost = {name for name in names if self.faults.made[f"kill {name}"]}
        return {number for number in numbers if names[number % len(names)] in lost}

    def _judge_accounts(self, before: Account) -> None:
        """The gateways have counted what clients saw, once the last has been counted."""
        deadline = time.monotonic() + COUNTED_WITHIN_SECONDS
        while found := disagreements(self.history, account_of(self.cluster).since(before)):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        self.problems += found + beyond_budget(self.history, account_of(self.cluster).since(before))
