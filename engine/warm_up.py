"""Steps that are run before serving: to measure what a full one needs, and to make the first
real one as fast as the next.

The batches here belong to no sequence: every slot is the padding slot, so no KV is written, and
every row reads block 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from engine.batch import Batch, table_width

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from engine.limits import EngineLimits
    from engine.models.decoder import Decoder

# Float32 copies of the logits that the sampler holds at once at its busiest (sorting for top-p).
_SAMPLER_COPIES = 6


def measure_workspace(decoder: Decoder, kv_layer: torch.Tensor, limits: EngineLimits) -> int:
    """Bytes of GPU memory that the largest step allocates beyond what is allocated now.

    `kv_layer`: any one block, standing in for every layer of the pool.
    """
    device = limits.device
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    num_samples = min(limits.max_num_seqs, limits.max_num_batched_tokens)
    batch = _prefill_batch(limits.max_num_batched_tokens, num_samples, kv_layer, limits)
    _run(decoder, batch, kv_layer)
    torch.cuda.synchronize(device)
    forward = torch.cuda.max_memory_allocated(device) - before
    sampling = _SAMPLER_COPIES * num_samples * decoder.config.vocab_size * torch.float32.itemsize
    torch.cuda.empty_cache()
    return max(forward, sampling)


def warm_up(decoder: Decoder, kv_layers: SequenceOf[torch.Tensor], limits: EngineLimits) -> None:
    """Run a step of each kind that kernels are compiled or loaded for, so that no request waits
    for it: they have variants by the number of tokens, whose borders are powers of two.
    """
    for num_tokens in warm_up_sizes(limits):
        _run(decoder, _prefill_batch(num_tokens, 1, kv_layers[0], limits), *kv_layers)
    _run(decoder, _decode_batch(1, limits.device), *kv_layers)
    if limits.on_gpu:
        torch.cuda.synchronize(limits.device)


def warm_up_sizes(limits: EngineLimits) -> list[int]:
    """Tokens of one step: each power of two, what is just above it, and the most."""
    most = limits.max_num_batched_tokens
    if not limits.on_gpu:
        return [size for size in (1, 2) if size <= most]
    powers = [1 << exponent for exponent in range(most.bit_length())]
    return sorted({size for power in powers for size in (power, power + 1) if size < most} | {most})


def _run(decoder: Decoder, batch: Batch, *kv_layers: torch.Tensor) -> None:
    layers = kv_layers if len(kv_layers) > 1 else kv_layers * decoder.config.num_layers
    hidden = decoder.forward(batch, layers)
    if hidden is not None:
        decoder.logits(hidden)


def _prefill_batch(
    num_tokens: int, num_samples: int, kv_layer: torch.Tensor, limits: EngineLimits
) -> Batch:
    """Prompts of at most `max_model_len` tokens, `num_tokens` in all."""
    lengths = _split(num_tokens, limits.max_model_len)
    block_size = kv_layer.shape[3]
    device = limits.device
    ends = torch.tensor([0, *lengths]).cumsum(0)
    positions = torch.cat([torch.arange(length) for length in lengths])
    width = table_width(-(-max(lengths) // block_size))
    tables = torch.zeros(len(lengths), width, dtype=torch.int32)
    return Batch(
        token_ids=torch.zeros(num_tokens, dtype=torch.int64, device=device),
        positions=positions.to(device),
        slot_mapping=torch.full((num_tokens,), -1, dtype=torch.int64, device=device),
        sample_indices=torch.arange(num_tokens - num_samples, num_tokens, device=device),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        cu_seqlens_q=ends.to(device=device, dtype=torch.int32),
        block_tables=tables.to(device),
        num_samples=num_samples,
        max_seqlen_q=max(lengths),
        is_decode=False,
    )


def _decode_batch(num_rows: int, device: torch.device) -> Batch:
    ones = torch.ones(num_rows, dtype=torch.int32, device=device)
    zeros = torch.zeros(num_rows, dtype=torch.int64, device=device)
    return Batch(
        token_ids=zeros,
        positions=zeros,
        slot_mapping=zeros - 1,
        sample_indices=None,
        seq_lens=ones,
        cu_seqlens_q=ones,
        block_tables=torch.zeros(num_rows, table_width(1), dtype=torch.int32, device=device),
        num_samples=num_rows,
        max_seqlen_q=1,
        is_decode=True,
    )


def _split(num_tokens: int, longest: int) -> list[int]:
    full, rest = divmod(num_tokens, longest)
    return [longest] * full + ([rest] if rest else [])
