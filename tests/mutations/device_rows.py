"""Rows about digests that are compared on a GPU, where no Python sees them."""

from __future__ import annotations

from tests.mutations.row import Mutation, Row

MOVES = "tests/kv_transfer/test_device_moves.py::test_"
KERNEL = "kernels/seal_digests.py"
DEVICE_MOVES = "kv_transfer/device_moves.py"
NEVER_RAN = "a_comparison_that_never_ran_verifies_nothing_even_after_one_that_did"

DEVICE_ROWS = (
    Row(
        "Blocks that changed on their way pass on a GPU, or nobody compared them",
        "sgl#39500; vllm#52234, 52276",
        (
            Mutation(
                KERNEL,
                "tl.sum(((claimed == sealed) & mask)",
                "tl.sum(((claimed == claimed) & mask)",
                MOVES + "a_byte_that_changed_on_its_way_is_found",
            ),
            Mutation(
                KERNEL,
                "sealed = (digest.to(tl.uint64) + place).to(tl.int64, bitcast=True)",
                "sealed = digest",
                MOVES + "blocks_of_another_transfer_are_found",
            ),
            Mutation(
                KERNEL,
                "return int(self._view.sum()) == num_units",
                "return int(self._view.sum()) <= num_units",
                MOVES + NEVER_RAN,
            ),
            Mutation(
                DEVICE_MOVES,
                "        notes.verdict.reset()\n",
                "        pass\n",
                MOVES + NEVER_RAN,
            ),
            Mutation(
                DEVICE_MOVES,
                "lambda: notes.verdict.has_verified(frame.num_units)",
                "lambda: True",
                MOVES + "a_byte_that_changed_on_its_way_is_found",
            ),
        ),
    ),
)
