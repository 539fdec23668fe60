"""Invariant I8: what the gateways count is what clients saw, each failure in one counter."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway.retries import MAX_SAVED_RETRIES, RETRY_SHARE
from tests.faults.metrics import scrape

if TYPE_CHECKING:
    from tests.faults.cluster import FaultCluster
    from tests.faults.history import History

LEFT = "cancelled"
MAX_GATEWAYS = 2  # each has a budget of its own


@dataclass(frozen=True, slots=True)
class Account:
    """Requests at all gateways since they started: those that ended, and errors by code."""

    num_ended: int
    errors: Counter[str]
    retries: Counter[str]

    def since(self, before: Account) -> Account:
        """What was added after `before`."""
        return Account(
            self.num_ended - before.num_ended,
            self.errors - before.errors,
            self.retries - before.retries,
        )


def account_of(cluster: FaultCluster) -> Account:
    """As the gateways count now."""
    ended, errors, retries = 0, Counter[str](), Counter[str]()
    for name in cluster.gateway_ports:
        metrics = scrape(cluster.metrics_address(name))
        ended += round(metrics.value("baton_requests_total"))
        errors += metrics.by("baton_request_errors_total", "code")
        retries += metrics.by("baton_retries_total", "kind")
    return Account(ended, errors, retries)


def beyond_budget(history: History, counted: Account) -> list[str]:
    """Re-dispatches, where there were more than a tenth of the requests and what was saved (I6)."""
    num_sent, num_again = history.kinds().count("sent"), counted.retries["redispatch"]
    most = MAX_SAVED_RETRIES * MAX_GATEWAYS + RETRY_SHARE * num_sent
    return [] if num_again <= most else [f"{num_again} re-dispatches for {num_sent} requests"]


def disagreements(history: History, counted: Account) -> list[str]:
    """Where the counters and the clients differ, in words. Not for gateways that were killed:
    their counters began again."""
    kinds = history.kinds()
    seen = Counter(e.detail for e in history.events if e.kind in ("failed", "refused"))
    num_left = kinds.count("left")
    found = []
    if counted.num_ended != kinds.count("sent"):
        found.append(f"{kinds.count('sent')} requests sent, {counted.num_ended} counted")
    for code in sorted(set(seen) | set(counted.errors)):
        expected, is_counted = seen[code], counted.errors[code]
        # A client may leave in the very moment in which its request ends.
        spare = num_left if code == LEFT else 0
        is_right = expected <= is_counted <= expected + spare
        if not is_right:
            found.append(f"{expected} clients saw {code}, {is_counted} are counted")
    return found
