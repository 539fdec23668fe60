"""What ranks say to each other, and how each end hears that the other is gone."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from cluster.errors import ConfigError
from engine.tensor_parallel.failures import RankLost
from engine.tensor_parallel.rendezvous import FirstRank, OtherRank
from engine.tensor_parallel.wire import Channel, Closed, FrameKind, StepHeader

Pair = Callable[[], tuple[Channel, Channel]]


@pytest.fixture
def pair() -> Iterator[Pair]:
    channels: list[Channel] = []

    def make() -> tuple[Channel, Channel]:
        one, other = (Channel(end) for end in socket.socketpair())
        channels.extend((one, other))
        return one, other

    yield make
    for channel in channels:
        channel.close()


def test_a_step_arrives_with_its_header_and_its_bytes(pair: Pair) -> None:
    ours, theirs = pair()
    inputs = os.urandom(3 << 20)  # more than a socket takes at once
    header = StepHeader(True, 7, 3, 2, 16, 5)
    sending = threading.Thread(target=ours.send_step, args=(header, memoryview(inputs)))
    sending.start()
    kind, _ = theirs.receive_head()
    assert kind is FrameKind.STEP
    assert theirs.receive_step_header() == header
    memory = bytearray(len(inputs))
    theirs.receive_into(memoryview(memory))
    assert memory == inputs
    sending.join()


def test_all_ranks_hear_what_each_says(pair: Pair) -> None:
    ends = [pair() for _ in range(2)]
    heard: list[object] = [None, None]

    def say(place: int) -> None:
        heard[place] = OtherRank(ends[place][1]).exchange({"blocks": place})

    others = [threading.Thread(target=say, args=(place,)) for place in range(2)]
    for other in others:
        other.start()
    first = FirstRank([ours for ours, _ in ends]).exchange({"blocks": 9})
    for other in others:
        other.join()
    assert first == [{"blocks": 9}, {"blocks": 0}, {"blocks": 1}]
    assert heard == [first, first]


def test_a_rank_that_refuses_ends_the_start_with_its_words(pair: Pair) -> None:
    ours, theirs = pair()
    OtherRank(theirs).refuse("rank 1 has no memory")
    with pytest.raises(ConfigError, match="rank 1 has no memory"):
        FirstRank([ours]).exchange({})


def test_a_rank_that_is_gone_is_lost(pair: Pair) -> None:
    ours, theirs = pair()
    theirs.close()
    with pytest.raises(RankLost, match="Rank 1"):
        FirstRank([ours]).exchange({})
    with pytest.raises(Closed):
        ours.send_note(anything=1)


def test_a_descriptor_is_the_same_file_on_the_other_side(pair: Pair) -> None:
    ours, theirs = pair()
    reading, writing = os.pipe()
    ours.send_descriptor(writing)
    os.close(writing)
    passed = theirs.receive_descriptor()
    os.write(passed, b"x")
    assert os.read(reading, 1) == b"x"
    os.close(passed)
    os.close(reading)
