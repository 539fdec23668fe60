"""How much GPU memory steps take beside weights and KV: the largest of each kind are run.

1. On a pool of one block, which stands in for the real one: a step of as many prompts as there
   are rows, all sampled with everything a request can ask for; the last chunk of the longest
   context; a decode step of all rows.
2. The largest decode graph is captured on that pool, and thrown away.
3. What torch's allocator had to reserve for all that, unused parts of its segments included,
   is what serving will reserve again. Kernels compiled on the way stay compiled.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import torch

from cluster.prefix_hash import root_hash
from cluster.request import SamplingParams, SequenceRequest
from cluster.startup import StartupReport
from engine.cuda_graphs import capture_sizes
from engine.sequence import Sequence
from engine.warm_up import decode_batch, prefill_batch, run_batch

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.kv_cache import KVCache
    from engine.limits import EngineLimits
    from engine.model_runner import ModelRunner
    from engine.models.decoder import Decoder
    from engine.sampler import Sampler

# What the driver keeps of the two graphs of a size, measured on an H200 with 32 layers.
_DRIVER_BYTES_OF_SIZE = 3 << 20
_BUSIEST = SamplingParams(
    max_tokens=2,
    seed=0,
    top_p=0.9,
    top_k=50,
    repetition_penalty=1.1,
    presence_penalty=0.1,
    logit_bias=((0, 1.0),),
    num_logprobs=20,
    ignore_eos=True,
)


def measure_workspace(
    decoder: Decoder,
    one_block: KVCache,
    limits: EngineLimits,
    sampler: Sampler | None,
    build_runner: Callable[[KVCache], ModelRunner] | None,
) -> int:
    """Bytes of the GPU. `sampler`: None on a rank that draws nothing. `build_runner`: None if
    nothing is captured. All ranks of a model call this together."""
    device = limits.device
    begun = _reserved(device)
    run_largest_steps(decoder, one_block, limits, sampler)
    further = 0
    if build_runner is not None:
        further = _capture_largest(build_runner(one_block), decoder, limits)
    torch.cuda.synchronize(device)
    needed = torch.cuda.max_memory_reserved(device) - begun + further
    gc.collect()  # graphs hold their memory until they are gone
    torch.cuda.empty_cache()
    return needed


def _reserved(device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_reserved(device)


def run_largest_steps(
    decoder: Decoder, one_block: KVCache, limits: EngineLimits, sampler: Sampler | None
) -> None:
    kv_layer, most = one_block.layers[0], limits.max_num_batched_tokens
    num_rows = min(limits.max_num_seqs, most)
    logits = run_batch(decoder, prefill_batch(most, kv_layer, limits, num_rows=num_rows), kv_layer)
    if sampler is not None and logits is not None:
        sampler.sample(logits, [_sequence(row) for row in range(num_rows)])
    del logits
    chunk = min(most, limits.max_model_len)
    context = prefill_batch(chunk, kv_layer, limits, context=limits.max_model_len - chunk)
    run_batch(decoder, context, kv_layer)
    run_batch(decoder, decode_batch(limits.max_num_seqs, limits.device), kv_layer)


def _capture_largest(runner: ModelRunner, decoder: Decoder, limits: EngineLimits) -> int:
    """Returns what the other graphs add: they reuse the memory of the largest, but for their
    results, which each keeps."""
    largest, *others = sorted(capture_sizes(limits.max_graph_rows), reverse=True)
    runner.capture_graphs(StartupReport(sink=lambda fact: None), [largest])
    kept = sum(others) * decoder.config.hidden_size * limits.dtype.itemsize
    return kept + _DRIVER_BYTES_OF_SIZE * (1 + len(others))


def _sequence(row: int) -> Sequence:
    """One that asks for everything."""
    request = SequenceRequest(
        sequence_id=f"workspace {row}",
        request_id="workspace",
        prompt_token_ids=(0,),
        sampling=_BUSIEST,
    )
    return Sequence(request, block_size=1, root=root_hash("workspace", b""))
