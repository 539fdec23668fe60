"""Ranks that sum through each other's memory: processes over a shared file stand in for GPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.peer_sum import MAX_PROGRAMS, inbox_words
from tests.kernels import peer_rank

REPOSITORY = Path(__file__).resolve().parents[2]


def run_ranks(num_ranks: int, file: Path) -> list[list[list[list[int]]]]:
    """By rank and case: the bytes of the sum and of the broadcast from rank 1."""
    file.write_bytes(bytes(8 * peer_rank.file_words(num_ranks)))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.peer_rank", str(rank), str(num_ranks), str(file)],
            cwd=REPOSITORY,
            env=os.environ | {"TRITON_INTERPRET": "1"},
            stdout=subprocess.PIPE,
        )
        for rank in range(num_ranks)
    ]
    try:
        return [json.loads(rank.communicate(timeout=120)[0]) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_every_rank_gets_the_same_sum_and_what_one_of_them_sent(
    num_ranks: int, tmp_path: Path
) -> None:
    results = run_ranks(num_ranks, tmp_path / "inboxes")
    assert all(result == results[0] for result in results)
    for case, (dtype, _) in enumerate(peer_rank.CASES):
        parts = [peer_rank.drawn(case, rank) for rank in range(num_ranks)]
        summed, sent = (
            torch.tensor(each, dtype=torch.uint8).view(dtype) for each in results[0][case]
        )
        exact = torch.stack(parts).double().sum(0)
        torch.testing.assert_close(summed.double(), exact.to(dtype).double(), rtol=2**-7, atol=1e-6)
        assert torch.equal(sent, parts[1])


@pytest.mark.parametrize("num_bytes", [1, 4 * 64 * MAX_PROGRAMS, 2 << 20, 4 << 20])
def test_an_inbox_holds_what_it_was_made_for(num_bytes: int) -> None:
    assert num_bytes <= 4 * inbox_words(num_bytes) <= max(4 * 64 * MAX_PROGRAMS, 2 * num_bytes)
