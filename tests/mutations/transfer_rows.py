"""Rows about blocks, slots and leases: who may write where, until when."""

from __future__ import annotations

from tests.mutations.row import Mutation, Row

CATALOGUE = "tests/kv_transfer/test_bug_catalogue.py::test_"
OWNERS = "tests/kv_transfer/test_bug_catalogue_owners.py::test_"
TIME = "tests/kv_transfer/test_bug_catalogue_time.py::test_"
UNFORESEEN = "tests/kv_transfer/test_unforeseen_errors.py::test_"
CLOSING = "tests/kv_transfer/sending/test_sender.py::test_"
STUCK = "tests/kv_transfer/receiving/test_stuck_transfers.py::test_"
INCOMING = "kv_transfer/receiving/incoming.py"
INTAKE = "kv_transfer/receiving/intake.py"
ENDINGS = "kv_transfer/receiving/endings.py"
SESSION = "kv_transfer/receiving/receiver_session.py"
RECEIVER = "kv_transfer/receiving/receiver.py"
SESSIONS = "kv_transfer/receiving/sessions.py"
OVERDUE = "kv_transfer/receiving/overdue.py"
ANSWERS = "kv_transfer/sending/answers.py"
OUTGOING = "kv_transfer/sending/outgoing.py"
SENDER = "kv_transfer/sending/sender.py"
STUCK_SENDS = "sources_of_sends_that_do_not_end_with_their_connection_stay_held_and_are_counted"

