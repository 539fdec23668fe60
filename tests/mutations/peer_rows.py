"""Rows about peers that die, flood or fall silent, and nodes that go themselves."""

from __future__ import annotations

from tests.mutations.row import Mutation, Row
from tests.mutations.transfer_rows import INTAKE, RECEIVER, SESSION, SESSIONS, STUCK, TIME

GREEDY = "tests/kv_transfer/receiving/test_greedy_peer.py::test_"
SILENCE_TESTS = "tests/kv_transfer/receiving/test_silence.py::test_"
PREFIXES = "kv_transfer/sending/prefixes.py"
PREFIX_TESTS = "tests/kv_transfer/sending/test_prefixes.py::test_"

PEER_ROWS = (
    Row(
        "A link that brings nothing more stays in progress for ever",
        "nixl#2047; vllm#35943",
        (
            Mutation(
                RECEIVER,
                "            if session.is_silent(now):\n",
                "            if False:\n",
                SILENCE_TESTS
                + "a_link_that_swallows_everything_is_given_up_long_before_its_transfers_are",
            ),
            Mutation(
                SESSION,
                "is_busy = self._is_taking or self._landings.is_busy",
                "is_busy = self._is_taking",
                SILENCE_TESTS + "a_payload_that_comes_slowly_ends_no_session",
            ),
            Mutation(
                SESSION,
                "is_busy = self._is_taking or self._landings.is_busy",
                "is_busy = self._landings.is_busy",
                SILENCE_TESTS + "headers_that_wait_for_a_slot_here_end_no_session",
            ),
            Mutation(
                "kv_transfer/receiving/silence.py",
                "min(now - self._looked_at, 2 * MAX_SECONDS), now",
                "now - self._looked_at, now",
                SILENCE_TESTS + "time_in_which_this_process_was_stopped_does_not_count",
            ),
        ),
    ),
    Row(
        "A node that is told to go ends under those who read its memory, or are about to",
        "dyn#7319, 9344, 4917",
        (
            *(
                Mutation(
                    "node_parts/wiring.py",
                    "return self.prefixes.num_asked + self.sender.num_transfers",
                    "return self.sender.num_transfers",
                    "tests/e2e/test_prefix_fetch.py::"
                    f"test_a_node_that_looks_for_a_prefix_to_give_away_is_not_idle[{role}]",
                )
                for role in ("prefill", "decode")
            ),
            Mutation(
                "node_parts/wiring.py",
                "return self.prefixes.num_asked + self.sender.num_transfers",
                "return self.prefixes.num_asked",
                "tests/e2e/test_digest_scenarios.py::"
                "test_a_node_drains_though_some_of_its_blocks_never_come_back",
            ),
            Mutation(
                INTAKE,
                "transfer.is_stuck = not transfer.is_starting",
                "transfer.is_stuck = True",
                STUCK + "a_sequence_on_its_way_to_the_engine_is_waited_for_whatever_its_link_"
                "still_touches[well]",
            ),
        ),
    ),
    Row(
        "A dead peer's memory stays mapped",
        "vllm#58063",
        (
            Mutation(
                "kv_transfer/agent.py",
                "endpoint.on_close(lambda: self._forget(endpoint))",
                "pass",
                TIME + "a_dead_peer_leaves_no_connection_behind",
            ),
            Mutation(
                SESSIONS,
                "return self._sessions.pop(session_id)",
                "return self._sessions[session_id]",
                TIME + "a_dead_peer_leaves_no_connection_behind",
            ),
        ),
    ),
    Row(
        "A peer that floods a node, or reads nothing, fills its memory",
        "CVE-2025-30202 (vLLM: a slow subscriber)",
        (
            Mutation(
                PREFIXES,
                " or given[to] >= MAX_TO_ONE_PEER:",
                ":",
                PREFIX_TESTS + "a_peer_that_reads_slowly_leaves_prefixes_to_the_others",
            ),
            Mutation(
                PREFIXES,
                "            each.to for name, each in given if not self._sender.is_stuck(name)\n",
                "            each.to for name, each in given\n",
                PREFIX_TESTS + "what_is_stuck_stays_held_and_keeps_no_other_prefix_here",
            ),
            Mutation(
                SESSION,
                "if self._num_draining == MAX_DRAINING:",
                "if False:",
                GREEDY + "headers_whose_payloads_never_come_end_the_session",
            ),
            Mutation(
                SESSION,
                "if self.outbox.qsize() > MAX_UNREAD and self._serving_task is not None:",
                "if False:",
                GREEDY + "a_peer_that_asks_and_reads_no_answers_is_cut_off",
            ),
            Mutation(
                "cluster/rpc.py",
                'await abort(context, NodeUnavailable("The node ended this call."',
                "raise  #",
                "tests/cluster/test_rpc.py::test_a_gateway_that_stops_reading_ends_on_the_node",
            ),
            Mutation(
                "kv_transfer/transports/local_messages.py",
                "if len(self._unsent) >= MAX_UNSENT:",
                "if False:",
                "tests/kv_transfer/test_local_messages.py::"
                "test_a_peer_that_reads_nothing_is_given_up",
            ),
            Mutation(
                "kv_transfer/transports/tcp.py",
                "            if len(self._greeting) > MAX_GREETING:\n",
                "            if False:\n",
                "tests/kv_transfer/test_tcp_transport.py::"
                "test_peers_that_connect_and_say_nothing_keep_nobody_out",
            ),
        ),
    ),
)
