"""Both nodes of the model and what is between them."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING, TypeVar

from cluster.errors import Cancelled
from cluster.request import KVLoadFailurePolicy, SamplingParams, SequenceRequest
from kv_transfer.failures import FailureReason, failure
from kv_transfer.receiving.incoming import IncomingSequence
from tests.kv_transfer.model.decode import ModelDecode
from tests.kv_transfer.model.link import Frame, Link
from tests.kv_transfer.model.memory import BLOCK_SIZE
from tests.kv_transfer.model.prefill import DRAIN_SECONDS, LEASE_SECONDS, ModelPrefill, Sending
from tests.sequences import make_sequence

if TYPE_CHECKING:
    from collections.abc import Sequence

T = TypeVar("T")


class TwoNodes:
    """One prefill and one decode node, each of which may be another process tomorrow."""

    def __init__(self, *, is_eager: bool) -> None:
        """`is_eager`: a send ends when it is posted, not when its payload has landed."""
        self.is_eager = is_eager
        self.loop = asyncio.new_event_loop()
        self.now = 1000.0
        self.numbers = itertools.count(1)
        self.prefill = ModelPrefill(self.loop, is_eager=is_eager)
        self.decode = self.new_decode()
        self.latest: dict[str, int] = {}  # attempts so far, by sequence
        self.prompts: dict[str, tuple[int, ...]] = {}

    def finish(self) -> None:
        """Nobody stands still, everything under way ends, time passes: nothing may be held."""
        self.prefill.is_stalled = self.decode.is_stalled = False
        for _ in range(6):
            self.let_all_end()
            self.now += max(DRAIN_SECONDS, LEASE_SECONDS / 3)
        for sending in [*self.prefill.sendings.values(), *self.prefill.ended.values()]:
            self.prefill.blocks.free(sending.sequence)
        self.check_quiescence()
        self.loop.close()

    def attempt(self, name: str, deadline: float | None, recomputes: bool) -> None:
        link = self.prefill.link or self.connect()
        self.latest[name] = self.latest.get(name, 0) + 1
        policy = KVLoadFailurePolicy.RECOMPUTE if recomputes else KVLoadFailurePolicy.FAIL
        request = SequenceRequest(
            sequence_id=name,
            request_id=name,
            prompt_token_ids=self.prompts[name],
            sampling=SamplingParams(max_tokens=4, seed=0),
            deadline_seconds=deadline,
        )
        incoming = IncomingSequence(
            transfer_id=next(self.numbers).to_bytes(16, "big"),
            attempt=self.latest[name],
            request=request,
            gateway_id="g",
            kv_load_failure_policy=policy,
        )
        sequence = make_sequence(self.prompts[name], block_size=BLOCK_SIZE)
        self.prefill.open(incoming, sequence, link, self.now)

    def restart_prefill(self) -> None:
        """Killed: its sends stop where they are, its connection ends, nothing is left of it."""
        links = {sending.link for sending in self.prefill.sendings.values()}
        links |= {self.prefill.link} if self.prefill.link else set()
        self.prefill = ModelPrefill(self.loop, is_eager=self.is_eager)
        for link in links:
            link.is_noticed = True
            for frame in self.frames_of(link):
                frame.settle = lambda _: None
            link.up.clear()
            self.decode.lose(link, self.now)

    def restart_decode(self) -> None:
        arrivals = self.decode.arrivals
        links = [*self.decode.links.values(), *self.decode.revoking, *self.decode.stuck]
        self.decode = self.new_decode()
        for link in links:
            link.is_cut = True
            frames = [*link.wire, *(each.frame for each in arrivals if each.link is link)]
            link.wire.clear()
            for frame in frames:
                frame.end(Cancelled("the peer is gone"))
            self.notice(link)

    def check_quiescence(self) -> None:
        prefill, decode = self.prefill, self.decode
        assert not prefill.sendings, "source blocks are held for ever"
        assert not len(prefill.leases)
        assert prefill.blocks.num_free_blocks == prefill.blocks.num_blocks
        assert prefill.slots.staging.num_free == prefill.slots.staging.num_slots
        assert all(len(sending.endings) == 1 for sending in prefill.ended.values())
        stuck = {link.id for link in decode.stuck}
        kept = [t for t in decode.intake.transfers if t.session_id in stuck]
        assert decode.intake.transfers.num_active == 0, "a transfer never ends"
        assert not decode.starting
        assert not decode.recomputing, "a sequence waits for blocks that never come"
        num_kept = len({block_id for transfer in kept for block_id in transfer.block_ids})
        free = decode.blocks.num_free_blocks
        assert free + num_kept == decode.blocks.num_blocks
        num_slots = sum(arrival.slot is not None for arrival in decode.arrivals)
        assert decode.slots.staging.num_free + num_slots == decode.slots.staging.num_slots
        assert all(arrival.link.id in stuck for arrival in decode.arrivals)

    def let_all_end(self) -> None:
        """Everything under way goes on until nothing more happens without time."""
        for _ in range(200):
            self.decode.tick(self.now)
            for link in self.prefill.sweep(self.now):
                self.break_link(link)
            for sequence in self.decode.running:
                self.decode.blocks.free(sequence)
            self.decode.running.clear()
            if not any(self.each_step()):
                return
        raise AssertionError("it never comes to rest")

    def each_step(self, without: str = "") -> list[bool]:
        """Everything that can happen now happens once, but for one kind that is late."""
        names = ("revoke", "work", "header", "up", "down", "land", "engine")
        return [moved for name in names if name != without for moved in self.step(name)]

    def step(self, name: str) -> list[bool]:
        """One kind of thing happens, to all; whether anything did."""
        match name:
            case "revoke":
                return self._revoke()
            case "work":
                return self._work()
            case "header":
                return self._read_headers()
            case "up":
                return [self.decode.hear(link, self.now) for link in self._links()]
            case "down":
                return self._hear_at_prefill()
            case "land":
                return self._land()
            case _:
                return self._engine()

    def _revoke(self) -> list[bool]:
        revoking = list(self.decode.revoking)
        for link in revoking:
            self.decode.revoke(link, self.now)
            self.notice(link)
        return [bool(revoking)]

    def _work(self) -> list[bool]:
        moved = []
        for sending in list(self.prefill.sendings.values()):
            moved += [self.prefill.compute(sending), self.prefill.pack(sending)]
            moved.append(self.prefill.post(sending, self.now))
        return moved

    def _read_headers(self) -> list[bool]:
        moved = []
        for link in self._links():
            while self.decode.read_header(link, self.now):
                moved.append(True)
        return moved

    def _hear_at_prefill(self) -> list[bool]:
        link = self.prefill.link
        return [link is not None and self.prefill.hear(link, self.now)]

    def _land(self) -> list[bool]:
        waiting = [each for each in self.decode.arrivals if each.link not in self.decode.stuck]
        for arrival in waiting[:1]:
            self.decode.land(arrival, self.now)
        return [bool(waiting)]

    def _engine(self) -> list[bool]:
        moved = [bool(self.decode.starting)]
        moved += [
            self.decode.answer(transfer_id, self.now, refuses=False)
            for transfer_id in list(self.decode.asking)
        ]
        for transfer_id in list(self.decode.starting):
            self.decode.start(transfer_id, self.now, fails=False)
        return moved

    def _links(self) -> list[Link]:
        return list(self.decode.links.values())

    def new_decode(self) -> ModelDecode:
        return ModelDecode(self.loop, next(self.numbers), self.numbers)

    def connect(self) -> Link:
        link = Link(next(self.numbers))
        self.decode.open(link, self.now)
        self.prefill.link = link
        return link

    def break_link(self, link: Link) -> None:
        """One end cuts it: what is posted ends there, and the other hears of it."""
        link.is_cut = True
        self.decode.lose(link, self.now)
        self.notice(link)

    def notice(self, link: Link) -> None:
        """The prefill node closes its end: its sends are over, what they sent may still land."""
        if not link.is_noticed:
            self.prefill.notice(link)
            for frame in self.frames_of(link):
                frame.end(failure(FailureReason.LINK_LOST))

    def frames_of(self, link: Link) -> list[Frame]:
        landing = [each.frame for each in self.decode.arrivals if each.link is link]
        return [*link.wire, *landing]

    def sendings(self, pick: int) -> list[Sending]:
        sendings = list(self.prefill.sendings.values())
        if not sendings or self.prefill.is_stalled:
            return []
        return [chosen(sendings, pick)]

    def wired(self) -> list[Link]:
        return [link for link in self.decode.links.values() if link.wire]


def chosen(options: Sequence[T], pick: int) -> T:
    return options[pick % len(options)]
