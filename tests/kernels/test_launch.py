"""Kernels are launched directly, and never what was compiled for other arguments."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels.dispatch import jit, jit_for_any, tl
from kernels.gluon_api import HAS_GLUON, in_blocks
from kernels.launch import Launches, read, width_of_int

triton = pytest.importorskip("triton")

ADDRESSES = torch.zeros(64, dtype=torch.int64)
SAMPLES = [
    *(0, 1, 2, 15, 16, 17, -1, -16, 4096, 2**31 - 1, 2**31, 2**31 + 1, -(2**31), -(2**31) - 1),
    *(2**32, 2**63 - 1, 2**63, 2**63 + 16, -(2**63), True, False, 0.0, 1.0, 0.5, None),
    *((), (1, 16), (1, 17), (True, 16), (None,), (ADDRESSES,), (ADDRESSES[1:],)),
    *(ADDRESSES, ADDRESSES[1:], ADDRESSES[2:], ADDRESSES.view(torch.float64), ADDRESSES.int()),
]  # fmt: skip


def kind(value: object) -> object:
    return read((value,))[0][0]


def test_what_triton_compiles_apart_is_told_apart() -> None:
    """Also what it may begin to compile apart: a kind is never coarser than a specialization."""
    specialize = pytest.importorskip("triton._C.libtriton").native_specialize_impl
    compiler = pytest.importorskip("triton.compiler.compiler")
    target = pytest.importorskip("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    backend = compiler.make_backend(target)
    for one, other in itertools.combinations(SAMPLES, 2):
        for for_any, on_alignment in itertools.product((True, False), repeat=2):
            flags = (False, for_any, on_alignment)
            if specialize(backend, one, *flags) != specialize(backend, other, *flags):
                assert kind(one) != kind(other), (one, other)


def test_of_integers_for_all_values_of_which_a_kernel_is_compiled_the_width_is_told_apart() -> None:
    specialize = pytest.importorskip("triton._C.libtriton").native_specialize_impl
    compiler = pytest.importorskip("triton.compiler.compiler")
    target = pytest.importorskip("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    backend = compiler.make_backend(target)
    integers = [value for value in SAMPLES if type(value) is int]
    for one, other in itertools.combinations(integers, 2):
        for on_alignment in (True, False):
            flags = (False, False, on_alignment)
            if specialize(backend, one, *flags) != specialize(backend, other, *flags):
                assert width_of_int(one) != width_of_int(other), (one, other)


def test_an_integer_that_a_kernel_is_compiled_for_any_of_compiles_nothing_anew() -> None:
    world = World()
    world.params[2].do_not_specialize = True
    world.launches = Launches(world, device=lambda: 0, stream=lambda _: 100)
    first, second = torch.zeros(16), torch.zeros(16)
    for value in (32, 33, 1, 0, -5):
        world.launches((3,), first, second, value, SIZE=8)
    assert len(world.compiled) == 1
    assert [given[-3] for _, given in world.launched] == [33, 1, 0, -5]
    world.launches((3,), first, second, 2**31, SIZE=8)
    assert len(world.compiled) == 2


@pytest.mark.skipif(not HAS_GLUON, reason="no Gluon here")
def test_matrices_in_blocks_are_told_apart_by_type_and_block_alone() -> None:
    matrix, other = torch.zeros(64, 64).half(), torch.zeros(32, 128).half()
    blocks = in_blocks(matrix, 16, 64)
    kinds, values = read((blocks,))
    assert values[0] is blocks
    assert kinds[0] == kind(in_blocks(other, 16, 64))
    assert kinds[0] != kind(in_blocks(matrix, 32, 64))
    assert kinds[0] != kind(in_blocks(matrix.bfloat16(), 16, 64))


def test_the_value_of_a_tensor_on_the_host_is_left_to_the_launcher_to_judge() -> None:
    assert read((ADDRESSES,))[1][0] is ADDRESSES


class World:
    """A kernel of two tensors, an integer and two constants, and what is launched of it."""

    def __init__(self, constants: tuple[bool, ...] = (False, False, False, True, True)) -> None:
        self.params = [SimpleNamespace(is_constexpr=each) for each in constants]
        self.compiled: list[Any] = []
        self.launched: list[tuple[int, tuple[object, ...]]] = []
        self.device = 0
        self.launches = Launches(
            self, device=lambda: self.device, stream=lambda device: 100 + device
        )

    def run(self, *args: object, grid: Any, warmup: bool, **named: object) -> Any:
        """Triton's: compiles anew each time."""
        assert not warmup
        number = len(self.compiled)
        self.compiled.append((grid, args, named))
        return SimpleNamespace(
            function=1000 + number,
            packed_metadata=("packed", number),
            run=lambda *given: self.launched.append((number, given)),
        )


