"""Rows about what clients see, retries and the prefix index."""

from __future__ import annotations

from tests.mutations.row import Mutation, Row

CLUSTER_ROWS = (
    Row(
        "A failed stream ends in [DONE] without an error; a node's refusal becomes an empty 200",
        "vllm#40986; vllm-ascend#12166, 13165",
        (
            Mutation(
                "gateway/streaming.py",
                "await self._write(self._frames.error(error), is_last=True)",
                "await self._write(self._frames.last(), is_last=True)",
                "tests/gateway/test_failures.py::test_an_error_after_the_first_token_is_an_event",
            ),
            Mutation(
                "gateway/whole_answers.py",
                "await send_error(send, generation.error, generation.request.message_id)",
                "pass",
                "tests/gateway/test_failures.py::"
                "test_an_error_before_the_first_token_has_its_own_status",
            ),
        ),
    ),
    Row(
        "A retry goes out with stale parameters; without parameters a node silently prefills",
        "vllm-ascend#13929; vllm#26896",
        (
            Mutation(
                "gateway/node_frames.py",
                "transfer_id=os.urandom(16),",
                "transfer_id=bytes(16),",
                "tests/gateway/test_retries.py::test_each_attempt_has_a_transfer_of_its_own",
            ),
            Mutation(
                "prefill_node/service.py",
                'raise InvalidRequest("A prefill node needs to know where to hand off.")',
                "return",
                "tests/prefill_node/test_service.py::"
                "test_what_cannot_be_taken_is_refused_before_any_work",
            ),
        ),
    ),
    Row(
        "The index outlives a restart of its node; its memory grows for ever",
        "llm-d-router#2853; dyn#4429, 10774, 11933",
        (
            Mutation(
                "cluster/prefix_index.py",
                'identity = f"{node.incarnation}:{node.name}".encode()',
                "identity = node.name.encode()",
                "tests/cluster/test_prefix_index.py::"
                "test_another_incarnations_entries_are_not_believed",
            ),
            Mutation(
                "cluster/node_service.py",
                "            check_is_meant(hello, welcome)\n",
                "",
                "tests/gateway/test_failures.py::"
                "test_an_entry_that_outlives_its_process_costs_the_next_one_at_its_address_no_session",
            ),
            Mutation(
                "kv_transfer/receiving/kv_session.py",
                "if hello.receiver_incarnation not in (0, self._receiver.node_id.incarnation):",
                "if False:",
                "tests/kv_transfer/sending/test_sender.py::"
                "test_a_hand_off_meant_for_an_earlier_incarnation_costs_those_to_this_one_nothing",
            ),
            Mutation(
                "cluster/prefix_index.py",
                'pipe.set(tag + block_hash, b"", px=self._ttl_ms)',
                'pipe.set(tag + block_hash, b"")',
                "tests/cluster/test_prefix_index.py::test_entries_hold_only_hashes_and_expire",
            ),
        ),
    ),
)
