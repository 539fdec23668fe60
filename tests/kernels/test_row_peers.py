"""A layer of two ranks: two GPUs of one process, whose kernels write into each other's memory."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from kernels.dispatch import num_multiprocessors
from kernels.peer_sum import PeerInboxes
from kernels.row_layer import COUNTERS, Heads, RowMatrix, Transform, row_layer
from tests.kernels.test_row_layer import EPS, LLAMA, Case, Place, Shape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
# Of which each rank's part ends within a stage and has fewer tiles than a GPU has multiprocessors.
ODD = Shape(1792, 1280, 5888, 20, 4, 64)
DEVICES = [torch.device("cuda", rank) for rank in range(2)]


class Rank:
    """Its part of a case, on its own GPU."""

    def __init__(self, rank: int, case: Case) -> None:
        self.rank, self.device = rank, DEVICES[rank]
        output, gate_up, down, norm = case.transform
        mine = torch.arange(2 * case.shape.inter).view(2, 2, -1)[:, rank].flatten()
        columns, rows = partial(columns_of, rank), partial(rows_of, self.device)
        self.transform = Transform(
            columns(output), rows(gate_up, mine), columns(down), norm.to(self.device)
        )
        outputs = torch.arange(case.shape.qkv).view(2, -1)[rank]
        self.heads = Heads(rows(case.qkv, outputs), case.next_norm.to(self.device), None)
        self.attended = case.attended.chunk(2, 1)[rank].contiguous().to(self.device)
        self.residual = case.residual.to(self.device)
        self.inbox = torch.zeros(2, 2, case.shape.hidden, dtype=torch.int64, device=self.device)
        self.counters = torch.zeros(6, COUNTERS, dtype=torch.int32, device=self.device)

    def peers(self, inboxes: list[torch.Tensor]) -> PeerInboxes:
        num_programs = num_multiprocessors(self.device)
        return PeerInboxes(
            rank=self.rank,
            size=2,
            addresses=torch.tensor([each.data_ptr() for each in inboxes], device=self.device),
            epochs=torch.zeros(num_programs, dtype=torch.int32, device=self.device),
            capacity=self.inbox.shape[2],
        )

    def layer(
        self, call: int, peers: PeerInboxes, heads: Heads | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        counters = self.counters[call], self.counters[call - 1]
        with torch.cuda.device(self.device):
            return row_layer(
                self.attended, self.residual, self.transform, heads, EPS, *counters, peers
            )

    def load_kernels(self) -> None:
        """Alone, all letters being there: what is loaded later might wait for a GPU that waits."""
        inbox = torch.zeros_like(self.inbox)
        inbox += torch.tensor([2, 1], device=self.device)[:, None, None] << 32
        for call, heads in enumerate((self.heads, None)):
            self.layer(call, self.peers([inbox, inbox]), heads)
            settle()


def rows_of(device: torch.device, matrix: RowMatrix, rows: torch.Tensor) -> RowMatrix:
    rows = rows.to(matrix.weight.device)
    # As bytes, since float8 cannot be indexed.
    weight = matrix.weight.view(torch.uint8)[rows].view(matrix.weight.dtype).to(device)
    scale, bias = (None if each is None else each[rows].to(device) for each in matrix[1:])
    return RowMatrix(weight, scale, bias)


def columns_of(rank: int, matrix: RowMatrix) -> RowMatrix:
    weight = matrix.weight.chunk(2, 1)[rank].contiguous().to(DEVICES[rank])
    return RowMatrix(weight, None if matrix.scale is None else matrix.scale.to(DEVICES[rank]))


def settle() -> None:
    for device in DEVICES:
        torch.cuda.synchronize(device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("is_float8", [False, True], ids=["plain", "float8"])
@pytest.mark.parametrize("shape", [ODD, LLAMA], ids=["odd", "llama"])
def test_two_ranks_make_the_layer_of_one(shape: Shape, is_float8: bool, dtype: torch.dtype) -> None:
    case = Case(Place(DEVICES[0], dtype, is_float8), shape)
    stream, qkv = case.expected_stream(), case.expected_qkv()
    ranks = [Rank(rank, case) for rank in range(2)]
    inboxes = [each.inbox for each in ranks]
    inboxes[0].copy_(inboxes[1])  # opens the way between the GPUs, in both directions
    inboxes[1].copy_(inboxes[0])
    peers = [each.peers(inboxes) for each in ranks]
    for each in ranks:
        each.load_kernels()
    for call, has_heads in enumerate((True, False, True), start=2):
        for each in ranks:
            torch.full((1 << 20,), float("nan"), device=each.device)
        settle()
        results = [
            each.layer(call, inbox, each.heads if has_heads else None)
            for each, inbox in zip(ranks, peers, strict=True)
        ]
        settle()
        streams, parts = zip(*results, strict=True)
        assert torch.equal(streams[0].cpu(), streams[1].cpu())
        case.assert_close(streams[0], stream)
        if has_heads:
            case.assert_close(torch.cat([part.cpu() for part in parts], 1), qkv)
