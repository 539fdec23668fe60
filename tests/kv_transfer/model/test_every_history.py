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

import random

import pytest
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
from kv_transfer.failures import FailureReason, failure
from tests.kv_transfer.model.two_nodes import TwoNodes, chosen

NUM_EXAMPLES, NUM_STEPS = 120, 60
FAMILIES = ((1, 2, 3, 4, 5), (1, 2, 3, 9), (6, 7))
PICK = st.integers(0, 3)
STEPS = ("work", "header", "land", "up", "down", "revoke", "engine")
ENDS = ("cancel at prefill", "cancel at decode")
BREAKS = ("pack", "send")
SPOILS = ("twice", "late", "never", "stale", "payload", "header")
FAULTS = ("spoil", "hurry", "trouble", "cancel", "refuse", "break")
DEADLINES = st.sampled_from([None, None, None, 20.0])


class History(RuleBasedStateMachine):
    """What may happen next."""

    @initialize(faults=st.sets(st.sampled_from(FAULTS)), is_eager=st.booleans())
    def begin(self, faults: set[str], is_eager: bool) -> None:
        """Each history has some kinds of faults: with all of them at once few get anywhere."""
        self.faults = faults
        self.nodes = TwoNodes(is_eager=is_eager)

    # ---- requests -------------------------------------------------------------------------

    @precondition(lambda self: len(self.nodes.latest) < 5)
    @rule(family=st.sampled_from(FAMILIES), deadline=DEADLINES, recomputes=st.booleans())
    def reserve(self, family: tuple[int, ...], deadline: float | None, recomputes: bool) -> None:
        name = f"s{len(self.nodes.latest)}"
        self.nodes.prompts[name] = family
        if not self.nodes.prefill.is_stalled:
            self.nodes.attempt(name, deadline, recomputes)

    @precondition(lambda self: self.nodes.latest)
    @rule(pick=PICK)
    def try_again(self, pick: int) -> None:
        """A newer attempt, maybe while the older one is under way: as a new process would."""
        name = chosen(list(self.nodes.latest), pick)
        prefill = self.nodes.prefill
        is_sent = any(each.incoming.sequence_id == name for each in prefill.sendings.values())
        if not is_sent and not prefill.is_stalled:
            self.nodes.attempt(name, None, False)

    @rule(pick=PICK, steps=st.lists(st.sampled_from(["compute", "pack", "post"]), max_size=6))
    def work_at_prefill(self, pick: int, steps: list[str]) -> None:
        """Compute chunks, pack frames and post them, of one prompt."""
        for step in steps:
            for sending in self.nodes.sendings(pick):
                match step:
                    case "compute":
                        self.nodes.prefill.compute(sending)
                    case "pack":
                        self.nodes.prefill.pack(sending)
                    case _:
                        self.nodes.prefill.post(sending, self.nodes.now)

    @precondition(lambda self: not self.nodes.prefill.is_stalled and self.nodes.prefill.sendings)
    @rule(pick=PICK)
    def work_on_all_prompts(self, pick: int) -> None:
        for sending in list(self.nodes.prefill.sendings.values()):
            while self.nodes.prefill.compute(sending):
                pass
            for _ in range(pick + 1):
                self.nodes.prefill.pack(sending)
                self.nodes.prefill.post(sending, self.nodes.now)

    @precondition(lambda self: self.nodes.latest and "cancel" in self.faults)
    @rule(pick=PICK, where=st.sampled_from(["prefill", "decode"]))
    def cancel(self, pick: int, where: str) -> None:
        if where == "prefill":
            for sending in self.nodes.sendings(pick):
                self.nodes.prefill.withdraw(sending)
        elif not self.nodes.decode.is_stalled:
            name = chosen(list(self.nodes.latest), pick)
            decode, now = self.nodes.decode, self.nodes.now
            decode.execute(decode.intake.cancelled(name, Cancelled("left"), now), now)

    @precondition(lambda self: self.nodes.latest and "trouble" in self.faults)
    @rule(pick=PICK)
    def doubt(self, pick: int) -> None:
        """A gateway has lost the prefill node, rightly or not."""
        decode, now = self.nodes.decode, self.nodes.now
        if not decode.is_stalled:
            name = chosen(list(self.nodes.latest), pick)
            decode.execute(decode.intake.sender_doubted(name, now), now)

    # ---- the network ----------------------------------------------------------------------

    @rule(num_up=st.integers(0, 4), num_down=st.integers(0, 4))
    def carry_messages(self, num_up: int, num_down: int) -> None:
        for _ in range(num_up):
            for link in list(self.nodes.decode.links.values()):
                if not self.nodes.decode.is_stalled:
                    self.nodes.decode.hear(link, self.nodes.now)
        for _ in range(num_down):
            if self.nodes.prefill.link is not None and not self.nodes.prefill.is_stalled:
                self.nodes.prefill.hear(self.nodes.prefill.link, self.nodes.now)

    @precondition(lambda self: not self.nodes.decode.is_stalled)
    @rule(num_headers=st.integers(0, 3), num_landings=st.integers(0, 3), pick=PICK)
    def carry_frames(self, num_headers: int, num_landings: int, pick: int) -> None:
        """Headers in order, payloads in any."""
        for _ in range(num_headers):
            for link in list(self.nodes.decode.links.values()):
                self.nodes.decode.read_header(link, self.nodes.now)
        for _ in range(num_landings):
            if self.nodes.decode.arrivals:
                self.nodes.decode.land(chosen(self.nodes.decode.arrivals, pick), self.nodes.now)

    @precondition(lambda self: self.nodes.wired() and "spoil" in self.faults)
    @rule(
        pick=PICK,
        how=st.sampled_from(SPOILS),
        byte=st.integers(0, 70),
    )
    def spoil_a_frame(self, pick: int, how: str, byte: int) -> None:
        wire = chosen(self.nodes.wired(), pick).wire
        frame = chosen(wire, pick)
        match how:
            case "twice":
                wire.append(frame.again())
            case "late":
                wire.remove(frame)
                wire.append(frame)
            case "stale" if not frame.is_spoilt:
                wire.appendleft(frame.of_another_owner())
            case "never":
                wire.remove(frame)
                frame.end(None)
            case "payload":
                frame.payload[byte % len(frame.payload)] ^= frame.payload.dtype.type(1 << byte % 8)
            case "header":
                frame.is_spoilt = True
                header = bytearray(frame.header)
                header[byte % len(header)] ^= 1
                frame.header = bytes(header)

    @precondition(lambda self: "break" in self.faults and not self.nodes.prefill.is_stalled)
    @rule(pick=PICK, what=st.sampled_from(BREAKS))
    def break_a_frame(self, pick: int, what: str) -> None:
        """It cannot be packed. Or its sender hears that the send has failed: it may arrive all the
        same, and the commit behind it."""
        link = self.nodes.prefill.link
        if what == "pack":
            for sending in self.nodes.sendings(pick):
                self.nodes.prefill.fail_to_pack(sending)
        elif link is not None and (frames := self.nodes.frames_of(link)):
            chosen(frames, pick).end(failure(FailureReason.LINK_LOST))

    @rule(pick=PICK)
    def repeat_a_commit(self, pick: int) -> None:
        for sending in self.nodes.sendings(pick):
            commits = [m for m in sending.link.up if isinstance(m, tuple) and len(m) == 3]
            sending.link.up.extend(commits[:1])

    # ---- the decode node's engine ---------------------------------------------------------

    @precondition(lambda self: not self.nodes.decode.is_stalled)
    @rule(fails=st.sampled_from([False, False, False, True]))
    def work_at_decode(self, fails: bool) -> None:
        decode, now = self.nodes.decode, self.nodes.now
        fails = fails and "refuse" in self.faults
        for transfer_id in list(decode.asking):
            decode.answer(transfer_id, now, refuses=fails)
        for transfer_id in list(decode.starting):
            decode.start(transfer_id, now, fails=fails)

    @precondition(lambda self: self.nodes.decode.running)
    @rule(pick=PICK)
    def finish_sequence(self, pick: int) -> None:
        sequence = chosen(self.nodes.decode.running, pick)
        self.nodes.decode.running.remove(sequence)
        self.nodes.decode.blocks.free(sequence)

    @precondition(lambda self: self.nodes.prefill.sendings)
    @rule(
        rounds=st.integers(1, 8),
        without=st.sampled_from(["", *STEPS]),
    )
    def go_on_for_a_while(self, rounds: int, without: str) -> None:
        """Steps of both while neither stands still, so that histories get far; one kind is late."""
        if not (self.nodes.prefill.is_stalled or self.nodes.decode.is_stalled):
            for _ in range(rounds):
                self.nodes.each_step(without)

    @precondition(lambda self: self.nodes.prefill.sendings)
    @rule(seed=st.integers(0, 1 << 32), num_steps=st.integers(5, 40))
    def go_on_in_any_order(self, seed: int, num_steps: int) -> None:
        """Evenly drawn steps: what Hypothesis draws itself repeats too much to get far."""
        draws = random.Random(seed)
        ends = ENDS if "cancel" in self.faults else ()
        breaks = BREAKS if "break" in self.faults else ()
        for _ in range(num_steps):
            if self.nodes.prefill.is_stalled or self.nodes.decode.is_stalled:
                return
            step = draws.choice((*STEPS, *STEPS, *ends, *breaks))
            if step in STEPS:
                self.nodes.step(step)
            elif step in BREAKS:
                self.break_a_frame(draws.randrange(4), step)
            else:
                self.cancel(draws.randrange(4), step.removeprefix("cancel at "))

    # ---- time, loss, restarts -------------------------------------------------------------

    @rule(
        seconds=st.sampled_from([0.5, 1.0, 5.0, 11.0, 31.0]),
        sweeps=st.sets(st.sampled_from(["prefill", "decode"])),
    )
    def time_passes(self, seconds: float, sweeps: set[str]) -> None:
        """Timers may be late."""
        self.nodes.now += seconds if "hurry" in self.faults else min(seconds, 1.0)
        if "decode" in sweeps and not self.nodes.decode.is_stalled:
            self.nodes.decode.tick(self.nodes.now)
        if "prefill" in sweeps and not self.nodes.prefill.is_stalled:
            for link in self.nodes.prefill.sweep(self.nodes.now):
                self.nodes.break_link(link)

    @precondition(lambda self: "trouble" in self.faults)
    @rule(what=st.sampled_from(["stall p", "stall d", "wake", "wake", "break", "kill p", "kill d"]))
    def trouble(self, what: str) -> None:
        match what:
            case "stall p":
                self.nodes.prefill.is_stalled = True
            case "stall d":
                self.nodes.decode.is_stalled = True
            case "wake":
                self.nodes.prefill.is_stalled = self.nodes.decode.is_stalled = False
            case "break" if self.nodes.prefill.link is not None:
                self.nodes.break_link(self.nodes.prefill.link)
            case "kill p":
                self.nodes.restart_prefill()
            case "kill d":
                self.nodes.restart_decode()

    @precondition(lambda self: self.nodes.decode.revoking and not self.nodes.decode.is_stalled)
    @rule(pick=PICK, fails=st.sampled_from([False, False, False, True]))
    def finish_revoking(self, pick: int, fails: bool) -> None:
        link = chosen(self.nodes.decode.revoking, pick)
        if fails:
            self.nodes.decode.fail_to_revoke(link, self.nodes.now)
        else:
            self.nodes.decode.revoke(link, self.nodes.now)
        self.nodes.notice(link)

    # ---- what must hold -------------------------------------------------------------------

    @invariant()
    def the_books_balance(self) -> None:
        for node in (self.nodes.prefill, self.nodes.decode):
            node.blocks.check_integrity()
            node.slots.staging.check_integrity()

    def teardown(self) -> None:
        self.nodes.finish()


def test_any_history_of_two_nodes_keeps_the_rules(request: pytest.FixtureRequest) -> None:
    asked = request.config.getoption("--model-examples")
    run_state_machine_as_test(
        History,
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


@pytest.mark.parametrize("how", SPOILS)
def test_frames_that_are_spoilt_in_one_way_keep_the_rules(how: str) -> None:
    """Drawn evenly, as few of the histories above spoil a frame that is still wanted."""
    num_spoilt = 0
    for seed in range(60):
        draws = random.Random(f"{how} {seed}")
        history = History()
        history.begin(faults={"spoil"}, is_eager=draws.random() < 0.5)
        for _ in range(60):
            if len(history.nodes.latest) < 3 and draws.random() < 0.1:
                history.reserve(draws.choice(FAMILIES), None, draws.random() < 0.5)
            if draws.random() < 0.1 and history.nodes.wired():
                history.spoil_a_frame(draws.randrange(4), how, draws.randrange(71))
                num_spoilt += 1
            history.nodes.step(draws.choice(STEPS))
            history.the_books_balance()
        history.teardown()
    assert num_spoilt > 20
