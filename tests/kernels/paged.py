"""A paged KV pool to attend to, and dense attention in float64 to compare with.

Every slot that no sequence owns holds NaN, block tables are scrambled and padded with an id that
does not exist: whatever reads past a sequence shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch

NO_BLOCK = 1 << 30


@dataclass(frozen=True)
class PagedCase:
    query: torch.Tensor
    kv_layer: torch.Tensor
    block_tables: torch.Tensor
    cu_seqlens_q: torch.Tensor
    seq_lens: torch.Tensor
    # Float64 on the CPU, one `[2, num_kv_heads, seq_len, head_size]` per sequence.
    dense_kv: list[torch.Tensor]
    kv_scales: torch.Tensor | None = None

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.query.shape[2])

    def expected(self, sliding_window: int | None = None) -> torch.Tensor:
        """Attention of all query tokens, `[num_tokens, num_heads, head_size]`, float64."""
        out = torch.full(self.query.shape, math.nan, dtype=torch.float64)
        tokens = pairwise(self.cu_seqlens_q.tolist())
        for (start, stop), (key, value) in zip(tokens, self.dense_kv, strict=True):
            group = self.query.shape[1] // key.shape[0]
            query = self.query[start:stop].double().cpu().transpose(0, 1)
            scores = query @ key.repeat_interleave(group, 0).mT * self.scale
            keys = torch.arange(key.shape[1])
            positions = keys[len(keys) - (stop - start) :, None]
            hidden = keys > positions
            if sliding_window is not None:
                hidden |= positions - keys >= sliding_window
            weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
            out[start:stop] = (weights @ value.repeat_interleave(group, 0)).transpose(0, 1)
        return out

    def poisoned_out(self) -> torch.Tensor:
        return torch.full_like(self.query, math.nan, memory_format=torch.contiguous_format)


def paged_case(
    query_lens: list[int],
    seq_lens: list[int],
    *,
    heads: tuple[int, int],
    head_size: int,
    dtype: torch.dtype,
    device: torch.device,
    block_size: int = 16,
    is_float8: bool = False,
) -> PagedCase:
    """Random normal queries, keys and values; the query is a view into a wider projection.

    is_float8: the pool is float8_e4m3fn with another scale for each head; what is expected is
    attention to what it can hold.
    """
    num_heads, num_kv_heads = heads
    num_blocks = [-(-length // block_size) for length in seq_lens]
    shape = (sum(num_blocks) + 3, 2, num_kv_heads, block_size, head_size)
    kv_scales = 0.5 + torch.rand(2, num_kv_heads) if is_float8 else None
    kv_layer = torch.full(shape, math.nan, dtype=torch.float8_e4m3fn if is_float8 else dtype)
    free_blocks = torch.randperm(len(kv_layer))
    tables = torch.full((len(seq_lens), max(num_blocks) + 2), NO_BLOCK, dtype=torch.int32)
    dense = []
    for row, (length, count) in enumerate(zip(seq_lens, num_blocks, strict=True)):
        owned, free_blocks = free_blocks[:count], free_blocks[count:]
        tables[row, :count] = owned
        kv = torch.randn(2, num_kv_heads, length, head_size).to(kv_layer.dtype)
        for place, block_id in enumerate(owned.tolist()):
            part = kv[:, :, place * block_size : (place + 1) * block_size]
            kv_layer[block_id, :, :, : part.shape[2]] = part
        dense.append(kv.double() if kv_scales is None else kv.double() * kv_scales[..., None, None])
    projection = torch.randn(sum(query_lens), num_heads + 3, head_size).to(dtype)
    return PagedCase(
        query=projection.to(device)[:, :num_heads],
        kv_layer=kv_layer.to(device),
        block_tables=tables.to(device),
        cu_seqlens_q=torch.tensor([0, *query_lens], device=device).cumsum(0).int(),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
        dense_kv=dense,
        kv_scales=None if kv_scales is None else kv_scales.to(device),
    )


def assert_attention_close(
    actual: torch.Tensor, expected: torch.Tensor, *, score_factor: float = 1.0
) -> None:
    """Outputs are averages of unit normals: errors are measured against one.

    score_factor: by how much scores, and so their rounding errors, exceed unit normals.
    """
    tolerance = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[actual.dtype]
    tolerance *= score_factor
    torch.testing.assert_close(actual.double().cpu(), expected, rtol=0, atol=tolerance)
