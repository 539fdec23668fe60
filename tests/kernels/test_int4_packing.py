from __future__ import annotations

import pytest
import torch

from kernels.int4_packing import (
    Int4Weight,
    UnsupportedInt4Error,
    dequantize,
    pack_awq,
    pack_codes,
    pack_gptq,
    unpack_codes,
)

OUT, IN, GROUP = 48, 192, 64
AWQ_BITS = (0, 2, 4, 6, 1, 3, 5, 7)


def random_codes() -> torch.Tensor:
    return torch.randint(0, 16, (OUT, IN), dtype=torch.uint8)


def random_groups() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(IN // GROUP, OUT) + 0.1, torch.randint(1, 16, (IN // GROUP, OUT))


def packed_rows(codes: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """Eight codes along the last dimension to an int32: code order[i] into bits 4i."""
    eights = codes.contiguous().long().view(*codes.shape[:-1], -1, 8)
    words = sum((eights[..., code] << 4 * place) for place, code in enumerate(order))
    assert isinstance(words, torch.Tensor)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def expected_matrix(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, groups: torch.Tensor
) -> torch.Tensor:
    return (codes.float() - zeros.float()[groups].t()) * scales[groups].t()


def test_packing_keeps_every_code() -> None:
    codes = random_codes()
    scales, zeros = random_groups()
    weight = pack_codes(codes, scales, zeros, dtype=torch.float32)
    assert (weight.out_size, weight.in_size, weight.group_size) == (OUT, IN, GROUP)
    assert torch.equal(unpack_codes(weight), codes)


def test_a_threads_words_are_its_part_of_the_operand() -> None:
    codes = random_codes()
    scales, zeros = random_groups()
    weight = pack_codes(codes, scales, zeros, dtype=torch.float32)
    tile_out, tile_in, g, t = 2, 1, 5, 3
    words = weight.codes[tile_out, tile_in].view(8, 4, 4)[g, t].tolist()
    for place, (half_in, half_out) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        row = 16 * tile_out + 8 * half_out + g
        first = 64 * tile_in + 32 * half_in + 8 * t
        for i in range(8):
            assert words[place] >> 4 * (i // 2) + 16 * (i % 2) & 15 == codes[row, first + i]


def test_awq() -> None:
    codes = random_codes()
    scales, zeros = random_groups()
    weight = pack_awq(
        packed_rows(codes.t(), AWQ_BITS), packed_rows(zeros, AWQ_BITS), scales, dtype=torch.float32
    )
    groups = torch.arange(IN) // GROUP
    torch.testing.assert_close(dequantize(weight), expected_matrix(codes, scales, zeros, groups))


@pytest.mark.parametrize("less_one", [True, False])
def test_gptq(less_one: bool) -> None:
    codes = random_codes()
    scales, zeros = random_groups()
    weight = pack_gptq(
        packed_rows(codes, tuple(range(8))).t(),
        packed_rows(zeros - int(less_one), tuple(range(8))),
        scales,
        dtype=torch.float32,
        zeros_less_one=less_one,
    )
    assert weight.order is None
    groups = torch.arange(IN) // GROUP
    torch.testing.assert_close(dequantize(weight), expected_matrix(codes, scales, zeros, groups))


def test_gptq_with_act_order() -> None:
    codes = random_codes()
    scales, zeros = random_groups()
    groups = (torch.arange(IN) // GROUP)[torch.randperm(IN)]
    weight = pack_gptq(
        packed_rows(codes, tuple(range(8))).t(),
        packed_rows(zeros - 1, tuple(range(8))),
        scales,
        groups.int(),
        dtype=torch.float32,
    )
    assert weight.order is not None
    expected = expected_matrix(codes, scales, zeros, groups)[:, weight.order]
    torch.testing.assert_close(dequantize(weight), expected)


def test_groups_of_unequal_size_are_refused() -> None:
    scales, zeros = random_groups()
    with pytest.raises(UnsupportedInt4Error, match="different sizes"):
        pack_gptq(
            packed_rows(random_codes(), tuple(range(8))).t(),
            packed_rows(zeros - 1, tuple(range(8))),
            scales,
            torch.zeros(IN, dtype=torch.int32),
            dtype=torch.float32,
        )


@pytest.mark.parametrize(
    ("out_size", "in_size", "groups"), [(24, 128, 1), (32, 96, 1), (32, 96, 6)]
)
def test_shapes_that_do_not_tile_are_refused(out_size: int, in_size: int, groups: int) -> None:
    codes = torch.zeros(out_size, in_size, dtype=torch.uint8)
    table = torch.ones(groups, out_size)
    with pytest.raises(UnsupportedInt4Error):
        pack_codes(codes, table, table, dtype=torch.float32)


def test_packed_weights_take_half_a_byte() -> None:
    scales, zeros = random_groups()
    weight: Int4Weight = pack_codes(random_codes(), scales, zeros, dtype=torch.bfloat16)
    assert weight.codes.nbytes == OUT * IN // 2
