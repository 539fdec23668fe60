"""The four products of a matrix against float64, packed and plain."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from engine.models.linear import Linear, MatrixSpec

EPS = 1e-5
IN_SIZE, HALF = 48, 40
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

Layout = tuple[torch.device, torch.dtype, bool]


@pytest.fixture(
    params=[
        pytest.param(("cpu", torch.float32, True), id="cpu-packed"),
        pytest.param(("cpu", torch.float32, False), id="cpu-plain"),
        pytest.param(("cpu", torch.bfloat16, True), id="cpu-packed-bfloat16"),
        pytest.param(("cuda", torch.bfloat16, True), id="cuda", marks=pytest.mark.gpu),
    ]
)
def layout(request: pytest.FixtureRequest) -> Layout:
    device, dtype, packs = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    torch.manual_seed(7)
    return torch.device(device), dtype, packs


def filled(spec: MatrixSpec, layout: Layout) -> tuple[Linear, torch.Tensor, torch.Tensor]:
    """A matrix filled through its views, and what it must compute with, in float64."""
    device, dtype, packs = layout
    matrix = Linear.empty(spec, dtype=dtype, device=device)
    weights, biases = [], []
    for name, rows in spec.parts.items():
        weight = (torch.randn(rows, spec.in_size) / spec.in_size**0.5).to(dtype)
        bias = torch.randn(rows).to(dtype) if spec.bias else torch.zeros(rows)
        views = matrix.checkpoint_views()
        views[f"{name}.weight"].copy_(weight)
        if spec.bias:
            views[f"{name}.bias"].copy_(bias)
        weights.append(weight.double())
        biases.append(bias.double())
    if packs:
        matrix.pack()
    return matrix, torch.cat(weights), torch.cat(biases)


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.double().cpu()
    scale = (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()
    return wide * scale * weight.double().cpu()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 5, 200])
def test_products_are_those_of_the_merged_weights(
    layout: Layout, num_rows: int, bias: bool
) -> None:
    device, dtype, _ = layout
    spec = MatrixSpec({"mlp.gate_proj": HALF, "mlp.up_proj": HALF}, IN_SIZE, bias)
    matrix, weight, offset = filled(spec, layout)
    x = torch.randn(num_rows, IN_SIZE).to(device, dtype)
    norm = torch.rand(IN_SIZE).add(0.5).to(device, dtype)
    close = partial(torch.testing.assert_close, rtol=TOLERANCE[dtype], atol=2 * TOLERANCE[dtype])

    close(matrix(x).double().cpu(), x.double().cpu() @ weight.T + offset)
    expected = normed(x, norm) @ weight.T + offset
    close(matrix.normed(x, norm, EPS).double().cpu(), expected)
    gate, up = expected.chunk(2, dim=1)
    activated = gate * torch.sigmoid(gate) * up
    close(matrix.normed_silu_mul(x, norm, EPS).double().cpu(), activated)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_rows", [1, 5, 200])
def test_a_product_is_added_to_the_stream(layout: Layout, num_rows: int, bias: bool) -> None:
    device, dtype, _ = layout
    matrix, weight, offset = filled(MatrixSpec({"o_proj": 64}, IN_SIZE, bias), layout)
    x = torch.randn(num_rows, IN_SIZE).to(device, dtype)
    residual = torch.randn(num_rows, 64).to(device, dtype)
    expected = residual.double().cpu() + x.double().cpu() @ weight.T + offset
    actual = matrix.add_to(x, residual)
    assert actual.is_contiguous()
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual.double().cpu(), expected, rtol=tolerance, atol=2 * tolerance)


def test_views_cover_the_whole_matrix_under_the_names_of_the_checkpoint() -> None:
    spec = MatrixSpec({"a.q_proj": 3, "a.k_proj": 2, "a.v_proj": 1}, 4, bias=True)
    matrix = Linear.empty(spec, dtype=torch.float32, device=torch.device("cpu"))
    shapes = {name: tuple(view.shape) for name, view in matrix.checkpoint_views().items()}
    assert shapes == {
        "a.q_proj.weight": (3, 4),
        "a.q_proj.bias": (3,),
        "a.k_proj.weight": (2, 4),
        "a.k_proj.bias": (2,),
        "a.v_proj.weight": (1, 4),
        "a.v_proj.bias": (1,),
    }
    for number, view in enumerate(matrix.checkpoint_views().values()):
        view.fill_(number)
    assert matrix.weight[:, 0].tolist() == [0, 0, 0, 2, 2, 4]
    assert matrix.bias is not None
    assert matrix.bias.tolist() == [1, 1, 1, 3, 3, 5]
