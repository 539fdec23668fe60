"""One rank of `test_peer_sum.py`: `python peer_rank.py RANK SIZE FILE`, in Triton's interpreter.

Every rank draws the same tensors, sums its own with those of the others through inboxes in FILE,
and prints what it got as JSON: for each case the words of the result. In between it pushes its
columns of a matrix to rank 0, which also prints the matrix.
"""

from __future__ import annotations

import json
import sys

import torch

from kernels.dispatch import interpreted
from kernels.peer_push import peer_push
from kernels.peer_sum import MAX_PROGRAMS, PeerInboxes, inbox_words, peer_meet, peer_sum

CASES = (
    (torch.float32, 1),
    (torch.bfloat16, 300),
    (torch.float16, 64),
    (torch.bfloat16, 2),
    (torch.float32, 515),
    (torch.bfloat16, 1030),
)
LARGEST_BYTES = 4 * 515
# By case: rows of the matrix and columns of a rank, of which the last has one less.
PUSHED = ((1, 160), (3, 5), (2, 2050), (130, 2), (3, 1), (1, 4100))
_MATRIX_WORDS = 3 * 4100  # of 8 bytes: enough for any


def drawn(case: int, rank: int) -> torch.Tensor:
    dtype, size = CASES[case]
    generator = torch.Generator().manual_seed(100 * case + rank)
    return torch.randn(size, generator=generator).to(dtype)


def columns(case: int, rank: int, size: int) -> torch.Tensor:
    num_rows, width = PUSHED[case]
    generator = torch.Generator().manual_seed(1000 * case + rank)
    drawn = torch.randn(num_rows, width - (rank == size - 1), generator=generator)
    return drawn.to(CASES[case][0])


def file_words(num_ranks: int) -> int:
    return num_ranks * 2 * num_ranks * inbox_words(LARGEST_BYTES) + _MATRIX_WORDS


def main(rank: int, size: int, path: str) -> None:
    capacity = inbox_words(LARGEST_BYTES)
    memory = torch.from_file(path, shared=True, size=file_words(size), dtype=torch.int64)
    letters, matrices = memory[:-_MATRIX_WORDS], memory[-_MATRIX_WORDS:]
    inboxes = PeerInboxes(
        rank=rank,
        size=size,
        addresses=torch.tensor([each.data_ptr() for each in letters.view(size, -1)]),
        epochs=torch.zeros(MAX_PROGRAMS, dtype=torch.int32),
        capacity=capacity,
    )
    results: dict[str, list[list[list[int]]]] = {"summed": [], "pushed": []}
    word = torch.full((1,), 7, dtype=torch.int32)
    with interpreted():
        for case in range(len(CASES)):
            summed = peer_sum(drawn(case, rank), inboxes)
            sent = drawn(case, rank) if rank == 1 else torch.full_like(summed, float("nan"))
            peer_sum(sent, inboxes, contributes=rank == 1)
            peer_meet(word, inboxes)
            results["summed"].append([each.view(torch.uint8).tolist() for each in (summed, sent)])
            part = columns(case, rank, size)
            matrix = matrices.view(part.dtype)[: len(part) * PUSHED[case][1] * size]
            matrix = matrix.view(len(part), -1)
            peer_push(part, matrix, inboxes)
            if rank == 0:
                results["pushed"].append(matrix.view(torch.uint8).tolist())
    print(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
