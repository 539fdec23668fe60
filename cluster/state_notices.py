"""Which gateways have answered that they know this node's state. Pure: time is an argument.

A node that leaves is to be known as leaving before anything of it is missed. The registry tells so
at a gateway's next poll; until then it submits what is refused, and may take for lost what was only
about to end. Nor does an idle decode node know of the prompts that wait for it elsewhere. So a node
says its state on its sessions, and goes when it has the answers.

Life of a notice
    1. `told`: the state has changed. Every session that hears states gets the notice and owes an
       answer; one that opens later begins with the state as it is then.
    2. `answered`, at once: the gateway acts by it. Both ways are streams, so what it had submitted
       before has been read here, and what was said here before has been read there.
    3. `answered` as settled, now or later: nor is anything to come by way of a prefill node. Of a
       node that drains this was its last work; one whose DRAINED was answered can go, and nothing
       is missed.
    4. A later notice takes the place of an earlier one, whether or not that was answered; a late
       answer to the earlier one answers nothing.
    5. A session that ends owes nothing. One that has not answered at all ANSWER_SECONDS after it
       was asked is waited for no longer: a gateway that stands still must not keep a node. One that
       has is waited for until it has settled, as it does when what it placed has come, or has run
       out of its time. Its shutdown timeout bounds that for a node that was told to end. For one
       that an operator drains nothing does, so it says whom it waits for (`awaited`, by `Inspect`).

A gateway that does not hear states (an older one) is told nothing and never waited for: it reads
the registry, and gets refusals until it has.
"""

from __future__ import annotations

from dataclasses import dataclass

ANSWER_SECONDS = 3.0


@dataclass(slots=True)
class _Hearer:
    """A session that hears states. Numbers are of notices, 0 of none."""

    asked_at: float
    known: int = 0
    settled: int = 0


class StateNotices:
    """The sessions that hear states, by gateway, and what each has answered."""

    def __init__(self) -> None:
        self.number = 0  # of the last notice
        self._hearers: dict[str, _Hearer] = {}

    def told(self, now: float) -> int:
        """The state has changed; the number of the notice that says so."""
        self.number += 1
        for hearer in self._hearers.values():
            hearer.asked_at = now
        return self.number

    def opened(self, gateway_id: str, now: float) -> None:
        """A session that hears states: the last notice goes there, too."""
        self._hearers[gateway_id] = _Hearer(asked_at=now)

    def answered(self, gateway_id: str, number: int, *, is_settled: bool) -> None:
        """One to a notice that was not given, or by nobody we told, says nothing."""
        hearer = self._hearers.get(gateway_id)
        if hearer is None or number > self.number:
            return
        hearer.known = max(hearer.known, number)
        if is_settled:
            hearer.settled = max(hearer.settled, number)

    def closed(self, gateway_id: str) -> None:
        self._hearers.pop(gateway_id, None)

    def is_answered(self, now: float) -> bool:
        """No session that hears states is waited for because of the last notice."""
        return not self.awaited(now)

    def awaited(self, now: float) -> list[str]:
        """The gateways that are."""
        return [name for name, hearer in self._hearers.items() if self._is_awaited(hearer, now)]

    def _is_awaited(self, hearer: _Hearer, now: float) -> bool:
        if hearer.settled == self.number:
            return False
        return hearer.known == self.number or now - hearer.asked_at < ANSWER_SECONDS
