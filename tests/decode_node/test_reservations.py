"""Blocks promised to hand-offs: by urgency, then as they came, and all of them come back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from cluster.errors import Cancelled, ContextLengthExceeded, TransferFailed
from cluster.prefix_hash import root_hash
from cluster.request import SamplingParams, SequenceRequest
from decode_node.reservations import Reservations, ReservedBlocks
from decode_node.scheduler import DecodeScheduler
from engine.block_manager import BlockManager
from engine.sequence import Sequence
from tests.sequences import compute, run_step

if TYPE_CHECKING:
    from concurrent.futures import Future

    from decode_node.scheduler import Place

BLOCK = 4


def make_sequence(name: str, num_tokens: int, first: int = 1, *, priority: int = 0) -> Sequence:
    request = SequenceRequest(
        sequence_id=name,
        request_id=name,
        prompt_token_ids=tuple(range(first, first + num_tokens)),
        sampling=SamplingParams(max_tokens=4, seed=0),
        priority=priority,
    )
    return Sequence(request, block_size=BLOCK, root=root_hash("m", b""))


@dataclass
class Others:
    num_running: int
    num_preempted: int

    def place_for(self, handoff: Sequence) -> Place:
        return 0, 0

    def lacks_blocks(self, place: Place) -> bool:
        return False


def make(
    num_blocks: int, num_running: int = 0, num_preempted: int = 0
) -> tuple[BlockManager, Reservations]:
    manager = BlockManager(num_blocks, BLOCK)
    reservations = Reservations(manager, Others(num_running, num_preempted))
    return manager, reservations


class Node:
    """A scheduler beside them. Hand-offs come at once, as soon as they have blocks."""

    def __init__(self, num_blocks: int, max_num_seqs: int) -> None:
        self.manager = BlockManager(num_blocks, BLOCK)
        self.scheduler = DecodeScheduler(
            self.manager,
            64,
            max_num_seqs,
            first_handoff=lambda: self.reservations.first_place,
        )
        self.reservations = Reservations(self.manager, self.scheduler)
        self.asked: dict[str, Future[ReservedBlocks]] = {}
        self.num_asked = self.num_own = 0

    def hand_off(self, num_tokens: int = 2 * BLOCK, *, priority: int = 0) -> None:
        name = f"h{self.num_asked}"
        self.num_asked += 1
        sequence = make_sequence(name, num_tokens, first=1000 * self.num_asked, priority=priority)
        self.asked[name] = self.reservations.ask(sequence)

    def fill_with_own(self) -> None:
        """Prompts computed here, each another one, until four of them wait."""
        while self.scheduler.num_waiting < 4:
            self.num_own += 1
            name, first = f"here{self.num_own}", 10**6 * self.num_own
            self.scheduler.add(make_sequence(name, BLOCK, first=first))

    def step(self) -> None:
        for name, blocks in list(self.asked.items()):
            if blocks.done():
                del self.asked[name]
                self.scheduler.add(self.reservations.start(name, first_token_id=7))
        self.scheduler.update(run_step(self.scheduler.schedule(), self.manager))
        self.reservations.retry()


def test_a_prompt_gets_a_block_for_each_started_position() -> None:
    _, reservations = make(8)
    reserved = reservations.ask(make_sequence("a", 9)).result(0)
    assert len(reserved.block_ids) == 3
    assert reserved.num_held_blocks == 0


def test_who_finds_no_room_waits_and_is_served_in_order() -> None:
    manager, reservations = make(4)
    first = reservations.ask(make_sequence("a", 12, first=100))
    second = reservations.ask(make_sequence("b", 12, first=200))
    third = reservations.ask(make_sequence("c", 1, first=300))
    assert first.done()
    assert not second.done()
    assert not third.done(), "the third must not overtake the second"
    reservations.cancel("a")
    assert second.done()
    assert third.done()
    for name in ("b", "c"):
        reservations.cancel(name)
    assert manager.num_free_blocks == 4
    manager.check_integrity()


def test_a_block_per_running_sequence_stays_free() -> None:
    _, reservations = make(4, num_running=2)
    assert not reservations.ask(make_sequence("a", 9)).done()
    assert reservations.num_waiting == 1
    assert reservations.queued_tokens == 9


def test_nobody_is_served_while_a_preempted_sequence_waits_for_its_blocks() -> None:
    _, reservations = make(8, num_preempted=1)
    assert not reservations.ask(make_sequence("a", 4)).done()


@pytest.mark.parametrize(("num_blocks", "max_num_seqs"), [(8, 16), (64, 2)])
def test_hand_offs_that_never_cease_leave_room_for_a_prompt_that_is_computed_here(
    num_blocks: int, max_num_seqs: int
) -> None:
    node = Node(num_blocks, max_num_seqs)
    for _ in range(8):
        node.hand_off()
    node.step()
    prompt = make_sequence("here", 3 * BLOCK)
    node.scheduler.add(prompt)
    for _ in range(40):  # ten times as many steps as one of them takes
        while len(node.asked) < 8:
            node.hand_off()
        node.step()
    assert prompt.is_finished


def test_prompts_computed_here_that_never_cease_leave_room_for_a_hand_off() -> None:
    node = Node(num_blocks=8, max_num_seqs=16)
    for step in range(40):
        node.fill_with_own()
        if step == 2:
            node.hand_off(6 * BLOCK)
        node.step()
    assert node.num_asked == 1
    assert not node.asked


def test_an_urgent_hand_off_does_not_wait_behind_others_that_whoever_comes_overtakes() -> None:
    node = Node(num_blocks=8, max_num_seqs=16)
    for step in range(40):
        node.fill_with_own()
        if step == 2:
            node.hand_off(6 * BLOCK, priority=1)
            node.hand_off(6 * BLOCK)
        node.step()
    assert list(node.asked) == ["h0"]


def test_hand_offs_wait_by_urgency_then_as_they_came_and_no_step_compares_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A node that is full has hundreds of them, and looks for the first at each step."""
    compared: list[Place] = []

    class Counted(tuple[int, int]):
        def __lt__(self, other: tuple[int, ...]) -> bool:
            compared.append(self)
            return super().__lt__(other)

    node = Node(num_blocks=8, max_num_seqs=16)
    place_for = node.scheduler.place_for
    monkeypatch.setattr(node.scheduler, "place_for", lambda asked: Counted(place_for(asked)))
    for priority in (2, 1, 0, -1, 0, 1, -1):
        node.hand_off(6 * BLOCK, priority=priority)
    compared.clear()
    node.reservations.retry()
    assert node.reservations.first_place == (-1, 0)
    assert not compared
    served = []
    while node.asked:
        (name,) = (name for name, blocks in node.asked.items() if blocks.done())
        served.append(name)
        del node.asked[name]
        node.reservations.cancel(name)
    assert served == ["h0", "h3", "h6", "h2", "h4", "h1", "h5"]


