"""When reads may begin: the rate, the turns, and what never waits."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from kv_transfer.receiving.read_pace import Read, ReadPace

MB = 1_000_000
RATE = 1000 * MB  # 1 MB a millisecond; 4 MB may be ahead


@dataclass
class Reads:
    """Those of a pace, by name, in the order in which they began."""

    pace: ReadPace = field(default_factory=lambda: ReadPace(RATE, patience_seconds=0.25))
    begun: list[str] = field(default_factory=list)
    names: dict[Read, str] = field(default_factory=dict)

    def ask(
        self,
        name: str,
        now: float,
        *,
        mb: float = 4,
        is_awaited: bool = False,
        is_decoding: bool = True,
    ) -> None:
        """The first letter of a name is its transfer's."""
        num_bytes = int(mb * MB)
        read = Read(name[0].encode(), num_bytes, now, is_awaited, lambda: None, lambda: None)
        self.names[read] = name
        self._note(self.pace.asked(read, now, is_decoding=is_decoding))

    def at(self, now: float, *, is_decoding: bool = True) -> list[str]:
        """What has begun in all, when it was asked then."""
        self._note(self.pace.due(now, is_decoding=is_decoding))
        return self.begun

    def _note(self, reads: list[Read]) -> None:
        self.begun += [self.names[read] for read in reads]


def test_what_fits_the_allowance_begins_at_once_and_the_rest_at_the_rate() -> None:
    reads = Reads()
    for name in ("a1", "a2", "a3", "a4"):
        reads.ask(name, 0.0)
    assert reads.begun == ["a1", "a2"], "the second began when the first was 4 ms ahead"
    assert reads.pace.seconds_to_next(0.0) == pytest.approx(0.004)
    assert reads.at(0.0039) == ["a1", "a2"]
    assert reads.at(0.0041) == ["a1", "a2", "a3"]
    assert reads.at(0.0081) == ["a1", "a2", "a3", "a4"]
    assert reads.pace.is_empty


def test_over_a_long_time_the_rate_is_kept_however_late_the_timer() -> None:
    reads = Reads()
    for number in range(100):
        reads.ask(f"a{number}", 0.0, mb=1)
    for tick in range(1, 31):
        reads.at(tick * 0.0017)
    assert len(reads.begun) == pytest.approx(51 + 4, abs=1)


def test_time_in_which_nothing_came_does_not_add_up() -> None:
    reads = Reads()
    reads.ask("a1", 0.0)
    for number in range(2, 9):
        reads.ask(f"a{number}", 60.0)
    assert reads.begun == ["a1", "a2", "a3"]


def test_a_transfer_with_many_frames_takes_turns_with_the_others() -> None:
    reads = Reads()
    for name in ("a1", "a2", "a3", "a4", "a5", "b1", "b2", "c1"):
        reads.ask(name, 0.0)
    order = []
    for tick in range(1, 8):
        order = reads.at(tick * 0.00401)
    assert order == ["a1", "a2", "a3", "b1", "c1", "a4", "b2", "a5"]


def test_the_last_layer_waits_for_nobody_and_takes_along_what_its_transfer_lacks() -> None:
    reads = Reads()
    for name in ("a1", "a2", "a3", "b1", "b2"):
        reads.ask(name, 0.0)
    reads.ask("b9", 0.0, mb=1, is_awaited=True)
    assert reads.begun == ["a1", "a2", "b1", "b2", "b9"]
    assert reads.at(0.0129) == reads.begun, "who waits pays for it"
    assert "a3" in reads.at(0.0131)


def test_nothing_waits_while_nothing_is_decoded_and_that_costs_nobody() -> None:
    reads = Reads()
    for name in ("a1", "a2", "a3"):
        reads.ask(name, 0.0, mb=1000, is_decoding=False)
    assert reads.begun == ["a1", "a2", "a3"]
    reads.ask("a4", 0.0)
    reads.ask("a5", 0.0)
    reads.ask("a6", 0.0)
    assert reads.begun == ["a1", "a2", "a3", "a4", "a5"]
    assert reads.at(0.0, is_decoding=False)[-1] == "a6", "what waited goes when decoding ends"


def test_without_a_rate_nothing_waits() -> None:
    reads = Reads(ReadPace(0.0, patience_seconds=0.25))
    for number in range(9):
        reads.ask(f"a{number}", 0.0, mb=1000)
    assert len(reads.begun) == 9


def test_nothing_waits_longer_than_the_patience() -> None:
    reads = Reads()
    reads.ask("a1", 0.0, mb=1_000_000)
    reads.ask("b1", 0.0)
    reads.ask("c1", 0.1)
    reads.ask("b2", 0.1)
    assert reads.pace.seconds_to_next(0.1) == pytest.approx(0.15)
    assert reads.at(0.249) == ["a1"]
    assert reads.at(0.251) == ["a1", "b1"]
    assert set(reads.at(0.351)) == {"a1", "b1", "c1", "b2"}


def test_what_nobody_wants_leaves_and_makes_room() -> None:
    reads = Reads()
    for name in ("a1", "a2", "a3", "a4", "b1"):
        reads.ask(name, 0.0)
    left = reads.pace.without(lambda transfer_id: transfer_id == b"b")
    assert [reads.names[read] for read in left] == ["a3", "a4"]
    assert reads.at(0.0041) == ["a1", "a2", "b1"]
    assert reads.pace.is_empty
