"""Rows about KV that leaves the pool for host memory and comes back."""

from __future__ import annotations

from tests.mutations.row import Mutation, Row

TESTS = "tests/engine/test_host_blocks.py::test_"
BLOCKS = "engine/host_blocks.py"
TIER = "engine/host_tier.py"
RESTORES = "engine/restores.py"
RESTORE_TESTS = "tests/engine/test_restores.py::test_"

TIER_ROWS = (
    Row(
        "A copy goes on while its blocks or slots are given to somebody else",
        "sgl#13231; mc#4239, 4153 (other paths of the same cache)",
        (
            Mutation(
                BLOCKS,
                "hold = self._pool.hold(block_ids, owner, is_use=False)",
                "hold = self._pool.hold((), owner, is_use=False)",
                TESTS + "blocks_belong_to_the_copy_until_it_ends",
            ),
            Mutation(
                BLOCKS,
                'self._pool.hold(block_ids, f"load for {sequence.sequence_id}")',
                'self._pool.hold((), f"load for {sequence.sequence_id}")',
                TESTS + "blocks_belong_to_the_copy_until_it_ends",
            ),
            Mutation(
                TIER,
                "            if entry.num_loads == 0:\n                self._drop(entry)\n",
                "            if entry.slot >= 0:\n                self._drop(entry)\n",
                TESTS + "a_slot_that_is_read_is_not_given_to_another_block",
            ),
        ),
    ),
    Row(
        "What another tier gives back is believed",
        "mc CRC-64: range reads unverified; vllm#52234 (receive fails open)",
        (
            Mutation(
                BLOCKS,
                "if entry.is_dropped or entry.digest != digest:",
                "if entry.is_dropped:",
                TESTS + "from_the_first_block_that_has_changed_on_all_is_computed",
            ),
            Mutation(
                BLOCKS,
                "if entry.is_dropped or entry.digest != digest:",
                "if entry.digest != digest:",
                TESTS + "a_load_of_what_is_forgotten_meanwhile_is_not_believed",
            ),
            Mutation(
                RESTORES,
                "num_blocks = reservation.num_held_blocks + num_good",
                "num_blocks = len(reservation.block_ids)",
                RESTORE_TESTS + "from_the_first_block_that_has_changed_on_nothing_is_given",
            ),
            Mutation(
                RESTORES,
                "        if not reservation.is_cacheable:",
                "        if num_blocks < 0:",
                RESTORE_TESTS + "what_was_forgotten_meanwhile_is_not_given_nor_cached",
            ),
            Mutation(
                TIER,
                "            found.extend(self._children.get(block_hash, ()))\n",
                "            continue\n",
                TESTS + "a_save_that_a_forgotten_block_precedes_is_not_believed_when_it_ends",
            ),
        ),
    ),
    Row(
        "The same look-up fails again and again; sharers race for the same block",
        "vllm#55297, 49250",
        (
            Mutation(
                BLOCKS,
                "            self.tier.forget([bad.block_hash])\n",
                "            pass\n",
                TESTS + "from_the_first_block_that_has_changed_on_all_is_computed",
            ),
            Mutation(
                BLOCKS,
                "        if any(entry.num_loads for entry in entries):\n",
                "        if entries is None:\n",
                TESTS + "a_block_that_somebody_loads_is_waited_for_and_not_loaded_twice",
            ),
        ),
    ),
)
