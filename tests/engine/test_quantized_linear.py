"""The products of quantised matrices against float64 with the weights they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch

from cluster.errors import ConfigError
from engine.models.linear import Linear, MatrixSpec
from engine.models.quantization import ON_LOAD, Quantization
from engine.models.quantized_linear import Float8Linear, Int4Linear, matrix_factory
from engine.quantized_tensors import (
    Float8Weights,
    Int4Weights,
    dequantized,
    to_float8,
    to_int4,
)
from engine.tensor_parallel.shard import WHOLE, Shard
from engine.weight_views import by_module, fill_weights

if TYPE_CHECKING:
    from engine.models.linear import Matrix
    from engine.quantized_tensors import Weights

EPS = 1e-5
IN_SIZE, HALF, GROUP = 192, 80, 64
STATIC = Quantization(method="fp8", static_activations=True)
AWQ = Quantization(method="awq", group_size=GROUP)
INT4_SPEC = MatrixSpec({"a_proj": 80, "b_proj": 48}, IN_SIZE, False)


class Place(NamedTuple):
    device: torch.device
    dtype: torch.dtype


@pytest.fixture(
    params=[
        pytest.param(("cpu", torch.float32), id="cpu"),
        pytest.param(("cpu", torch.bfloat16), id="cpu-bfloat16"),
        pytest.param(("cuda", torch.bfloat16), id="cuda", marks=pytest.mark.gpu),
        pytest.param(("cuda", torch.float16), id="cuda-float16", marks=pytest.mark.gpu),
    ]
)
def place(request: pytest.FixtureRequest) -> Place:
    device, dtype = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    torch.manual_seed(7)
    return Place(torch.device(device), dtype)


@dataclass(frozen=True)
class Filled:
    """A matrix filled through its views, and what it must compute with, in float64."""

    matrix: Matrix
    weight: torch.Tensor
    bias: torch.Tensor


def filled(quantization: Quantization, spec: MatrixSpec, place: Place) -> Filled:
    matrix = matrix_factory(quantization, frozenset(), dtype=place.dtype, device=place.device)(spec)
    meant, biases = [], []
    for module, kinds in by_module(matrix.checkpoint_views()).items():
        weight = torch.randn(spec.parts[module], spec.in_size) / spec.in_size**0.5
        weights: Weights = to_float8(weight) if quantization.is_float8 else to_int4(weight, GROUP)
        if isinstance(weights, Int4Weights):  # scales are kept in the model's type
            scales = weights.scales.to(place.dtype).float()
            weights = Int4Weights(weights.codes, scales, weights.zeros)
        fill_weights(module, kinds, weights, WHOLE)
        bias = torch.randn(spec.parts[module]).to(place.dtype)
        if spec.bias:
            kinds["bias"].copy_(bias)
        if "input_scale" in kinds:
            kinds["input_scale"].fill_(0.01 if module == "a_proj" else 0.005)
        meant.append(dequantized(weights).double())
        biases.append(bias.double() * spec.bias)
    matrix.pack()
    return Filled(matrix, torch.cat(meant), torch.cat(biases))


def check(
    actual: torch.Tensor, expected: torch.Tensor, quantization: Quantization, place: Place
) -> None:
    """With 8-bit weights the inputs are rounded, too, to 3 bits of mantissa."""
    assert actual.dtype == place.dtype
    actual = actual.double().cpu()
    if quantization.is_float8:
        error = (actual - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert error < 0.08
        return
    allowed = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[place.dtype]
    torch.testing.assert_close(actual, expected, rtol=allowed, atol=allowed)


@pytest.mark.parametrize("quantization", [ON_LOAD, STATIC, AWQ], ids=["fp8", "fp8 static", "awq"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 5, 200])
def test_products_are_those_of_the_weights_they_stand_for(
    place: Place, quantization: Quantization, num_rows: int, bias: bool
) -> None:
    spec = MatrixSpec({"a_proj": HALF, "b_proj": HALF}, IN_SIZE, bias)
    made = filled(quantization, spec, place)
    x = torch.randn(num_rows, IN_SIZE).to(place.device, place.dtype)
    norm = torch.rand(IN_SIZE).add(0.5).to(place.device, place.dtype)
    same = partial(check, quantization=quantization, place=place)
    wide = x.double().cpu()
    expected = wide @ made.weight.T + made.bias
    same(made.matrix(x), expected)
    residual = torch.randn(num_rows, 2 * HALF).to(place.device, place.dtype)
    expected = residual.double().cpu() + expected
    same(made.matrix.add_to(x, residual.clone()), expected)
    scale = (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()
    expected = wide * scale * norm.double().cpu() @ made.weight.T + made.bias
    same(made.matrix.normed(x, norm, EPS), expected)
    gate, up = expected.chunk(2, dim=1)
    same(made.matrix.normed_silu_mul(x, norm, EPS), gate * torch.sigmoid(gate) * up)


def test_one_input_of_several_matrices_takes_the_largest_of_their_scales() -> None:
    spec = MatrixSpec({"a_proj": 16, "b_proj": 32}, 64, False)
    matrix = filled(STATIC, spec, Place(torch.device("cpu"), torch.float32)).matrix
    assert isinstance(matrix, Float8Linear)
    assert matrix.input_scale is not None
    assert matrix.input_scale.tolist() == pytest.approx([0.01])


def ordered(groups: list[torch.Tensor]) -> tuple[Matrix, torch.Tensor]:
    """Two 4-bit matrices over one input, whose groups are in these orders."""
    place = Place(torch.device("cpu"), torch.float32)
    matrix = matrix_factory(AWQ, frozenset(), dtype=place.dtype, device=place.device)(INT4_SPEC)
    meant = []
    modules = by_module(matrix.checkpoint_views()).items()
    for (module, kinds), each in zip(modules, groups, strict=True):
        plain = to_int4(torch.randn(INT4_SPEC.parts[module], IN_SIZE), GROUP)
        weights = Int4Weights(plain.codes, plain.scales, plain.zeros, each)
        fill_weights(module, kinds, weights, WHOLE)
        meant.append(weights.dequantized())
    matrix.pack()
    return matrix, torch.cat(meant)


def test_groups_in_order_of_activation_take_their_inputs_in_that_order() -> None:
    torch.manual_seed(3)
    groups = (torch.arange(IN_SIZE) // GROUP)[torch.randperm(IN_SIZE)]
    matrix, meant = ordered([groups, groups])
    x = torch.randn(4, IN_SIZE)
    torch.testing.assert_close(matrix(x), x @ meant.T, rtol=1e-4, atol=1e-4)


def test_two_orders_of_one_input_are_refused() -> None:
    groups = (torch.arange(IN_SIZE) // GROUP)[torch.randperm(IN_SIZE)]
    with pytest.raises(ConfigError, match="a_proj, b_proj order one input"):
        ordered([groups, groups.flip(0)])


@pytest.mark.parametrize(
    ("quantization", "spec", "kind"),
    [
        (None, INT4_SPEC, Linear),
        (AWQ, INT4_SPEC, Int4Linear),
        (ON_LOAD, INT4_SPEC, Float8Linear),
        (AWQ, INT4_SPEC._replace(in_size=96), Linear),  # no tile of the kernel fits
        (AWQ, MatrixSpec({"plain_proj": 16, "a_proj": 16}, IN_SIZE, False), Linear),
        (ON_LOAD, MatrixSpec({"plain_proj": 16}, IN_SIZE, False), Linear),
    ],
)
def test_the_class_follows_from_what_is_stored(
    quantization: Quantization | None, spec: MatrixSpec, kind: type
) -> None:
    make = matrix_factory(
        quantization,
        frozenset(("plain_proj",)),
        dtype=torch.bfloat16,
        device=torch.device("meta"),
    )
    assert type(make(spec)) is kind


def test_quantised_matrices_take_a_half_and_a_quarter_of_the_bytes() -> None:
    spec = MatrixSpec({"a_proj": 4096}, 4096, False)

    def num_bytes(quantization: Quantization | None) -> int:
        make = matrix_factory(
            quantization, frozenset(), dtype=torch.bfloat16, device=torch.device("meta")
        )
        return sum(view.nbytes for view in make(spec).checkpoint_views().values())

    plain = num_bytes(None)
    assert plain == 2 * 4096 * 4096
    assert num_bytes(ON_LOAD) == pytest.approx(plain / 2, rel=0.01)
    assert num_bytes(Quantization(method="gptq", group_size=128)) == pytest.approx(
        plain / 4, rel=0.06
    )


@pytest.mark.parametrize("quantization", [STATIC, AWQ], ids=["fp8", "awq"])
@pytest.mark.parametrize("name", ["q_proj", "o_proj"])
def test_two_ranks_have_a_half_of_the_same_matrix_each(
    quantization: Quantization, name: str
) -> None:
    """The rows of what feeds the heads, the columns of what joins them."""
    torch.manual_seed(5)
    out_size, in_size = 64, 4 * GROUP
    weight, module = torch.randn(out_size, in_size), f"model.layers.0.self_attn.{name}"
    rounded = to_float8(weight) if quantization.is_float8 else to_int4(weight, GROUP)
    x = torch.randn(3, in_size)
    is_by_rows = name == "q_proj"
    products = []
    for rank in range(2):
        rows, columns = (out_size // 2, in_size) if is_by_rows else (out_size, in_size // 2)
        matrix = matrix_factory(
            quantization, frozenset(), dtype=torch.float32, device=torch.device("cpu")
        )(MatrixSpec({module: rows}, columns, False))
        (kinds,) = by_module(matrix.checkpoint_views()).values()
        if isinstance(rounded, Float8Weights):
            given: Weights = Float8Weights(rounded.values, rounded.scales, torch.tensor([0.01]))
        else:
            given = rounded
        fill_weights(module, kinds, given, Shard(rank, 2))
        matrix.pack()
        products.append(matrix(x if is_by_rows else x[:, rank * columns :][:, :columns]))
    made = torch.cat(products, 1) if is_by_rows else products[0] + products[1]
    expected = x @ dequantized(rounded).T
    error = (made - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < (0.08 if quantization.is_float8 else 1e-5)


def test_ranks_cannot_share_columns_in_order_of_activation() -> None:
    module = "model.layers.0.mlp.down_proj"
    make = matrix_factory(AWQ, frozenset(), dtype=torch.float32, device=torch.device("cpu"))
    (kinds,) = by_module(make(MatrixSpec({module: 16}, 64, False)).checkpoint_views()).values()
    plain = to_int4(torch.randn(16, 128), GROUP)
    groups = (torch.arange(128) // GROUP).flip(0)
    weights = Int4Weights(plain.codes, plain.scales, plain.zeros, groups)
    with pytest.raises(ConfigError, match="which ranks cannot share"):
        fill_weights(module, kinds, weights, Shard(1, 2))


def test_shapes_that_no_8_bit_product_takes_are_widened(place: Place) -> None:
    made = filled(ON_LOAD, MatrixSpec({"a_proj": 20, "b_proj": 20}, 40, True), place)
    x = torch.randn(3, 40).to(place.device, place.dtype)
    expected = x.double().cpu() @ made.weight.T + made.bias
    allowed = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[place.dtype]
    torch.testing.assert_close(made.matrix(x).double().cpu(), expected, rtol=allowed, atol=allowed)