@pytest.mark.parametrize("priority", [-1, 0, 1])
def test_a_prompt_and_a_hand_off_never_wait_for_each_other(priority: int) -> None:
    """Whoever of them is more urgent or, of the same urgency, came first."""
    node = Node(num_blocks=8, max_num_seqs=16)
    node.scheduler.add(make_sequence("running", BLOCK, first=10**6))
    node.step()
    prompt = make_sequence("here", 7 * BLOCK, priority=priority)
    node.scheduler.add(prompt)
    node.hand_off(6 * BLOCK)
    served = []
    for _ in range(20):
        node.step()
        if prompt.is_finished and "prompt" not in served:
            served.append("prompt")
        if not node.asked and "hand-off" not in served:
            served.append("hand-off")
    assert served == ["hand-off", "prompt"][:: 1 if priority > 0 else -1]


def test_who_comes_later_to_be_computed_here_keeps_no_hand_off_waiting() -> None:
    node = Node(num_blocks=8, max_num_seqs=16)
    for _ in range(6):
        node.hand_off()
    assert node.reservations.num_waiting == 2
    node.scheduler.add(make_sequence("here", 6 * BLOCK))
    while node.asked:
        node.step()
        assert node.scheduler.get("here") is not None


def test_a_prompt_that_can_never_fit_is_refused_at_once() -> None:
    _, reservations = make(2)
    with pytest.raises(ContextLengthExceeded):
        reservations.ask(make_sequence("a", 9))


