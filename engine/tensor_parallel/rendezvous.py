"""Where the ranks of one node meet while they start: each says something, all hear all.

`exchange` is at once a barrier and a vote. A worker that cannot go on says why instead (`refuse`),
and rank 0 raises that at the same place; when rank 0 cannot go on it ends the others. So nobody
waits for what will not come.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from cluster.errors import ConfigError
from engine.tensor_parallel.failures import RankLost
from engine.tensor_parallel.wire import Channel, Closed

if TYPE_CHECKING:
    from collections.abc import Sequence

Facts = dict[str, Any]


class Rendezvous(Protocol):
    def exchange(self, facts: Facts) -> list[Facts]:
        """What every rank says here, by rank. On rank 0 raises `ConfigError` with the words of a
        rank that refused, `RankLost` when one is gone; on a worker `Closed` in both cases."""


class FirstRank:
    """Rank 0: hears all, then tells all."""

    def __init__(self, channels: Sequence[Channel]) -> None:
        self._channels = channels

    def exchange(self, facts: Facts) -> list[Facts]:
        heard = [{"facts": facts}]
        for rank, channel in enumerate(self._channels, start=1):
            try:
                heard.append(channel.receive_note())
            except Closed:
                raise RankLost(f"Rank {rank} ended while it started.") from None
        for each in heard:
            if "refused" in each:
                raise ConfigError(str(each["refused"]), param="tensor_parallel_size")
        self._tell(heard=heard)
        return [each["facts"] for each in heard]

    def _tell(self, **facts: Any) -> None:
        for rank, channel in enumerate(self._channels, start=1):
            try:
                channel.send_note(**facts)
            except Closed:
                raise RankLost(f"Rank {rank} ended while it started.") from None


class OtherRank:
    """A worker: tells rank 0, hears all from it."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def exchange(self, facts: Facts) -> list[Facts]:
        self._channel.send_note(facts=facts)
        return [each["facts"] for each in self._channel.receive_note()["heard"]]

    def refuse(self, message: str) -> None:
        self._channel.send_note(refused=message)
