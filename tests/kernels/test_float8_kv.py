"""KV in float8_e4m3fn: what is stored, and what the CPU reference reads of it."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.dispatch import runs_triton
from kernels.paged_attention import paged_attention
from kernels.prefill_attention import prefill_attention
from kernels.rope_store import FLOAT8_MAX, rope_store
from tests.kernels.paged import PagedCase, assert_attention_close, paged_case

FLOAT8 = torch.float8_e4m3fn
Place = tuple[torch.device, torch.dtype]


def is_interpreted(tensor: torch.Tensor) -> bool:
    """The interpreter loses the carry where float8 rounds up to a power of two."""
    return runs_triton(tensor) and not tensor.is_cuda


def stored(key: torch.Tensor, value: torch.Tensor, kv_scales: torch.Tensor) -> torch.Tensor:
    """Both sides as float32 `[2, num_tokens, heads, head_size]`, from slots in reverse order."""
    num_tokens, heads, head_size = key.shape
    kv_layer = torch.full((num_tokens, 2, heads, 1, head_size), math.nan, device=key.device)
    kv_layer = kv_layer.to(FLOAT8)
    slots = torch.arange(num_tokens, device=key.device).flip(0)
    store(key, value, kv_layer, slots, kv_scales)
    return kv_layer.squeeze(3).float().flip(0).transpose(0, 1)


def store(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_layer: torch.Tensor,
    slots: torch.Tensor,
    kv_scales: torch.Tensor,
) -> None:
    """At position 0, where nothing turns; key and value are behind one query head."""
    head_size = key.shape[2]
    qkv = torch.cat((key[:, :1], key, value), dim=1).view(len(slots), -1)
    cos_sin = torch.cat((torch.ones(1, head_size // 2), torch.zeros(1, head_size // 2)), dim=1)
    positions = torch.zeros_like(slots)
    rope_store(qkv, kv_layer, slots, positions, cos_sin.to(key.device), kv_scales=kv_scales)


@pytest.mark.parametrize("num_tokens", [1, 5])
def test_tokens_are_stored_divided_by_the_scale_of_their_head(
    device_and_dtype: Place, num_tokens: int
) -> None:
    device, dtype = device_and_dtype
    key, value = torch.randn(2, num_tokens, 3, 48).to(device, dtype)
    kv_scales = (0.01 + torch.rand(2, 3)).to(device)
    exact = torch.stack((key, value)).float() / kv_scales[:, None, :, None]
    # Half a step of a 3-bit mantissa; below 2**-6 steps stay the same.
    step = exact.abs().clamp(min=2.0**-6) * (0.51 if is_interpreted(key) else 2.0**-4)
    error = (stored(key, value, kv_scales) - exact).abs()
    assert (error <= step * 1.0001).all()


def test_what_would_overflow_is_saturated(device: torch.device) -> None:
    key = torch.tensor([1e4, -1e4, 448.0, -449.0, 1e38, 460.0, 0.0, 1.0], device=device)
    key = key.view(1, 1, 8).repeat(1, 1, 2)
    result = stored(key, -key, torch.ones(2, 1, device=device))
    expected = key.clamp(-FLOAT8_MAX, FLOAT8_MAX).squeeze(0)
    assert torch.equal(result[0].squeeze(0), expected)
    assert torch.equal(result[1].squeeze(0), -expected)


def test_not_a_number_does_not_become_one(device: torch.device) -> None:
    key = torch.full((1, 1, 16), math.nan, device=device)
    if is_interpreted(key):
        pytest.skip("the interpreter converts NaN to 384")
    assert stored(key, key, torch.ones(2, 1, device=device)).isnan().all()


def test_padding_is_not_stored(device: torch.device) -> None:
    key = torch.randn(2, 1, 16, device=device)
    kv_layer = torch.zeros(2, 2, 1, 1, 16, device=device).to(FLOAT8)
    slots = torch.tensor([-1, 1], device=device)
    store(key, key, kv_layer, slots, torch.ones(2, 1, device=device))
    assert not kv_layer[0].float().any()
    assert kv_layer[1].float().any()


@pytest.mark.parametrize("window", [None, 20])
def test_decode_multiplies_what_it_reads_by_its_scales(
    product_device_and_dtype: Place, window: int | None
) -> None:
    device, dtype = product_device_and_dtype
    lengths = [1, 15, 16, 17, 63, 900]
    case = paged_case(
        [1] * len(lengths),
        lengths,
        heads=(4, 2),
        head_size=32,
        dtype=dtype,
        device=device,
        is_float8=True,
    )
    assert_attention_close(decoded(case, window), case.expected(window))


@pytest.mark.parametrize("head_size", [16, 80, 128, 256])
@pytest.mark.parametrize("heads", [(2, 2), (20, 1)])
def test_decode_reads_heads_of_all_sizes(
    device: torch.device, head_size: int, heads: tuple[int, int]
) -> None:
    case = paged_case(
        [1, 1],
        [70, 9],
        heads=heads,
        head_size=head_size,
        dtype=torch.float32,
        device=device,
        block_size=32,
        is_float8=True,
    )
    assert_attention_close(decoded(case), case.expected())


def decoded(case: PagedCase, window: int | None = None) -> torch.Tensor:
    return paged_attention(
        case.query,
        case.kv_layer,
        case.block_tables,
        case.seq_lens,
        scale=case.scale,
        out=case.poisoned_out(),
        sliding_window=window,
        kv_scales=case.kv_scales,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefill_on_the_cpu_multiplies_what_it_reads_by_its_scales(dtype: torch.dtype) -> None:
    case = paged_case(
        [3, 1, 33, 70, 16],
        [3, 40, 33, 200, 90],
        heads=(4, 2),
        head_size=32,
        dtype=dtype,
        device=torch.device("cpu"),
        is_float8=True,
    )
    out = prefill_attention(
        case.query, case.kv_layer, case.block_tables, case.cu_seqlens_q, case.seq_lens,
        max_seqlen_q=70, scale=case.scale, out=case.poisoned_out(), kv_scales=case.kv_scales,
    )  # fmt: skip
    assert_attention_close(out, case.expected())
