"""Rows about failures: told to everyone, taken for nothing else, and gone through correctly."""

from __future__ import annotations

from tests.mutations.row import Mutation, Row
from tests.mutations.transfer_rows import (
    ANSWERS,
    ENDINGS,
    INCOMING,
    INTAKE,
    OUTGOING,
    RECEIVER,
    SENDER,
    SESSION,
    STUCK,
    TIME,
)

CATALOGUE = "tests/kv_transfer/test_bug_catalogue_failures.py::test_"
MACHINE = "gateway/sequence_machine.py"
STALLS = "tests/kv_transfer/test_stalls.py::test_"
PAIRS = "tests/gateway/test_pairs.py::test_"
MACHINE_TESTS = "tests/gateway/test_sequence_machine.py::test_"
LANDINGS = "kv_transfer/receiving/landings.py"
SHIPPING = "kv_transfer/sending/shipping.py"

FAILURE_ROWS = (
    Row(
        "A receive error fails open: garbage, or the previous prompt's answer",
        "vllm#52234, 52232, 52276; vllm-backport#33",
        (
            Mutation(
                LANDINGS,
                "            return\n        self._end(frame, error)\n",
                "            return\n        self._end(frame, None)\n",
                CATALOGUE + "a_receive_that_fails_starts_nothing",
            ),
            Mutation(
                LANDINGS,
                "else failure(FailureReason.UNKNOWN)\n",
                "else None\n",
                CATALOGUE + "an_error_that_nobody_foresaw_is_a_failure",
            ),
            Mutation(
                SESSION,
                "        self._events.link_lost(self.id, reason)\n",
                "        pass\n",
                CATALOGUE + "a_receiver_that_cannot_go_on_gives_the_session_up",
            ),
            Mutation(
                "cluster/errors.py",
                'return _CAUSES.get(self.reason or "", UNKNOWN_CAUSE)',
                'return self.reason or ""',
                CATALOGUE + "a_client_gets_one_of_six_causes_and_whatever_is_new_is_unknown",
            ),
        ),
    ),
    Row(
        "The sender cannot post and only logs it; the error never reaches the policy",
        "vllm#50754, 55181; vllm-ascend#13099",
        (
            Mutation(
                SHIPPING,
                "self._shipper.did(shipment, shipment.machine.failed(told))",
                "pass",
                CATALOGUE + "blocks_that_cannot_be_packed_fail_the_transfer_at_both_ends",
            ),
            Mutation(
                SHIPPING,
                "self._shipper.did(frame.shipment, frame.shipment.machine.settled(error))",
                "self._shipper.did(frame.shipment, frame.shipment.machine.settled())",
                CATALOGUE + "a_send_that_fails_fails_the_transfer_at_both_ends",
            ),
        ),
    ),
    Row(
        "A partial hit is aligned by length: one side cuts the front, the other the end",
        "vllm#48633 C3, 48758",
        (
            Mutation(
                INTAKE,
                "block_ids = transfer.block_ids_at(header.positions)",
                "block_ids = transfer.block_ids[: len(header.positions)]",
                CATALOGUE + "a_partial_hit_is_placed_by_position_never_by_length",
            ),
            Mutation(
                OUTGOING,
                "block_ids=self._ids_at(positions),",
                "block_ids=tuple(self._block_ids[: len(positions)]),",
                CATALOGUE + "a_partial_hit_is_placed_by_position_never_by_length",
            ),
        ),
    ),
    Row(
        '"Done" is said before the copy has ended',
        "sgl#13231",
        (
            Mutation(
                LANDINGS,
                "placing.add_done_callback(lambda done: self._scattered(frame, done))",
                "self._end(frame, None)",
                CATALOGUE + "nothing_starts_before_the_copy_into_its_blocks_has_ended",
            ),
            Mutation(
                OUTGOING,
                "            after=part.after,\n",
                "            after=None,\n",
                CATALOGUE + "blocks_are_packed_behind_the_event_that_says_they_are_computed",
            ),
        ),
    ),
    Row(
        "An abort does not reach the other end",
        "sgl#28651, 30233",
        (
            Mutation(
                OUTGOING,
                "                instructions.append(SendAbort(self.num_posted, error))\n",
                "                pass\n",
                CATALOGUE + "an_abort_at_one_end_frees_the_other_at_once[prefill]",
            ),
            Mutation(
                ENDINGS,
                "instructions.append(SendAbort(*ids, transfer.abort_epoch, error))",
                "del ids",
                CATALOGUE + "an_abort_at_one_end_frees_the_other_at_once[decode]",
            ),
        ),
    ),
    Row(
        "Blocks are stranded between the sender's reply and the receiver's admission",
        "vllm#41269",
        (
            Mutation(
                SENDER,
                "        self._leases.grant(handoff.transfer_id, self._clock())\n",
                "",
                CATALOGUE + "sources_come_back_from_a_decode_node_that_never_answers",
            ),
            Mutation(
                INTAKE,
                "return [refused, *self._endings.finish(",
                "return [*self._endings.finish(",
                CATALOGUE + "a_decode_node_that_has_no_place_says_so_to_the_prefill_node",
            ),
            Mutation(
                MACHINE,
                "if self._is_started and self._handed_off:",
                "if False:",
                MACHINE_TESTS + "a_first_token_lost_with_its_node_is_waited_for_no_longer"
                "_when_decode_runs_the_rest",
            ),
            Mutation(
                MACHINE,
                "may_run = self._may_recompute or self._first_token_seen",
                "may_run = self._may_recompute",
                MACHINE_TESTS + "a_hand_off_whose_prefill_node_does_not_know_its_end_goes_on"
                "_where_decode_started",
            ),
        ),
    ),
    Row(
        "Split pools answer otherwise than one node, from the first token, all 200",
        "vllm#52617",
        (
            Mutation(
                SESSION,
                "FramePlace(seal, fate.block_ids, fate.table)",
                "FramePlace(seal, fate.block_ids[::-1], fate.table[::-1])",
                "tests/e2e/test_split_equality.py::"
                "test_greedy_tokens_of_the_split_pools_are_those_of_one_node_and_of_the_reference"
                "[llama3-512-1]",
            ),
        ),
    ),
    Row(
        "Recomputing: a sharer goes first, the same lookup fails for ever, an idle loop sleeps on",
        "vllm#49250, 55297; local-inference-lab#191",
        (
            Mutation(
                "decode_node/reservations.py",
                "num_computed_tokens=min(num_tokens, sequence.num_tokens - 1)",
                "num_computed_tokens=num_tokens * 0 + sequence.num_tokens - 1",
                "tests/decode_node/test_reservations.py::test_a_sharer_of_a_bad_block"
                "_does_not_hit_it_before_its_owner_has_computed_it",
            ),
            Mutation(
                "decode_node/reservations.py",
                "if reservation.num_held_blocks * block_size == sequence.num_tokens:",
                "if block_size == 0:",
                "tests/decode_node/test_reservations.py::"
                "test_what_is_computed_again_is_written_to_no_block_that_others_read",
            ),
            Mutation(
                INCOMING,
                "return (lacking & -lacking).bit_length() - 1 if lacking else num_blocks",
                "return num_blocks - lacking.bit_count()",
                CATALOGUE + "only_what_stands_before_the_first_bad_block_is_kept",
            ),
            Mutation(
                INTAKE,
                "if transfer.is_taken_over:",
                "if False:",
                STUCK + "a_node_that_goes_on_with_a_sequence_hears_that_its_blocks_never_come_back",
            ),
            Mutation(
                "decode_node/service.py",
                "        adding = asyncio.wrap_future(\n"
                "            self._loop.call(lambda: self._start_partly(sequence_id,",
                "        adding = asyncio.get_running_loop().create_future()\n"
                "        print(\n            repr(self._start_partly(sequence_id,",
                "tests/decode_node/test_service.py::"
                "test_a_failed_hand_off_goes_on_here_with_the_blocks_that_are_right",
            ),
        ),
    ),
    Row(
        "The reaper stops at the first live entry; a pushed heartbeat does not renew",
        "vllm#58222, 53095",
        (
            Mutation(
                "kv_transfer/lease.py",
                "expired = [lease.id for lease in self._leases.values() if now >= lease.deadline]",
                "expired = []\n"
                "        for lease in self._leases.values():\n"
                "            if now < lease.deadline:\n"
                "                break\n"
                "            expired.append(lease.id)",
                TIME + "a_sweep_reaches_expired_leases_behind_a_live_one",
            ),
            Mutation(
                ANSWERS,
                "self._leases.renew(renew.transfer_id, renew.extend_seconds, self._clock())",
                "pass",
                TIME + "a_renewal_that_is_pushed_keeps_the_sources",
            ),
            Mutation(
                INTAKE,
                "            self._leases.renew(transfer_id, extend_seconds, now)\n",
                "            pass\n",
                TIME + "a_renewal_that_is_pushed_keeps_the_sources",
            ),
        ),
    ),
    Row(
        "Cleaning up waits for new work; health is 200 while the engine hangs",
        "trt#12313",
        (
            Mutation(
                RECEIVER,
                "sweep_forever(self, self.agent.config.lease_seconds)",
                "asyncio.sleep(0)",
                TIME + "what_has_run_out_is_cleaned_up_with_no_new_work[decode]",
            ),
            Mutation(
                SENDER,
                "sweep_forever(self, self.agent.config.lease_seconds)",
                "asyncio.sleep(0)",
                TIME + "what_has_run_out_is_cleaned_up_with_no_new_work[prefill]",
            ),
            Mutation(
                "cluster/member.py",
                "if seconds > HUNG_SECONDS:",
                "if False:",
                "tests/cluster/test_member.py::"
                "test_a_node_whose_engine_hangs_does_not_say_that_it_lives",
            ),
            Mutation(
                "engine/loop.py",
                "return 0.0 if since is None else time.perf_counter() - since",
                "return 0.0",
                "tests/engine/test_loop.py::"
                "test_a_thread_that_hangs_shows_and_one_that_waits_for_work_does_not",
            ),
        ),
    ),
    Row(
        "A transient error blacklists for ever; a sender's death fails the receiver",
        "sgl#13054, 12779",
        (
            Mutation(
                "cluster/registry.py",
                "if owner != info.id and owner not in self._predecessors:",
                "if owner is not None and owner != info.id:",
                "tests/cluster/test_registry.py::"
                "test_a_predecessors_entry_that_is_back_replaces_nobody",
            ),
            Mutation(
                "cluster/membership.py",
                "now - retired_at < RETIRED_SECONDS:",
                "now >= retired_at:",
                "tests/cluster/test_membership.py::"
                "test_an_old_entry_that_was_revived_for_a_moment_takes_nobodys_place_for_ever",
            ),
            Mutation(
                "cluster/redis_client.py",
                "except Exception as error:",
                "except ZeroDivisionError as error:",
                "tests/cluster/test_redis_client.py::"
                "test_a_reply_that_makes_no_sense_is_a_failure_and_the_next_call_may_probe",
            ),
            Mutation(
                SENDER,
                "            del self._peers[peer.node_id]\n",
                "            pass\n",
                TIME + "a_decode_node_that_was_lost_once_is_used_again",
            ),
            Mutation(
                "kv_transfer/receiving/incoming_transfers.py",
                "return [transfer for transfer in self if transfer.session_id == session_id]",
                "return list(self)",
                TIME + "the_death_of_one_prefill_node_is_nothing_to_another",
            ),
            Mutation(
                "cluster/redis_client.py",
                "if self._is_probing or now < self._closed_until:",
                "if self._is_probing or now < self._closed_until or True:",
                "tests/cluster/test_redis_client.py::"
                "test_an_open_breaker_lets_one_probe_through_per_pause",
            ),
            Mutation(
                "gateway/pulse.py",
                "min(now - self._ticked_at, TICK_SECONDS)",
                "(now - self._ticked_at)",
                "tests/gateway/test_pulse.py::test_a_pinger_that_was_stopped_blames_nobody",
            ),
            Mutation(
                "prefill_node/prefix_fetches.py",
                "            if is_cancelled():\n                raise\n",
                "            raise\n",
                "tests/prefill_node/test_prefix_fetches.py::"
                "test_a_prompt_whose_fetch_is_cut_off_with_its_channel_is_not_given_up",
            ),
            Mutation(
                "gateway/pulse.py",
                "usual = max(self._timeout, LATE_FACTOR * self._worst_seconds)",
                "usual = self._timeout",
                "tests/gateway/test_pulse.py::"
                "test_a_peer_that_answers_late_is_never_silent_and_gets_more_time",
            ),
        ),
    ),
    Row(
        "The router's breaker opens for what clients gave up and never closes; without one, a pair"
        " that cannot exchange KV fails a request each time",
        "sgl#31206",
        (
            Mutation(
                "gateway/pair_breaker.py",
                "return not self.is_closed and (now < self.until or self.probe is not None)",
                "return not self.is_closed",
                PAIRS + "after_three_failures_requests_go_elsewhere_until_a_probe_succeeds",
            ),
            Mutation(
                "gateway/router.py",
                "key=_cost_of, default=cheapest)",
                "key=_cost_of)",
                PAIRS + "the_only_pair_is_asked_on_and_on_and_is_free_with_its_first_success",
            ),
            Mutation(
                "gateway/pairs.py",
                "if not active.is_connected or active.leaving:",
                "if False:",
                PAIRS + "what_is_missed_of_a_node_that_leaves_tells_nothing_of_the_pair",
            ),
            Mutation(
                "gateway/dispatch.py",
                "            self.pairs.ended(active, error, self._clock())\n",
                "            pass\n",
                PAIRS + "a_probe_whose_client_leaves_gives_its_turn_to_the_next",
            ),
            Mutation(
                "gateway/pairs.py",
                "if isinstance(error, TransferError):",
                "if error is not None:",
                PAIRS + "an_ending_that_is_not_the_hand_offs_tells_nothing_of_the_pair",
            ),
            Mutation(
                "gateway/router.py",
                "if held_back and cheapest.ids in held_back and not is_local(cheapest):",
                "if False:",
                PAIRS + "after_three_failures_requests_go_elsewhere_until_a_probe_succeeds",
            ),
            Mutation(
                "gateway/pairs.py",
                "if active.machine.is_recomputed:",
                "if False:",
                PAIRS + "what_the_decode_node_has_to_compute_has_failed_though_no_client_notices",
            ),
            Mutation(
                "gateway/dispatch.py",
                "avoided=stream.avoided,\n                held_back=self.pairs.held_back(now),",
                "avoided=stream.avoided,",
                PAIRS + "another_attempt_keeps_away_from_pairs_that_are_held_back",
            ),
            Mutation(
                "gateway/router.py",
                "for excluded in (avoided, suspects, avoided - parted)",
                "for excluded in (avoided, suspects)",
                "tests/gateway/test_retries.py::test_a_client_hears_nothing_of_one_broken_link_"
                "however_few_nodes_there_are_of_a_role",
            ),
            Mutation(
                SENDER,
                "machine.waits_for_peer and seconds >= limit:",
                "machine.waits_for_peer and seconds >= config.stall_seconds:",
                STALLS + "a_sender_gives_a_peer_up_while_another_pair_has_time_for_its_request",
            ),
            Mutation(
                "kv_transfer/receiving/overdue.py",
                "now - transfer.progress_at >= seconds",
                "now - transfer.progress_at >= self._stall_seconds",
                STALLS + "a_receiver_gives_a_payload_up_while_another_pair_has_time_for_it",
            ),
        ),
    ),
)