def test_a_call_like_an_earlier_one_goes_to_what_was_compiled_for_that() -> None:
    world = World()
    first, second = torch.zeros(16), torch.zeros(16)
    world.launches((3,), first, second, 32, SIZE=8, num_warps=4)
    assert world.compiled == [((3,), (first, second, 32), {"SIZE": 8, "num_warps": 4})]
    assert not world.launched
    world.launches((5, 2), second, first, 48, SIZE=8, num_warps=4)
    assert len(world.compiled) == 1
    hooks = (None, None, None)
    given = (5, 2, 1, 100, 1000, ("packed", 0), *hooks, second, first, 48, None, None)
    assert len(world.launched) == 1
    assert world.launched[0][0] == 0
    assert all(
        got is want or got == want for got, want in zip(world.launched[0][1], given, strict=True)
    )


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ((torch.zeros(16)[1:], torch.zeros(16), 32), {"SIZE": 8}),
        ((torch.zeros(16).int(), torch.zeros(16), 32), {"SIZE": 8}),
        ((None, torch.zeros(16), 32), {"SIZE": 8}),
        ((torch.zeros(16), torch.zeros(16), 33), {"SIZE": 8}),
        ((torch.zeros(16), torch.zeros(16), 1), {"SIZE": 8}),
        ((torch.zeros(16), torch.zeros(16), 2**31), {"SIZE": 8}),
        ((torch.zeros(16), torch.zeros(16), 32), {"SIZE": 16}),
        ((torch.zeros(16), torch.zeros(16), 32), {"SIZE": 8, "launch_pdl": True}),
        ((torch.zeros(16), torch.zeros(16), 32), {"OTHER": 8}),
    ],
)
def test_a_call_unlike_all_earlier_ones_is_tritons(
    args: tuple[Any, ...], named: dict[str, Any]
) -> None:
    world = World()
    world.launches((3,), torch.zeros(16), torch.zeros(16), 32, SIZE=8)
    world.launches((3,), *args, **named)
    assert len(world.compiled) == 2
    world.launches((3,), *args, **named)
    assert len(world.compiled) == 2
    assert [number for number, _ in world.launched] == [1]


def test_each_device_has_its_own_compiled_kernel_and_stream() -> None:
    world = World()
    args = (torch.zeros(16), torch.zeros(16), 32)
    for device in (0, 1, 0, 1):
        world.device = device
        world.launches((3,), *args, SIZE=8)
    assert len(world.compiled) == 2
    assert [(number, given[3]) for number, given in world.launched] == [(0, 100), (1, 101)]


@pytest.mark.parametrize(
    ("constants", "args"),
    [
        ((False, False, False, True, True), (torch.zeros(4), torch.zeros(4), 32, 8)),
        ((False, False, False, True, True), (torch.zeros(4), torch.zeros(4))),
        ((False, True, False, False, True), (torch.zeros(4), torch.zeros(4), 32)),
        ((False, False, False, True, True), (torch.zeros(4), torch.zeros(4), "strange")),
        ((False, False, False, True, True), (torch.zeros(4), ("strange",), 32)),
    ],
)
def test_a_call_that_cannot_be_read_stays_tritons(
    constants: tuple[bool, ...], args: tuple[Any, ...]
) -> None:
    world = World(constants)
    for _ in range(2):
        world.launches((3,), *args, SIZE=8)
    assert len(world.compiled) == 2
    assert not world.launched