TRANSFER_ROWS = (
    Row(
        "The receiver aborts and frees; the sender's write lands later",
        "sgl#24527, 27372, 32564, 35049; vllm#48633 C1",
        (
            Mutation(
                INCOMING,
                "if self.is_asking or self.num_landing:",
                "if self.is_asking:",
                CATALOGUE + "a_write_that_lands_after_an_abort_reaches_no_block",
            ),
            Mutation(
                INTAKE,
                "return transfer is not None and transfer.is_receiving",
                "return True",
                CATALOGUE + "a_write_that_lands_after_an_abort_reaches_no_block",
            ),
        ),
    ),
    Row(
        "The target of the acknowledgement is dropped; a timeout then frees",
        "sgl#38961",
        (
            Mutation(
                OUTGOING,
                "        self._ack_epoch = epoch\n",
                "        self._ack_epoch = None if self.is_draining else epoch\n",
                CATALOGUE + "an_abort_is_acknowledged_when_the_last_send_has_ended",
            ),
            Mutation(
                INTAKE,
                "instructions += self.session_lost(transfer.session_id, now, lost)",
                "transfer.is_cut, lost = True, lost\n"
                "                instructions += self._endings.settle(transfer, now)",
                CATALOGUE + "a_drain_that_takes_too_long_revokes_and_does_not_free",
            ),
        ),
    ),
    Row(
        "The sender falls silent; the receiver's blocks are never reclaimed",
        "vllm#46283, 35943, 50719, 55870",
        (
            Mutation(
                OVERDUE,
                "            return FailureReason.LEASE_EXPIRED\n",
                "            pass\n",
                CATALOGUE + "blocks_come_back_from_a_prefill_node_that_says_nothing_any_more",
            ),
            Mutation(
                OVERDUE,
                "return FailureReason.TRANSFER_TIMEOUT if is_stalled and",
                "return FailureReason.TRANSFER_TIMEOUT if False and is_stalled and",
                CATALOGUE
                + "a_payload_that_never_comes_ends_its_transfer_however_alive_its_peer_is",
            ),
            Mutation(
                OVERDUE,
                "            return FailureReason.SENDER_LOST\n",
                "            pass\n",
                "tests/kv_transfer/receiving/test_doubted_sender.py::"
                "test_a_transfer_that_stands_still_ends_at_once",
            ),
            Mutation(
                "kv_transfer/sending/sendings.py",
                "if self._progress != self.machine.progress:",
                "if True:",
                "tests/kv_transfer/sending/test_odd_answers.py::"
                "test_a_decode_node_that_repeats_itself_holds_no_sources_for_longer",
            ),
            Mutation(
                SENDER,
                "config.drain_seconds:\n            sending.peer.cut()\n",
                "config.drain_seconds:\n            pass\n",
                CATALOGUE + "sends_that_nobody_takes_end_the_transfer_and_then_the_connection",
            ),
            Mutation(
                SENDER,
                "config.stall_seconds:\n            sending.peer.cut()\n",
                "config.stall_seconds:\n            pass\n",
                "tests/kv_transfer/test_mapped_slots.py::"
                "test_a_slot_that_a_receiver_does_not_give_back_is_not_kept_for_ever",
            ),
        ),
    ),
    Row(
        "A failure is acted on while a sibling handle still writes",
        "vllm#56104",
        (
            Mutation(
                INCOMING,
                "if self.is_asking or self.num_landing:",
                "if self.is_asking:",
                CATALOGUE + "after_one_bad_frame_the_blocks_stay_until_its_sibling_has_landed",
            ),
            Mutation(
                OUTGOING,
                "if self._num_packing or self._num_in_flight:\n            return []",
                "if self._num_packing:\n            return []",
                CATALOGUE + "after_one_broken_send_the_sources_stay_until_its_sibling_has_ended",
            ),
            Mutation(
                "engine/step_pipeline.py",
                "            self._runner.wait()\n",
                "            pass\n",
                "tests/engine/test_step_pipeline.py::test_"
                "what_a_failed_launch_has_queued_does_not_run_on_under_who_gets_its_blocks",
            ),
        ),
    ),
    Row(
        "The sender uses a source again before a deferred write; the receiver waits for ever",
        "vllm#55470; trt#12542",
        (
            Mutation(
                SENDER,
                "if self._leases.is_live(shipment.transfer_id, self._clock()):",
                "if True:",
                CATALOGUE + "a_frame_whose_lease_ran_out_while_it_was_packed_is_not_sent",
            ),
            Mutation(
                ANSWERS,
                "        if tombstone is not None:\n",
                "        if tombstone is None:\n            return\n        if False:\n",
                CATALOGUE + "an_abort_of_a_transfer_that_is_long_over_is_still_acknowledged",
            ),
        ),
    ),
    Row(
        "The lease runs out; the receiver uses blocks that were used again",
        "vllm#21570, 20139, 41383; aws-do-eks#84",
        (
            Mutation(
                INTAKE,
                "        problem = transfer.announce(header) or overdue\n",
                "        problem = transfer.announce(header)\n",
                CATALOGUE
                + "nothing_that_comes_after_the_lease_is_taken_even_before_a_sweep[frame]",
            ),
            Mutation(
                INTAKE,
                "        overdue = self._overdue.why(transfer, now)\n"
                "        if overdue is not None:\n            return",
                "        overdue = None\n        if overdue is not None:\n            return",
                CATALOGUE
                + "nothing_that_comes_after_the_lease_is_taken_even_before_a_sweep[commit]",
            ),
            Mutation(
                "kv_transfer/host_moves.py",
                "if not np.array_equal(sealed, frame.digests(slot, self._unit_bytes)):",
                "if sealed is None:",
                CATALOGUE + "a_source_block_that_another_prompt_has_overwritten_is_refused",
            ),
            Mutation(
                "kv_transfer/host_moves.py",
                "return self._are_all and np.array_equal(self._sealed(), self.claimed)",
                "return self._are_all",
                "tests/kv_transfer/test_plain_tcp_hand_off.py::"
                "test_blocks_that_change_between_the_wire_and_their_digests_are_refused",
            ),
        ),
    ),
    Row(
        "A read outlives its lease: the same place has another owner (ABA)",
        "mc#850, 4239, 4153; vllm#49238",
        (
            Mutation(
                INCOMING,
                "if ticket != (incarnation, self.epoch, self.nonce):",
                "if ticket is None:",
                OWNERS + "a_frame_of_an_earlier_owner_is_not_taken",
            ),
            Mutation(
                INTAKE,
                "if transfer is None or (transfer.nonce, transfer.epoch) != (nonce, epoch):",
                "if transfer is None:",
                OWNERS + "a_commit_of_an_earlier_owner_starts_nothing",
            ),
            Mutation(
                INTAKE,
                "if epoch != transfer.abort_epoch:",
                "if epoch is None:",
                OWNERS + "an_acknowledgement_of_an_earlier_abort_frees_nothing",
            ),
            Mutation(
                "kv_transfer/receiving/incoming_transfers.py",
                "if self.find(sequence.transfer_id) is not None:",
                "if sequence.transfer_id in self._active:",
                OWNERS + "a_ticket_is_for_one_transfer_and_a_transfer_for_one_ticket",
            ),
            Mutation(
                "kv_transfer/staging.py",
                "self._free.append(again)",
                "self._free.append(slot)",
                OWNERS + "who_kept_a_staging_slot_too_long_is_told_from_its_next_owner",
            ),
            Mutation(
                SESSIONS,
                "if not self._succession.admit(peer):",
                "if False:",
                OWNERS + "a_process_that_was_replaced_does_not_end_its_successors_session",
            ),
        ),
    ),
    Row(
        "A timeout drops memory that an operation in flight still uses",
        "pegaflow#403; trt#14565",
        (
            Mutation(
                SESSION,
                "if self._endpoint is not None and not await self._endpoint.close():\n"
                "            return False",
                "if self._endpoint is not None:\n            await self._endpoint.close()",
                CATALOGUE
                + "what_a_broken_connection_does_not_give_back_stays_out_of_use_and_is_counted",
            ),
            Mutation(
                "kv_transfer/quarantine.py",
                "            self._on_lost(error)\n",
                "            pass\n",
                CATALOGUE
                + "what_a_broken_connection_does_not_give_back_stays_out_of_use_and_is_counted",
            ),
            Mutation(
                "kv_transfer/sending/shipping.py",
                "        self._shipper.did(frame.shipment, instructions)\n        failpoint(",
                "        self._agent.staging.release(frame.slot)\n"
                "        self._shipper.did(frame.shipment, instructions)\n        failpoint(",
                CATALOGUE + "a_staging_slot_is_not_given_to_others_while_a_send_reads_it",
            ),
            Mutation(
                "kv_transfer/sending/peer.py",
                "if not (has_packed and is_cut):",
                "if not has_packed:",
                CATALOGUE + STUCK_SENDS,
            ),
            Mutation(
                "kv_transfer/sending/peer.py",
                "if not (has_packed and is_cut):",
                "if not is_cut:",
                UNFORESEEN + "a_node_whose_device_fails_at_a_frame_starts_afresh[at once]",
            ),
            Mutation(
                "kv_transfer/sending/shipping.py",
                "if await self._agent.settled():",
                "if True:",
                UNFORESEEN + "a_node_whose_device_fails_at_a_frame_starts_afresh[at once]",
            ),
            Mutation(
                "kv_transfer/sending/shipping.py",
                "        if self._failing:\n            await asyncio.wait(self._failing)\n",
                "",
                UNFORESEEN + "a_connection_that_ends_waits_for_what_could_not_be_packed",
            ),
            Mutation(
                "kv_transfer/sending/peer.py",
                "        if not self._is_lost:  # what ends it already must not be cut short\n    ",
                "",
                CLOSING + "a_pairing_that_is_lost_while_another_one_closes_ends_as_well",
            ),
            Mutation(
                "kv_transfer/sending/peer.py",
                "        await asyncio.sleep(0)  # it has begun, so it can be cancelled\n",
                "",
                CLOSING + "a_hand_off_that_was_opened_just_before_its_sender_closes_ends_as_well",
            ),
            Mutation(
                SENDER,
                "sum(sending.machine.num_source_blocks for sending in stuck)",
                "0",
                CATALOGUE + STUCK_SENDS,
            ),
            *(
                Mutation(
                    "node_parts/wiring.py",
                    "agent.quarantine.watch(",
                    "bool(",
                    "tests/e2e/test_digest_scenarios.py::"
                    f"test_a_node_that_cannot_have_its_memory_back_ends_itself[{role}]",
                )
                for role in ("prefill", "decode")
            ),
        ),
    ),
)
