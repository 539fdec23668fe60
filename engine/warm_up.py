"""Steps that are run before serving, to make the first real one as fast as the next, and the
batches that such steps are made of.

The batches here belong to no sequence: every slot is the padding slot, so no KV is written, and
every row reads block 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from engine.batch import Batch, Samples, table_width

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from engine.limits import EngineLimits
    from engine.models.decoder import Decoder


def warm_up(decoder: Decoder, kv_layers: SequenceOf[torch.Tensor], limits: EngineLimits) -> None:
    """Run a step of each kind that kernels are compiled or loaded for, so that no request waits
    for it: they have variants by the number of tokens, whose borders are powers of two.
    """
    for num_tokens in warm_up_sizes(limits):
        run_batch(decoder, prefill_batch(num_tokens, kv_layers[0], limits), *kv_layers)
    run_batch(decoder, decode_batch(1, limits.device), *kv_layers)
    if limits.on_gpu:
        torch.cuda.synchronize(limits.device)


def warm_up_sizes(limits: EngineLimits) -> list[int]:
    """Tokens of one step: each power of two, what is just above it, and the most."""
    most = limits.max_num_batched_tokens
    if not limits.on_gpu:
        return [size for size in (1, 2) if size <= most]
    powers = [1 << exponent for exponent in range(most.bit_length())]
    return sorted({size for power in powers for size in (power, power + 1) if size < most} | {most})


def run_batch(decoder: Decoder, batch: Batch, *kv_layers: torch.Tensor) -> torch.Tensor | None:
    """The logits. One layer of KV stands in for all of them."""
    layers = kv_layers if len(kv_layers) > 1 else kv_layers * decoder.config.num_layers
    hidden = decoder.forward(batch, layers)
    return None if hidden is None else decoder.logits(hidden)


def prefill_batch(
    num_tokens: int,
    kv_layer: torch.Tensor,
    limits: EngineLimits,
    *,
    num_rows: int = 1,
    context: int = 0,
) -> Batch:
    """`num_tokens` in all, of at least `num_rows` prompts as long as each other, each behind
    `context` tokens that are computed; all of them sampled."""
    device = limits.device
    num_rows = max(num_rows, -(-num_tokens // limits.max_model_len))
    ends = torch.arange(num_rows + 1) * num_tokens // num_rows
    lengths = ends.diff()
    positions = torch.cat([torch.arange(context, context + int(each)) for each in lengths])
    width = table_width(-(-(context + int(lengths.max())) // kv_layer.shape[3]))
    return Batch(
        token_ids=torch.zeros(num_tokens, dtype=torch.int64, device=device),
        positions=positions.to(device),
        slot_mapping=torch.full((num_tokens,), -1, dtype=torch.int64, device=device),
        samples=Samples((ends[1:] - 1).to(device), torch.arange(num_rows, device=device)),
        seq_lens=(lengths + context).to(device=device, dtype=torch.int32),
        cu_seqlens_q=ends.to(device=device, dtype=torch.int32),
        block_tables=torch.zeros(num_rows, width, dtype=torch.int32, device=device),
        num_samples=num_rows,
        max_seqlen_q=int(lengths.max()),
        is_decode=False,
    )


def decode_batch(num_rows: int, device: torch.device) -> Batch:
    ones = torch.ones(num_rows, dtype=torch.int32, device=device)
    zeros = torch.zeros(num_rows, dtype=torch.int64, device=device)
    return Batch(
        token_ids=zeros,
        positions=zeros,
        slot_mapping=zeros - 1,
        samples=None,
        seq_lens=ones,
        cu_seqlens_q=ones,
        block_tables=torch.zeros(num_rows, table_width(1), dtype=torch.int32, device=device),
        num_samples=num_rows,
        max_seqlen_q=1,
        is_decode=True,
    )
