from __future__ import annotations

import pytest
import torch

from kernels.int4_packing import (
    Int4Weight,
    UnsupportedInt4Error,
    dequantize,
    pack_codes,
    unpack_codes,
)

OUT, IN, GROUP = 48, 192, 64


def random_codes() -> torch.Tensor:
    return torch.randint(0, 16, (OUT, IN), dtype=torch.uint8)


def random_groups() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(IN // GROUP, OUT) + 0.1, torch.randint(1, 16, (IN // GROUP, OUT))


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


def test_the_reference_is_the_matrix_that_codes_scales_and_zeros_say() -> None:
    codes = random_codes()
    scales, zeros = random_groups()
    weight = pack_codes(codes, scales, zeros, dtype=torch.float32)
    groups = torch.arange(IN) // GROUP
    expected = (codes.float() - zeros.float()[groups].t()) * scales[groups].t()
    torch.testing.assert_close(dequantize(weight), expected)


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
