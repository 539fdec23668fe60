"""Ranks that sum and push through each other's memory: processes over a shared file, not GPUs."""

from __future__ import annotations

import itertools
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


def run_ranks(num_ranks: int, file: Path) -> list[dict[str, list[list[list[int]]]]]:
    """By rank. "summed", by case: the bytes of the sum and of the broadcast from rank 1. "pushed",
    of rank 0, by case: the bytes of the matrix, by row."""
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
def test_every_rank_gets_the_same_sum_and_the_first_one_all_columns(
    num_ranks: int, tmp_path: Path
) -> None:
    results = run_ranks(num_ranks, tmp_path / "inboxes")
    summed, pushed = results[0]["summed"], results[0]["pushed"]
    assert all(result["summed"] == summed for result in results)
    for case, (dtype, _) in enumerate(peer_rank.CASES):
        check_sums(case, num_ranks, *(as_tensor(each, dtype) for each in summed[case]))
        parts = [peer_rank.columns(case, rank, num_ranks) for rank in range(num_ranks)]
        whole = torch.cat(parts, dim=1)
        assert torch.equal(as_tensor(pushed[case], dtype)[:, : whole.shape[1]], whole)


def as_tensor(values: list[int] | list[list[int]], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8).view(dtype)


def check_sums(case: int, num_ranks: int, summed: torch.Tensor, sent: torch.Tensor) -> None:
    parts = [peer_rank.drawn(case, rank) for rank in range(num_ranks)]
    exact = torch.stack(parts).double().sum(0)
    torch.testing.assert_close(
        summed.double(), exact.to(summed.dtype).double(), rtol=2**-7, atol=1e-6
    )
    assert torch.equal(sent, parts[1])


@pytest.mark.parametrize("num_bytes", [1, 4 * 64 * MAX_PROGRAMS, 2 << 20, 4 << 20])
def test_an_inbox_holds_what_it_was_made_for(num_bytes: int) -> None:
    assert num_bytes <= 4 * inbox_words(num_bytes) <= max(4 * 64 * MAX_PROGRAMS, 2 * num_bytes)


@pytest.mark.parametrize(("how", "fences"), [("fences", ["fence"]), ("none", [])])
def test_a_meeting_is_fenced_before_its_words_are_sent_and_when_all_have_come(
    how: str, fences: list[str]
) -> None:
    """By what is compiled for Hopper: no run shows that memory is ordered."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_peer_sum", how],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    words = [word for word, _ in itertools.groupby(child.stdout.split())]
    assert words == [*fences, "send", "poll", *fences], child.stderr
