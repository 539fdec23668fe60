"""Any history of two nodes, hand-offs, faults and restarts keeps the rules of the protocol.

The rules are checked where something happens (`prefill.py`, `decode.py`) and after each step:
    - no slot and no block accepts a write from who does not own it
    - nothing is freed while a write can land, or while a send reads it
    - no sequence starts with KV that is not its own, or was not verified
    - each sequence ends once on each node, and runs once at most
    - at quiescence all blocks are free, no lease lives and no slot is taken
`--model-examples N` runs N histories instead of the fixed ones of `make test`.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cluster.errors import Cancelled
from cluster.request import KVLoadFailurePolicy, SamplingParams, SequenceRequest
from kv_transfer.receiving.incoming import IncomingSequence
from tests.kv_transfer.model.decode import ModelDecode
from tests.kv_transfer.model.link import Link
from tests.kv_transfer.model.memory import BLOCK_SIZE
from tests.kv_transfer.model.prefill import DRAIN_SECONDS, LEASE_SECONDS, ModelPrefill, Sending
from tests.sequences import make_sequence

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import TypeVar

    import pytest

    T = TypeVar("T")

NUM_EXAMPLES, NUM_STEPS = 60, 60
FAMILIES = ((1, 2, 3, 4, 5), (1, 2, 3, 9), (6, 7))
PICK = st.integers(0, 3)
FAULTS = ("spoil", "hurry", "trouble", "cancel", "refuse")
DEADLINES = st.sampled_from([None, None, None, 20.0])


class Cluster(RuleBasedStateMachine):
    """One prefill and one decode node, each of which may be another process tomorrow."""

    @initialize(faults=st.sets(st.sampled_from(FAULTS)))
    def begin(self, faults: set[str]) -> None:
        """Each history has some kinds of faults: with all of them at once few get anywhere."""
        self.faults = faults
        self.loop = asyncio.new_event_loop()
        self.now = 1000.0
        self.numbers = itertools.count(1)
        self.prefill = ModelPrefill(self.loop)
        self.decode = self._new_decode()
        self.latest: dict[str, int] = {}  # attempts so far, by sequence
        self.prompts: dict[str, tuple[int, ...]] = {}

    # ---- requests -------------------------------------------------------------------------

    @precondition(lambda self: len(self.latest) < 5)
    @rule(family=st.sampled_from(FAMILIES), deadline=DEADLINES, recomputes=st.booleans())
    def reserve(self, family: tuple[int, ...], deadline: float | None, recomputes: bool) -> None:
        name = f"s{len(self.latest)}"
        self.prompts[name] = family
        self._attempt(name, deadline, recomputes)

    @precondition(lambda self: self.latest)
    @rule(pick=PICK)
    def try_again(self, pick: int) -> None:
        """A newer attempt, maybe while the older one is under way: as a new process would."""
        name = list(self.latest)[pick % len(self.latest)]
        if all(sending.incoming.sequence_id != name for sending in self.prefill.sendings.values()):
            self._attempt(name, None, False)

    def _attempt(self, name: str, deadline: float | None, recomputes: bool) -> None:
        if self.prefill.is_stalled:
            return
        link = self.prefill.link or self._connect()
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

    @rule(pick=PICK, steps=st.lists(st.sampled_from(["compute", "pack", "post"]), max_size=6))
    def work_at_prefill(self, pick: int, steps: list[str]) -> None:
        """Compute chunks, pack frames and post them, of one prompt."""
        for step in steps:
            for sending in self._sendings(pick):
                match step:
                    case "compute":
                        self.prefill.compute(sending)
                    case "pack":
                        self.prefill.pack(sending)
                    case _:
                        self.prefill.post(sending, self.now)

    @precondition(lambda self: not self.prefill.is_stalled and self.prefill.sendings)
    @rule(pick=PICK)
    def work_on_all_prompts(self, pick: int) -> None:
        for sending in list(self.prefill.sendings.values()):
            while self.prefill.compute(sending):
                pass
            for _ in range(pick + 1):
                self.prefill.pack(sending)
                self.prefill.post(sending, self.now)

    @precondition(lambda self: self.latest and "cancel" in self.faults)
    @rule(pick=PICK, where=st.sampled_from(["prefill", "decode"]))
    def cancel(self, pick: int, where: str) -> None:
        if where == "prefill":
            for sending in self._sendings(pick):
                self.prefill.withdraw(sending)
        elif not self.decode.is_stalled:
            name = chosen(list(self.latest), pick)
            self.decode.execute(self.decode.intake.cancelled(name, Cancelled("left"), self.now))

    # ---- the network ----------------------------------------------------------------------

    @rule(num_up=st.integers(0, 4), num_down=st.integers(0, 4))
    def carry_messages(self, num_up: int, num_down: int) -> None:
        for _ in range(num_up):
            for link in list(self.decode.links.values()):
                if not self.decode.is_stalled:
                    self.decode.hear(link, self.now)
        for _ in range(num_down):
            if self.prefill.link is not None and not self.prefill.is_stalled:
                self.prefill.hear(self.prefill.link, self.now)

    @precondition(lambda self: not self.decode.is_stalled)
    @rule(num_headers=st.integers(0, 3), num_landings=st.integers(0, 3), pick=PICK)
    def carry_frames(self, num_headers: int, num_landings: int, pick: int) -> None:
        """Headers in order, payloads in any."""
        for _ in range(num_headers):
            for link in list(self.decode.links.values()):
                self.decode.read_header(link, self.now)
        for _ in range(num_landings):
            if self.decode.arrivals:
                self.decode.land(chosen(self.decode.arrivals, pick), self.now)

    @precondition(lambda self: self._wired() and "spoil" in self.faults)
    @rule(
        pick=PICK,
        how=st.sampled_from(["twice", "late", "never", "payload", "header"]),
        byte=st.integers(0, 70),
    )
    def spoil_a_frame(self, pick: int, how: str, byte: int) -> None:
        wire = chosen(self._wired(), pick).wire
        frame = chosen(wire, pick)
        match how:
            case "twice":
                wire.append(frame.again())
            case "late":
                wire.remove(frame)
                wire.append(frame)
            case "never":
                wire.remove(frame)
                frame.settle(None)
            case "payload":
                frame.payload[0, 0] ^= type(frame.payload[0, 0])(1 << byte % 64)
            case _:
                header = bytearray(frame.header)
                header[byte % len(header)] ^= 1
                frame.header = bytes(header)

    @rule(pick=PICK)
    def repeat_a_commit(self, pick: int) -> None:
        for sending in self._sendings(pick):
            commits = [m for m in sending.link.up if isinstance(m, tuple) and len(m) == 3]
            sending.link.up.extend(commits[:1])

    # ---- the decode node's engine ---------------------------------------------------------

    @precondition(lambda self: not self.decode.is_stalled)
    @rule(fails=st.sampled_from([False, False, False, True]))
    def work_at_decode(self, fails: bool) -> None:
        for transfer_id in list(self.decode.asking):
            self.decode.answer(transfer_id, self.now, refuses=fails and "refuse" in self.faults)
        for transfer_id in list(self.decode.starting):
            self.decode.start(transfer_id, self.now, fails=fails and "refuse" in self.faults)

    @precondition(lambda self: self.decode.running)
    @rule(pick=PICK)
    def finish_sequence(self, pick: int) -> None:
        sequence = chosen(self.decode.running, pick)
        self.decode.running.remove(sequence)
        self.decode.blocks.free(sequence)

    @precondition(lambda self: self.prefill.sendings)
    @rule(rounds=st.integers(1, 8))
    def go_on_for_a_while(self, rounds: int) -> None:
        """Undisturbed steps of all who do not stand still, so that histories get far."""
        if not (self.prefill.is_stalled or self.decode.is_stalled):
            for _ in range(rounds):
                self._each_step()

    # ---- time, loss, restarts -------------------------------------------------------------

    @rule(
        seconds=st.sampled_from([0.5, 1.0, 5.0, 11.0, 31.0]),
        sweeps=st.sets(st.sampled_from(["prefill", "decode"])),
    )
    def time_passes(self, seconds: float, sweeps: set[str]) -> None:
        """Timers may be late."""
        self.now += seconds if "hurry" in self.faults else min(seconds, 1.0)
        if "decode" in sweeps and not self.decode.is_stalled:
            self.decode.tick(self.now)
        if "prefill" in sweeps and not self.prefill.is_stalled:
            for link in self.prefill.sweep(self.now):
                self._break(link)

    @precondition(lambda self: "trouble" in self.faults)
    @rule(what=st.sampled_from(["stall p", "stall d", "wake", "wake", "break", "kill p", "kill d"]))
    def trouble(self, what: str) -> None:
        match what:
            case "stall p":
                self.prefill.is_stalled = True
            case "stall d":
                self.decode.is_stalled = True
            case "wake":
                self.prefill.is_stalled = self.decode.is_stalled = False
            case "break" if self.prefill.link is not None:
                self._break(self.prefill.link)
            case "kill p":
                self._restart_prefill()
            case "kill d":
                self._restart_decode()

    @precondition(lambda self: self.decode.revoking and not self.decode.is_stalled)
    @rule(pick=PICK, fails=st.sampled_from([False, False, False, True]))
    def finish_revoking(self, pick: int, fails: bool) -> None:
        link = chosen(self.decode.revoking, pick)
        if fails:
            self.decode.fail_to_revoke(link)
        else:
            self.decode.revoke(link, self.now)
        self._notice(link)

    def _restart_prefill(self) -> None:
        """Killed: its sends stop where they are, its connection ends, nothing is left of it."""
        links = {sending.link for sending in self.prefill.sendings.values()}
        links |= {self.prefill.link} if self.prefill.link else set()
        self.prefill = ModelPrefill(self.loop)
        for link in links:
            link.is_noticed = True
            for frame in (*link.wire, *(each.frame for each in self.decode.arrivals)):
                frame.settle = lambda _: None
            link.up.clear()
            self.decode.lose(link, self.now)

    def _restart_decode(self) -> None:
        arrivals = self.decode.arrivals
        links = [*self.decode.links.values(), *self.decode.revoking, *self.decode.stuck]
        self.decode = self._new_decode()
        for link in links:
            link.is_cut = True
            frames = [*link.wire, *(each.frame for each in arrivals if each.link is link)]
            link.wire.clear()
            for frame in frames:
                frame.settle(Cancelled("the peer is gone"))
            self._notice(link)

    # ---- what must hold -------------------------------------------------------------------

    @invariant()
    def the_books_balance(self) -> None:
        for node in (self.prefill, self.decode):
            node.blocks.check_integrity()
            node.slots.staging.check_integrity()

    def teardown(self) -> None:
        self.prefill.is_stalled = self.decode.is_stalled = False
        for _ in range(6):
            self._let_all_end()
            self.now += max(DRAIN_SECONDS, LEASE_SECONDS / 3)
        for sending in [*self.prefill.sendings.values(), *self.prefill.ended.values()]:
            self.prefill.blocks.free(sending.sequence)
        for sequence in self.decode.running:
            self.decode.blocks.free(sequence)
        self._check_quiescence()
        self.loop.close()

    def _check_quiescence(self) -> None:
        prefill, decode = self.prefill, self.decode
        assert not prefill.sendings, "source blocks are held for ever"
        assert not len(prefill.leases)
        assert prefill.blocks.num_free_blocks == prefill.blocks.num_blocks
        assert prefill.slots.staging.num_free == prefill.slots.staging.num_slots
        assert all(len(sending.endings) == 1 for sending in prefill.ended.values())
        stuck = {link.id for link in decode.stuck}
        kept = [t for t in decode.intake.transfers if t.session_id in stuck]
        assert decode.intake.transfers.num_active == len(kept), "a transfer never ends"
        assert not decode.starting
        num_kept = len({block_id for transfer in kept for block_id in transfer.block_ids})
        free = decode.blocks.num_free_blocks
        assert free + num_kept == decode.blocks.num_blocks
        num_slots = sum(arrival.slot is not None for arrival in decode.arrivals)
        assert decode.slots.staging.num_free + num_slots == decode.slots.staging.num_slots
        assert all(arrival.link.id in stuck for arrival in decode.arrivals)

    # ---- helpers --------------------------------------------------------------------------

    def _let_all_end(self) -> None:
        """Everything under way goes on until nothing more happens without time."""
        for _ in range(200):
            self.decode.tick(self.now)
            for link in self.prefill.sweep(self.now):
                self._break(link)
            for sequence in self.decode.running:
                self.decode.blocks.free(sequence)
            self.decode.running.clear()
            if not any(self._each_step()):
                return
        raise AssertionError("it never comes to rest")

    def _each_step(self) -> list[bool]:
        prefill, decode, now = self.prefill, self.decode, self.now
        moved = [bool(decode.revoking)]
        for link in list(decode.revoking):
            decode.revoke(link, now)
            self._notice(link)
        for sending in list(prefill.sendings.values()):
            moved += [prefill.compute(sending), prefill.pack(sending), prefill.post(sending, now)]
        for link in list(decode.links.values()):
            moved += [decode.read_header(link, now), decode.hear(link, now)]
        if prefill.link is not None:
            moved.append(prefill.hear(prefill.link, now))
        for arrival in list(decode.arrivals):
            if arrival.link not in decode.stuck:
                moved.append(True)
                decode.land(arrival, now)
        moved += [
            decode.answer(transfer_id, now, refuses=False) for transfer_id in list(decode.asking)
        ]
        for transfer_id in list(decode.starting):
            moved.append(True)
            decode.start(transfer_id, now, fails=False)
        return moved

    def _new_decode(self) -> ModelDecode:
        return ModelDecode(self.loop, next(self.numbers), self.numbers)

    def _connect(self) -> Link:
        link = Link(next(self.numbers))
        self.decode.open(link, self.now)
        self.prefill.link = link
        return link

    def _break(self, link: Link) -> None:
        """One end cuts it: what is posted ends there, and the other hears of it."""
        link.is_cut = True
        self.decode.lose(link, self.now)
        self._notice(link)

    def _notice(self, link: Link) -> None:
        if not link.is_noticed:
            self.prefill.notice(link)

    def _sendings(self, pick: int) -> list[Sending]:
        sendings = list(self.prefill.sendings.values())
        if not sendings or self.prefill.is_stalled:
            return []
        return [chosen(sendings, pick)]

    def _wired(self) -> list[Link]:
        return [link for link in self.decode.links.values() if link.wire]


def chosen(options: Sequence[T], pick: int) -> T:
    return options[pick % len(options)]


def test_any_history_of_two_nodes_keeps_the_rules(request: pytest.FixtureRequest) -> None:
    asked = request.config.getoption("--model-examples")
    run_state_machine_as_test(
        Cluster,
        settings=settings(
            max_examples=asked or NUM_EXAMPLES,
            stateful_step_count=NUM_STEPS,
            derandomize=asked is None,
            # A history that fails is printed; to make it short takes minutes.
            phases=(Phase.generate,) if asked is None else (Phase.generate, Phase.shrink),
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
