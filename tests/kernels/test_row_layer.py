from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
from torch.nn.functional import silu

from kernels.fp8_linear import quantize_weight
from kernels.row_layer import (
    COUNTERS,
    Heads,
    Places,
    RowMatrix,
    Transform,
    fits_row_layer,
    row_layer,
)
from tests.kernels.captured import replayed_alike
from tests.kernels.conftest import entered

if TYPE_CHECKING:
    from collections.abc import Iterator

EPS = 1e-5
BLOCK_SIZE, POSITION = 8, 77
FLOAT8 = torch.float8_e4m3fn


class Shape(NamedTuple):
    attended: int
    hidden: int
    inter: int
    heads: int
    kv_heads: int
    head_size: int

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_size


LLAMA = Shape(4096, 4096, 14336, 32, 8, 128)
# Inputs that end within a stage, fewer tiles than multiprocessors, small heads.
ODD = Shape(896, 1280, 2944, 10, 2, 64)


class Place(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    is_float8: bool


PLACES = [
    pytest.param(("reference", torch.float32, False), id="reference"),
    pytest.param(("reference", torch.float32, True), id="reference-float8"),
    *(
        pytest.param(("cuda", dtype, is_float8), marks=pytest.mark.gpu, id=f"cuda-{dtype}-{name}")
        for dtype in (torch.bfloat16, torch.float16)
        for is_float8, name in ((False, "plain"), (True, "float8"))
    ),
]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    name, dtype, is_float8 = request.param
    with entered(name) as device:
        yield Place(device, dtype, is_float8)


class Case:
    """Random weights and inputs, and what must come out in float64."""

    def __init__(self, place: Place, shape: Shape) -> None:
        self.place, self.shape = place, shape
        self.transform = Transform(
            self._matrix(shape.hidden, shape.attended),
            self._matrix(2 * shape.inter, shape.hidden),
            self._matrix(shape.hidden, shape.inter),
            self._vector(shape.hidden, around=1.0),
        )
        self.qkv = self._matrix(shape.qkv, shape.hidden)._replace(bias=self._vector(shape.qkv))
        self.next_norm = self._vector(shape.hidden, around=1.0)
        self.attended = self._vector(shape.attended)[None] * 3
        self.residual = self._vector(shape.hidden)[None]
        self.counters = torch.zeros(2, COUNTERS, dtype=torch.int32, device=place.device)
        self.counters[1] = 99

    def _vector(self, size: int, around: float = 0.0) -> torch.Tensor:
        values = around + torch.randn(size) * (0.3 if around else 1.0)
        return values.to(self.place.device, self.place.dtype)

    def _matrix(self, rows: int, columns: int) -> RowMatrix:
        weight = (torch.randn(rows, columns) / columns**0.5).to(self.place.device)
        if self.place.is_float8:
            return RowMatrix(*quantize_weight(weight))
        return RowMatrix(weight.to(self.place.dtype))

    def fits(self) -> bool:
        return fits_row_layer(self.transform, self.qkv)

    def run(self, heads: Heads | None) -> tuple[torch.Tensor, torch.Tensor]:
        # What is allocated next finds this, not zeros.
        torch.full((1 << 20,), float("nan"), device=self.place.device)
        return row_layer(
            self.attended, self.residual, self.transform, heads, EPS, self.counters[0],
            self.counters[1],
        )  # fmt: skip

    def places(self, slot: int) -> Places:
        shape, device = self.shape, self.place.device
        dtype = FLOAT8 if self.place.is_float8 else self.place.dtype
        kv_layer = torch.randn(4, 2, shape.kv_heads, BLOCK_SIZE, shape.head_size).to(device, dtype)
        angles = torch.rand(POSITION + 1, shape.head_size // 2) * 6
        scales = 0.5 + torch.rand(2, shape.kv_heads, device=device)
        return Places(
            kv_layer,
            torch.tensor([slot], device=device),
            torch.tensor([POSITION], device=device),
            torch.cat((angles.cos(), angles.sin()), dim=1).to(device),
            scales if self.place.is_float8 else None,
        )

    def expected_stream(self) -> torch.Tensor:
        output, gate_up, down, norm = self.transform
        x = wide(self.residual) + wide(self.attended) @ wide_matrix(output).T
        gate, up = (normed(x, norm) @ wide_matrix(gate_up).T).chunk(2, -1)
        return x + (silu(gate) * up) @ wide_matrix(down).T

    def expected_qkv(self) -> torch.Tensor:
        assert self.qkv.bias is not None
        x = normed(self.expected_stream(), self.next_norm)
        return x @ wide_matrix(self.qkv).T + wide(self.qkv.bias)

    def assert_close(self, actual: torch.Tensor, expected: torch.Tensor) -> None:
        actual = wide(actual).view(-1)
        assert actual.isfinite().all()
        error = (actual - expected.view(-1)).norm() / expected.norm()
        assert error.item() < max(1e-5, 2 * torch.finfo(self.place.dtype).eps)


def wide(x: torch.Tensor) -> torch.Tensor:
    return x.double().cpu()


def wide_matrix(matrix: RowMatrix) -> torch.Tensor:
    if matrix.scale is None:
        return wide(matrix.weight)
    return wide(matrix.weight.float()) * wide(matrix.scale)[:, None]


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * wide(weight)


def turned(heads: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """`[heads, head_size]` at POSITION."""
    cos, sin = wide(cos_sin)[POSITION].chunk(2)
    low, high = heads.chunk(2, dim=1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=1)


def shapes_at(place: Place) -> list[Shape]:
    return [ODD, LLAMA] if place.device.type == "cuda" else [ODD]


def test_the_stream_behind_the_last_layer(place: Place) -> None:
    for shape in shapes_at(place):
        case = Case(place, shape)
        stream, qkv = case.run(None)
        assert qkv.numel() == 0
        case.assert_close(stream, case.expected_stream())


def test_heads_of_the_next_layer_as_they_are(place: Place) -> None:
    for shape in shapes_at(place):
        case = Case(place, shape)
        stream, qkv = case.run(Heads(case.qkv, case.next_norm, None))
        case.assert_close(stream, case.expected_stream())
        case.assert_close(qkv, case.expected_qkv())


@pytest.mark.parametrize("slot", [19, -1])
def test_queries_turn_and_keys_and_values_land_in_their_slot(place: Place, slot: int) -> None:
    for shape in shapes_at(place):
        case = Case(place, shape)
        places = case.places(slot)
        before = wide(places.kv_layer.float())
        stream, qkv = case.run(Heads(case.qkv, case.next_norm, places))
        case.assert_close(stream, case.expected_stream())
        heads = case.expected_qkv().view(-1, shape.head_size)
        query, key, value = heads.split_with_sizes([shape.heads, shape.kv_heads, shape.kv_heads])
        queries = qkv[0, : shape.heads * shape.head_size]
        case.assert_close(queries, turned(query, places.cos_sin))
        after = wide(places.kv_layer.float())
        if slot >= 0:
            stored = after[slot // BLOCK_SIZE, :, :, slot % BLOCK_SIZE]
            new = torch.stack((turned(key, places.cos_sin), value))
            if places.kv_scales is not None:
                new /= wide(places.kv_scales)[:, :, None]
            error = (stored - new).norm() / new.norm()
            assert error.item() < (0.04 if place.is_float8 else 0.02)
            before[slot // BLOCK_SIZE, :, :, slot % BLOCK_SIZE] = stored
        assert torch.equal(after, before)


@pytest.mark.gpu
@pytest.mark.parametrize("is_float8", [False, True])
def test_layers_in_a_graph_find_their_counters_clean(is_float8: bool) -> None:
    """Programs that meet too early would read what is not there yet."""
    with entered("cuda") as device:
        place = Place(device, torch.bfloat16, is_float8)
        layers = [Case(place, ODD) for _ in range(6)]
        counters = torch.zeros(len(layers), COUNTERS, dtype=torch.int32, device=device)
        assert layers[0].fits()

        def run() -> torch.Tensor:
            stream, attended = layers[0].residual, layers[0].attended
            for index, layer in enumerate(layers):
                heads = Heads(layer.qkv, layer.next_norm, None)
                stream, qkv = row_layer(
                    attended, stream, layer.transform, heads, EPS, counters[index],
                    counters[index - 1],
                )  # fmt: skip
                attended = qkv[:, : ODD.attended]
            return stream

        replayed_alike(run, times=20)


@pytest.mark.gpu
def test_no_kernel_for_a_bias_behind_attention() -> None:
    with entered("cuda") as device:
        case = Case(Place(device, torch.bfloat16, False), ODD)
        assert case.fits()
        down = case.transform.down._replace(bias=case.residual[0])
        case.transform = case.transform._replace(down=down)
        assert not case.fits()


def test_no_kernel_on_a_cpu() -> None:
    assert not Case(Place(torch.device("cpu"), torch.bfloat16, False), ODD).fits()
