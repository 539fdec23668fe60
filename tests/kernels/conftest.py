"""Where a kernel test runs: on the torch reference, on Triton's interpreter, on a GPU.

Both Triton paths and the reference are compared with a dense computation in float64 that the test
spells out, never with each other.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import torch

from kernels.dispatch import interpreted

if TYPE_CHECKING:
    from collections.abc import Iterator

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def entered(place: str) -> Iterator[torch.device]:
    """Inside, kernels over tensors of the yielded device run at `place`."""
    if place == "reference":
        yield torch.device("cpu")
    elif place == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        yield torch.device("cuda", torch.cuda.current_device())
    else:
        if torch.cuda.is_available():
            pytest.skip("kernels are compiled in this process")
        with interpreted():
            yield torch.device("cpu")


def parameters(*tails: tuple[object, ...]) -> list[object]:
    """Every place with every tail, GPU ones marked."""
    places = (
        ("reference", ()),
        ("interpreter", ()),
        ("cuda", (pytest.mark.gpu,)),
    )
    return [
        pytest.param(
            (place, *tail),
            marks=marks,
            id="-".join([place, *(str(part).removeprefix("torch.") for part in tail)]),
        )
        for place, marks in places
        for tail in tails
    ]


@pytest.fixture(params=parameters(()))
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A device of every place."""
    with entered(request.param[0]) as device:
        yield device


@pytest.fixture(params=parameters(*((dtype,) for dtype in FLOATS)))
def device_and_dtype(request: pytest.FixtureRequest) -> Iterator[tuple[torch.device, torch.dtype]]:
    """Every place with every floating type."""
    place, dtype = request.param
    with entered(place) as device:
        yield device, dtype


@pytest.fixture(params=parameters(*((dtype,) for dtype in FLOATS)))
def product_device_and_dtype(
    request: pytest.FixtureRequest,
) -> Iterator[tuple[torch.device, torch.dtype]]:
    """As `device_and_dtype` for kernels with matrix products."""
    place, dtype = request.param
    if place == "interpreter" and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies bfloat16 matrices as integers")
    with entered(place) as device:
        yield device, dtype


@pytest.fixture(scope="session")
def hopper() -> None:
    """Kernels in Gluon are for these GPUs alone."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("no Hopper GPU")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20_240)
