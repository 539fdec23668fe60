"""Inputs of the cases: random normal, in the shapes of Llama-3.1-8B, block tables scrambled."""

from __future__ import annotations

import torch

HEADS, KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 32, 8, 128, 16
HIDDEN, INTERMEDIATE, VOCABULARY = 4096, 14336, 128256
DTYPE = torch.bfloat16
DEVICE = torch.device("cuda")
KV_TOKEN_BYTES = 2 * KV_HEADS * HEAD_SIZE * 2
SCALE = HEAD_SIZE**-0.5


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def paged_kv(seq_lens: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A pool with scrambled blocks, block tables and lengths."""
    counts = [-(-length // BLOCK_SIZE) for length in seq_lens]
    kv_layer = normal(sum(counts), 2, KV_HEADS, BLOCK_SIZE, HEAD_SIZE)
    blocks = torch.randperm(sum(counts), dtype=torch.int32)
    tables = torch.zeros(len(seq_lens), max(counts), dtype=torch.int32)
    for row, part in enumerate(torch.split_with_sizes(blocks, counts)):
        tables[row, : len(part)] = part
    lengths = torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE)
    return kv_layer, tables.to(DEVICE), lengths
