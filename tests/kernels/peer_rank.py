"""One rank of `test_peer_sum.py`: `python peer_rank.py RANK SIZE FILE`, in Triton's interpreter.

Every rank draws the same tensors, sums its own with those of the others through inboxes in FILE,
and prints what it got as JSON: for each case the words of the result.
"""

from __future__ import annotations

import json
import sys

import torch

from kernels.dispatch import interpreted
from kernels.peer_sum import MAX_PROGRAMS, PeerInboxes, inbox_words, peer_sum

CASES = (
    (torch.float32, 1),
    (torch.bfloat16, 300),
    (torch.float16, 64),
    (torch.bfloat16, 2),
    (torch.float32, 515),
    (torch.bfloat16, 1030),
)
LARGEST_BYTES = 4 * 515


def drawn(case: int, rank: int) -> torch.Tensor:
    dtype, size = CASES[case]
    generator = torch.Generator().manual_seed(100 * case + rank)
    return torch.randn(size, generator=generator).to(dtype)


def file_words(num_ranks: int) -> int:
    return num_ranks * 2 * num_ranks * inbox_words(LARGEST_BYTES)


def main(rank: int, size: int, path: str) -> None:
    capacity = inbox_words(LARGEST_BYTES)
    memory = torch.from_file(path, shared=True, size=file_words(size), dtype=torch.int64)
    inboxes = PeerInboxes(
        rank=rank,
        size=size,
        addresses=torch.tensor([each.data_ptr() for each in memory.view(size, -1)]),
        epochs=torch.zeros(MAX_PROGRAMS, dtype=torch.int32),
        capacity=capacity,
    )
    results = []
    with interpreted():
        for case in range(len(CASES)):
            summed = peer_sum(drawn(case, rank), inboxes)
            sent = drawn(case, rank) if rank == 1 else torch.full_like(summed, float("nan"))
            peer_sum(sent, inboxes, contributes=rank == 1)
            results.append([each.view(torch.uint8).tolist() for each in (summed, sent)])
    print(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