def test_a_started_sequence_owns_its_blocks_and_others_hit_its_prompt() -> None:
    manager, reservations = make(8)
    reservations.ask(make_sequence("a", 8)).result(0)
    sequence = reservations.start("a", first_token_id=77)
    assert sequence.num_computed_tokens == 8
    assert sequence.token_ids[-1] == 77
    reservations.before_step()  # its first
    assert reservations.ask(make_sequence("too early", 4)).result(0).num_held_blocks == 0
    reservations.cancel("too early")
    reservations.before_step()  # while that one runs
    again = reservations.ask(make_sequence("b", 8)).result(0)
    assert again.num_held_blocks == 2
    assert list(again.block_ids[:2]) == sequence.block_table[:2]
    reservations.cancel("b")
    manager.free(sequence)
    assert manager.num_free_blocks == 8
    manager.check_integrity()


def test_a_start_after_cancel_is_refused_and_cancel_twice_is_harmless() -> None:
    manager, reservations = make(8)
    reservations.ask(make_sequence("a", 8))
    reservations.cancel("a")
    reservations.cancel("a")
    with pytest.raises(TransferFailed):
        reservations.start("a", 1)
    assert manager.num_free_blocks == 8


def test_a_waiting_one_that_is_cancelled_hears_of_it() -> None:
    _, reservations = make(4)
    reservations.ask(make_sequence("a", 12))
    waiting = reservations.ask(make_sequence("b", 12))
    reservations.cancel("b")
    with pytest.raises(Cancelled):
        waiting.result(0)


def test_who_waited_behind_one_that_is_cancelled_is_served_at_once() -> None:
    """Nothing may run that could ask again: the only other sequence is still on its way."""
    _, reservations = make(4)
    assert reservations.ask(make_sequence("a", 8, first=100)).done()
    reservations.ask(make_sequence("long", 12, first=200))
    behind = reservations.ask(make_sequence("b", 4, first=300))
    assert not behind.done()
    reservations.cancel("long")
    assert behind.done()


def test_one_who_gives_up_waiting_cannot_end_it_under_the_engines_hands() -> None:
    _, reservations = make(4)
    reservations.ask(make_sequence("a", 12))
    waiting = reservations.ask(make_sequence("b", 12))
    assert not waiting.cancel()
    reservations.cancel("a")
    assert waiting.done()


def test_a_sharer_of_a_bad_block_does_not_hit_it_before_its_owner_has_computed_it() -> None:
    """vllm#49250: who shared the block resumed first, with what was wrong in it."""
    _, reservations = make(8)
    reservations.ask(make_sequence("a", 12)).result(0)
    owner = reservations.start_partly("a", num_good_blocks=1)
    assert owner is not None
    sharer = reservations.ask(make_sequence("b", 12)).result(0)
    assert sharer.num_held_blocks == 1
    assert not set(sharer.block_ids[1:]) & set(owner.block_table)


@pytest.mark.parametrize("num_cached_blocks", [0, 1, 2])
def test_what_is_computed_again_is_written_to_no_block_that_others_read(
    num_cached_blocks: int,
) -> None:
    manager, reservations = make(8)
    other = make_sequence("other", 8)
    if num_cached_blocks:
        assert compute(manager, other, num_cached_blocks * BLOCK)
    reserved = reservations.ask(make_sequence("a", 8)).result(0)
    assert reserved.num_held_blocks == num_cached_blocks
    sequence = reservations.start_partly("a", num_good_blocks=2)
    assert sequence is not None
    scheduler = DecodeScheduler(manager, 64, 8)
    scheduler.add(sequence)
    (chunk,) = scheduler.schedule().chunks
    assert chunk.samples
    written = sequence.block_table[chunk.begin // BLOCK :]
    assert written
    assert not set(written) & set(other.block_table)
    scheduler.abort("a")
    manager.free(other)
    assert manager.num_free_blocks == 8
    manager.check_integrity()
