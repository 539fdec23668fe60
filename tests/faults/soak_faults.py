"""The faults of a soak: what is done to which program, one after the other."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.faults.kv_link import Order, shots_done, withdraw
from tests.faults.nemesis import NotInjected, draw_schedule, verify
from tests.faults.proxy import Faults
from tests.faults.spoiled_bytes import Spoil

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from tests.faults.cluster import FaultCluster
    from tests.faults.nemesis import Nemesis, Planned

PAUSE_SECONDS = (2.0, 8.0)  # between two faults
RATE_BYTES = 1 << 19
KINDS = ("kill", "end", "cordon", "stall", "unheard", "slow", "spoil")
IN_ORDER = frozenset({"end", "cordon", "slow"})  # an operator may, and no client notices


def faults_of(cluster: FaultCluster, kinds: Collection[str]) -> list[tuple[str, str]]:
    """All that may be done, and to whom. The first gateway stays: the checks ask it."""
    nodes = cluster.node_names
    gateways = list(cluster.gateway_ports)[1:]
    all_of = {
        "kill": [("kill", name) for name in (*nodes, *gateways, "redis") * 2],
        "end": [("end", name) for name in (*nodes, *gateways)],
        "cordon": [("cordon", name) for name in nodes],
        "stall": [("stall", name) for name in (*nodes, *gateways, "redis") * 2],
        "unheard": [("unheard", name) for name in nodes * 2],
        "slow": [("slow", "redis")],
        "spoil": [
            (spoil.value, name) for spoil in Spoil for name in nodes if name.startswith("prefill")
        ],
    }
    return [fault for kind in KINDS if kind in kinds for fault in all_of[kind]]


@dataclass
class Disturbances:
    """`made`: what took place, by what and to whom. `problems`: what should have, and did not."""

    cluster: FaultCluster
    folder: Path
    seed: int
    nemesis: Nemesis
    kinds: Collection[str] = KINDS
    made: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def make_until(self, ends_at: float) -> None:
        """One after the other; all has healed at the end."""
        faults = faults_of(self.cluster, self.kinds)
        num_most = 10_000 if faults else 0
        for planned in draw_schedule(self.seed, num_most, faults, pause=PAUSE_SECONDS):
            if time.monotonic() + planned.pause_seconds + planned.lasts_seconds > ends_at:
                break
            was_whole = self.cluster.is_whole()
            time.sleep(planned.pause_seconds)
            if planned.what not in IN_ORDER or (was_whole and self.cluster.is_whole()):
                self._make(planned)  # nobody orders a node out while another is missing
        self.heal()

    def heal(self) -> None:
        self.nemesis.heal()
        self.cluster.proxies.heal()
        for name in self.cluster.node_names:
            withdraw(self.folder / name)

    @property
    def are_in_order(self) -> bool:
        return {fault.split()[0] for fault in self.made} <= IN_ORDER

    def lost_gateways(self) -> set[str]:
        """Those whose connections broke, and whose counters began again."""
        names = self.cluster.gateway_ports
        return {name for name in names for what in ("kill", "end") if self.made[f"{what} {name}"]}

    def _make(self, planned: Planned) -> None:
        """From its beginning to its end."""
        name, what = planned.name, planned.what
        was_there = self._is_there(name)
        try:
            if what in set(Spoil):
                self._spoil(Spoil(what), name)
            elif what == "kill":
                self._kill(name)
            elif what == "end":
                self.nemesis.end(name)
            elif what == "cordon":
                self._cordon(name, planned.lasts_seconds)
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
        self.made[f"{what} {name}"] += 1

    def _kill(self, name: str) -> None:
        self.nemesis.kill(name)
        if name == "redis":
            self.cluster.redis.reap()
            self.cluster.redis.start()

    def _cordon(self, name: str, seconds: float) -> None:
        """It gets nothing new for as long."""
        self.nemesis.note(f"cordon {name}")
        try:
            self.cluster.admin(f"nodes/{name}:cordon", "POST")
            time.sleep(seconds)  # how long the fault lasts
            self.cluster.admin(f"nodes/{name}:uncordon", "POST")
        except OSError as error:
            raise NotInjected(str(error)) from error

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
        Order(spoil=spoil, seconds=1.0, bytes_per_second=RATE_BYTES).write(folder)
        self.nemesis.note(f"{spoil} at {name}")
        try:
            # At that rate a large frame takes long.
            verify(lambda: shots_done(folder) > 0, "no frame came to be spoiled", seconds=30.0)
        finally:
            withdraw(folder)

    def _is_there(self, name: str) -> bool:
        """It runs and its peers use it: a fault should have met something."""
        return name == "redis" or self.cluster.is_whole()