def test_what_an_unknown_triton_returns_is_not_launched() -> None:
    world = World()
    world.run = lambda *args, grid, warmup, **named: world.compiled.append(args)  # type: ignore[method-assign]
    for _ in range(2):
        world.launches((3,), torch.zeros(4), torch.zeros(4), 32, SIZE=8)
    assert len(world.compiled) == 2


def test_all_kernels_are_launched_directly_where_they_are_compiled() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = subprocess.run(
        [sys.executable, "-m", "tests.kernels.launched"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    unreadable, direct, kinds, calls = child.stdout.splitlines() or [child.stderr] * 4
    assert unreadable == ""
    assert direct == "True", child.stderr
    assert kinds == "True False JITFunction"
    assert calls == "['triton', (2, 3, 1, 7, 5), 'triton']"


@jit
def _shift_kernel(
    x_ptr: tl.tensor, y_ptr: tl.tensor, size: tl.tensor, step: tl.tensor, factor: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """y[i] = factor * x[i] + step."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    y = tl.load(x_ptr + place, mask=mask, other=0.0) * factor
    tl.store(y_ptr + place, y + step * 1.0, mask=mask)


@jit_for_any("size", "step")
def _shift_any_kernel(
    x_ptr: tl.tensor, y_ptr: tl.tensor, size: tl.tensor, step: tl.tensor, factor: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    y = tl.load(x_ptr + place, mask=mask, other=0.0) * factor
    tl.store(y_ptr + place, y + step * 1.0, mask=mask)


def shifts(kernel: Any, x: torch.Tensor, begin: int, size: int, step: int, factor: float) -> None:
    """Of elements from begin on, so that addresses are multiples of 16 or not."""
    y = torch.full_like(x, -1.0)
    kernel[(-(-size // 64), 1)](
        x[begin:], y[begin:], size, step, factor, BLOCK=64, num_warps=2, launch_pdl=True
    )
    expected = torch.full_like(x, -1.0)
    expected[begin : begin + size] = factor * x[begin : begin + size] + float(step)
    assert torch.equal(y, expected), (begin, size, step, factor)


@pytest.mark.gpu
def test_each_launch_takes_its_own_arguments() -> None:
    """Mixed, and twice: what was compiled for one call must not answer another one."""
    x = torch.arange(4096, dtype=torch.float32, device="cuda")
    cases = itertools.product((0, 1, 4, 7), (1, 16, 17, 640), (1, 0, 16, 3, -16, 2**40), (0.5, 2.0))
    for begin, size, step, factor in list(cases) * 2:
        for kernel in (_shift_kernel, _shift_any_kernel):
            shifts(kernel, x, begin, size, step, factor)


@pytest.mark.gpu
def test_a_launch_takes_the_current_stream_and_can_be_captured() -> None:
    x, y = torch.ones(64, device="cuda"), torch.zeros(64, device="cuda")

    def run(factor: float) -> None:
        _shift_kernel[(1,)](x, y, 64, 16, factor, BLOCK=64, num_warps=2)

    run(1.0)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        run(2.0)
    assert y[0] == 17.0
    graph.replay()
    assert y[0] == 18.0


@pytest.mark.gpu
def test_a_tensor_on_the_host_is_refused_each_time() -> None:
    y = torch.zeros(64, device="cuda")
    for x in (torch.ones(64, device="cuda"), torch.ones(64), torch.ones(64)):
        if x.is_cuda:
            _shift_kernel[(1,)](x, y, 64, 16, 1.0, BLOCK=64)
        else:
            with pytest.raises(ValueError, match="cpu tensor"):
                _shift_kernel[(1,)](x, y, 64, 16, 1.0, BLOCK=64)
    torch.cuda.synchronize()
