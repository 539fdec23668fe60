"""Moves that go straight to the launch of an earlier one give it what the long way would."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kernels import copy_and_digest, kept_moves
from kernels.copy_and_digest import calls_of, split_of
from kernels.kept_moves import KeptMoves
from kernels.launch import Launches
from kernels.seal_digests import Places, Sums, Verdict

NUM_GIVEN, NUM_CONSTANTS = 16, 10
STREAM: Any = SimpleNamespace(cuda_stream=77)
DEVICE = torch.device("cpu")


class Kernel:
    """Compiled anew by each call that Triton makes; `launched` has those that it did not make."""

    def __init__(self) -> None:
        self.params = [
            SimpleNamespace(
                is_constexpr=index >= NUM_GIVEN, do_not_specialize=8 <= index < NUM_GIVEN
            )
            for index in range(NUM_GIVEN + NUM_CONSTANTS)
        ]
        self.compiled: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []
        self.launches = Launches(self, device=lambda: 0, stream=lambda _: 7)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return partial(self.launches, grid)

    def run(self, *args: object, grid: Any, warmup: bool, **named: object) -> Any:
        number = len(self.compiled)
        self.compiled.append((grid, args, named))
        return SimpleNamespace(
            function=1000 + number,
            packed_metadata=number,
            run=lambda *given: self.launched.append(given),
        )


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel()
    for module in (copy_and_digest, kept_moves):
        monkeypatch.setattr(module, "move_kernel", kernel)
    monkeypatch.setattr(copy_and_digest, "runs_triton", lambda _: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: STREAM)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the index of a CPU
    return kernel


def make_pools(num_parts: int) -> list[torch.Tensor]:
    return [torch.zeros((5, 40, 512), dtype=torch.uint8) for _ in range(num_parts)]


def make_places(
    *, layer_start: int = 1, num_layers: int = 2, num_positions: int = 3, first: int = 0,
    seed: int = (1 << 63) - 1, positions: torch.Tensor | None = None,
) -> Places:  # fmt: skip
    found = torch.arange(64) if positions is None else positions
    return Places(seed, layer_start, num_layers, found, num_positions, first)


def make_slot() -> torch.Tensor:
    return torch.zeros(1 << 20, dtype=torch.uint8)


def call(
    moves: KeptMoves, slot: torch.Tensor, ids: torch.Tensor, places: Places, verdict: Verdict | None
) -> Sums:
    sums = Sums(64, DEVICE)
    if verdict is None:
        moves.pack(STREAM, slot, ids, places, sums)
    else:
        moves.unpack(STREAM, slot, ids, places, sums, verdict.num_right)
    return sums


@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize("unpacks", [False, True])
def test_what_is_launched_is_what_the_long_way_would_launch(
    kernel: Kernel, num_parts: int, unpacks: bool
) -> None:
    pools = make_pools(num_parts)
    verdict = Verdict(is_pinned=False) if unpacks else None
    moves = KeptMoves(pools)
    call(moves, make_slot(), torch.arange(64), make_places(), verdict)
    assert len(kernel.compiled) == num_parts
    assert not kernel.launched
    places = make_places(layer_start=3, num_layers=1, num_positions=17, first=9, seed=1 << 31)
    slot, ids = make_slot(), torch.arange(64)
    sums = call(moves, slot, ids, places, verdict)
    num_right = None if verdict is None else verdict.num_right
    expected = calls_of(slot, pools, ids, places, sums, num_right)
    num_programs = split_of(pools, places.num_units, unpacks=unpacks).num_programs
    for number, (given, (args, _)) in enumerate(zip(kernel.launched, expected, strict=True)):
        values = [each if each is num_right else address_of(each) for each in args]
        hooks, constants = (None, None, None), (None,) * NUM_CONSTANTS
        wanted = (num_programs, 1, 1, 77, 1000 + number, number, *hooks, *values, *constants)
        assert len(given) == len(wanted)
        assert all(a is b or a == b for a, b in zip(given, wanted, strict=True))
    assert len(kernel.compiled) == num_parts


def address_of(value: Any) -> Any:
    return value.data_ptr() if isinstance(value, torch.Tensor) else value


UNUSUAL: dict[str, Any] = {
    "a slot elsewhere": {"slot": make_slot()[8:]},
    "block ids elsewhere": {"ids": torch.arange(64)[1:]},
    "positions elsewhere": {"places": make_places(positions=torch.arange(64)[1:])},
    "a narrow seed": {"places": make_places(seed=(1 << 31) - 1)},
}


@pytest.mark.parametrize("unusual", UNUSUAL)
def test_what_may_be_compiled_apart_goes_the_long_way(kernel: Kernel, unusual: str) -> None:
    moves = KeptMoves(make_pools(1))
    usual: dict[str, Any] = {"slot": make_slot(), "ids": torch.arange(64), "places": make_places()}
    call(moves, **usual, verdict=None)
    call(moves, **{**usual, **UNUSUAL[unusual]}, verdict=None)
    assert len(kernel.compiled) == 2
    call(moves, **usual, verdict=None)
    assert len(kernel.compiled) == 2
    assert kernel.launched[-1][4] == 1000, "the one that was compiled for the usual"


def test_on_another_device_than_the_pools_it_goes_the_long_way(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was compiled for this one, and its stream is this one's."""
    moves = KeptMoves(make_pools(1))
    usual: dict[str, Any] = {"slot": make_slot(), "ids": torch.arange(64), "places": make_places()}
    call(moves, **usual, verdict=None)
    entered: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_stream", entered.append)
    call(moves, **usual, verdict=None)
    assert not entered
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    call(moves, **usual, verdict=None)
    assert entered == [STREAM, STREAM], "its own, then the one before"


@pytest.mark.parametrize("positions", [62, 65])
def test_what_would_leave_the_memory_of_a_list_is_not_launched(
    kernel: Kernel, positions: int
) -> None:
    moves = KeptMoves(make_pools(1))
    call(moves, make_slot(), torch.arange(64), make_places(), None)
    places = make_places(num_layers=1, num_positions=positions, first=3)
    with pytest.raises(AssertionError):
        call(moves, make_slot(), torch.arange(64), places, None)
    assert not kernel.launched


@pytest.mark.parametrize("unpacks", [False, True])
def test_with_and_without_digests_are_kept_apart(kernel: Kernel, unpacks: bool) -> None:
    """What is launched without them writes to no sums."""
    moves = KeptMoves(make_pools(1))
    slot, ids, places = make_slot(), torch.arange(64), make_places()
    num_right = Verdict(is_pinned=False).num_right
    for sums in (Sums(64, DEVICE), None, None, Sums(64, DEVICE)):
        if unpacks:
            moves.unpack(STREAM, slot, ids, places, sums, num_right)
        else:
            moves.pack(STREAM, slot, ids, places, sums)
    assert [named["DIGESTS"] for _, _, named in kernel.compiled] == [True, False]
    assert [given[4] for given in kernel.launched] == [1001, 1000]
