"""Moves between the blocks of one pool and slots, launched with little more than the driver's call.

`pack_and_seal` and `unpack_and_check` find out at each call what to launch: for twenty arguments
that is a third of a launch. A node moves blocks of one pool, and frames differ in a slot, lists,
places and numbers.

Life of a launch here
    1. The first of a kind goes the long way, and how the kernel was launched is kept.
    2. All later ones go straight there, if what a kernel is compiled for is as it was: lists and
       slots begin at multiples of 16 bytes, the seed is wider than 31 bits, and the current device
       is that of the pool.
    3. Others go the long way again, as do all where the kernel is not launched directly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from kernels.block_digest import multipliers_of
from kernels.copy_and_digest import (
    calls_of,
    check_extents,
    move_kernel,
    numbers_of,
    pack_and_seal,
    split_of,
    unpack_and_check,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kernels.launch import KeptLaunch
    from kernels.seal_digests import Places, Sums


class KeptMoves:
    """Of `pools`, as `pack_and_seal` has them. Both methods want what that function and
    `unpack_and_check` want, and do the same on `stream`."""

    def __init__(self, pools: Sequence[torch.Tensor]) -> None:
        self._pools = pools
        self._device_index = pools[0].device.index
        self._addresses = [pool.data_ptr() for pool in pools]
        num_words = len(pools) * pools[0].shape[2] // 4
        self._multipliers = multipliers_of(num_words, pools[0].device)
        self._kept: dict[tuple[bool, bool], list[KeptLaunch]] = {}  # of a kind; one for each part

    def pack(
        self,
        stream: torch.cuda.Stream,
        slot: torch.Tensor,
        block_ids: torch.Tensor,
        places: Places,
        sums: Sums | None,
    ) -> None:
        self._move(stream, _Move(slot, block_ids, places, sums, None))

    def unpack(
        self,
        stream: torch.cuda.Stream,
        slot: torch.Tensor,
        block_ids: torch.Tensor,
        places: Places,
        sums: Sums | None,
        num_right: torch.Tensor,
    ) -> None:
        self._move(stream, _Move(slot, block_ids, places, sums, num_right))

    def _move(self, stream: torch.cuda.Stream, move: _Move) -> None:
        is_usual = move.is_usual() and torch.cuda.current_device() == self._device_index
        kept = self._kept.get(move.kind()) if is_usual else None
        if kept:
            self._launch(kept, stream, move)
            return
        self._go_the_long_way(stream, move)
        if is_usual:
            self._kept[move.kind()] = _launches_of(calls_of(move.slot, self._pools, *move[1:]))

    def _launch(self, kept: list[KeptLaunch], stream: torch.cuda.Stream, move: _Move) -> None:
        slot, block_ids, places, sums, num_right = move
        check_extents(slot, self._pools, block_ids, places, sums)
        split = split_of(self._pools, places.num_units, unpacks=num_right is not None)
        address = slot.data_ptr()
        values = (
            address, block_ids.data_ptr(), self._multipliers.data_ptr(),
            address if sums is None else sums.digests.data_ptr(),
            address if sums is None else sums.num_added.data_ptr(),
            address if num_right is None else num_right,
            places.positions.data_ptr(), *numbers_of(places, self._pools, split),
        )  # fmt: skip
        handle = stream.cuda_stream
        for pool, launch in zip(self._addresses, kept, strict=True):
            launch(split.num_programs, handle, pool, *values)

    def _go_the_long_way(self, stream: torch.cuda.Stream, move: _Move) -> None:
        slot, block_ids, places, sums, num_right = move
        others = torch.cuda.current_stream(slot.device)
        torch.cuda.set_stream(stream)
        try:
            if num_right is None:
                pack_and_seal(slot, self._pools, block_ids, places, sums)
            else:
                unpack_and_check(slot, self._pools, block_ids, places, sums, num_right)
        finally:
            torch.cuda.set_stream(others)


class _Move(NamedTuple):
    """What `calls_of` wants beside the pools. `num_right`: None to pack."""

    slot: torch.Tensor
    block_ids: torch.Tensor
    places: Places
    sums: Sums | None
    num_right: torch.Tensor | None

    def kind(self) -> tuple[bool, bool]:
        """Whether it unpacks, and whether it takes digests."""
        return self.num_right is not None, self.sums is not None

    def is_usual(self) -> bool:
        """Whether the kernel is compiled as for nearly all moves."""
        places = self.places
        addresses = self.slot.data_ptr() | self.block_ids.data_ptr() | places.positions.data_ptr()
        return addresses % 16 == 0 and places.seed >= 1 << 31 and places.num_units > 0


def _launches_of(calls: Iterable[tuple[tuple[Any, ...], dict[str, Any]]]) -> list[KeptLaunch]:
    """How each was launched; none where one cannot be told."""
    launches = getattr(move_kernel, "launches", None)
    if launches is None:
        return []
    found = [launches.kept(*args, **named) for args, named in calls]
    return found if all(each is not None for each in found) else []
