"""One kernel gives what copying, digesting and sealing one after the other do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.block_digest import block_digests
from kernels.copy_and_digest import pack_and_seal, unpack_and_check
from kernels.copy_blocks import pack_blocks, unpack_blocks
from kernels.seal_digests import Places, Sums, Verdict, places_of

PARTS = pytest.mark.parametrize(
    ("num_parts", "unit_bytes"), [(1, 64), (1, 9000), (1, 40000), (2, 160), (2, 16440), (4, 512)]
)
SEED = (1 << 63) - 1


def random_bytes(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8).to(device)


def make_pools(num_parts: int, unit_bytes: int, device: torch.device) -> list[torch.Tensor]:
    return [random_bytes(5, 7, unit_bytes, device=device) for _ in range(num_parts)]


def make_places(
    layer_start: int,
    num_layers: int,
    positions: tuple[int, ...],
    device: torch.device,
    seed: int = SEED,
) -> Places:
    kept = torch.tensor([*positions, 77], device=device)  # lists are longer than most frames
    return Places(seed, layer_start, num_layers, kept, len(positions))


def make_slot(num_units: int, unit_bytes: int, device: torch.device) -> torch.Tensor:
    return random_bytes(num_units * (unit_bytes + 8) + 24, device=device)


def sealed(units: torch.Tensor, of: Places) -> torch.Tensor:
    """The bytes that belong behind these units."""
    layers = np.arange(of.layer_start, of.layer_start + of.num_layers, dtype=np.uint64)
    positions = of.positions[: of.num_positions].cpu().numpy().view(np.uint64)
    added = places_of(of.seed, layers[:, None], positions).reshape(-1)
    digests = block_digests(units.contiguous(), of.num_units).cpu().numpy().view(np.uint64)
    return torch.from_numpy((digests + added).view(np.uint8)).to(units.device)


def verified(
    slot: torch.Tensor, pools: list[torch.Tensor], ids: torch.Tensor, of: Places, sums: Sums
) -> bool:
    verdict = Verdict(is_pinned=slot.is_cuda)
    unpack_and_check(slot, pools, ids, of, sums, verdict.num_right)
    if slot.is_cuda:
        torch.cuda.synchronize()
    assert not sums.digests.any(), "they are zero for the next move"
    assert not sums.num_added.any()
    return verdict.has_verified(of.num_units)


@PARTS
@pytest.mark.parametrize("seed", [SEED, 7])
def test_packing(device: torch.device, num_parts: int, unit_bytes: int, seed: int) -> None:
    pools = make_pools(num_parts, unit_bytes, device)
    ids, of = torch.tensor([6, 0, 3], device=device), make_places(2, 2, (4, 0, 9), device, seed)
    expected = random_bytes(2, 3, num_parts * unit_bytes, device=device)
    for part, pool in enumerate(pools):
        pack_blocks(pool, 2, 2, ids, expected, part=part, num_parts=num_parts)
    slot, sums = make_slot(6, num_parts * unit_bytes, device), Sums(9, device)
    rest = slot[6 * (num_parts * unit_bytes + 8) :].clone()
    pack_and_seal(slot, pools, ids, of, sums)
    assert torch.equal(slot[: expected.numel()], expected.view(-1))
    assert torch.equal(slot[expected.numel() : -24], sealed(expected, of))
    assert torch.equal(slot[-24:], rest), "what lies behind is left alone"
    assert not sums.digests.any(), "they are zero for the next move"
    assert not sums.num_added.any()


@PARTS
def test_unpacking(device: torch.device, num_parts: int, unit_bytes: int) -> None:
    pools = make_pools(num_parts, unit_bytes, device)
    expected = [pool.clone() for pool in pools]
    ids, of = torch.tensor([5, 2], device=device), make_places(1, 3, (1, 8), device)
    slot, sums = make_slot(6, num_parts * unit_bytes, device), Sums(6, device)
    units = slot[: 6 * num_parts * unit_bytes].view(3, 2, -1)
    for part, pool in enumerate(expected):
        unpack_blocks(units, pool, 1, 3, ids, part=part, num_parts=num_parts)
    slot[units.numel() : -24] = sealed(units, of)
    assert verified(slot, pools, ids, of, sums)
    assert all(map(torch.equal, pools, expected))
    assert verified(slot, pools, ids, of, sums), "sums serve again"


@pytest.mark.parametrize("num_parts", [1, 2])
def test_many_units_for_each_program(device: torch.device, num_parts: int) -> None:
    """So many that each seals more than a thread has hands for."""
    sources, targets = (
        [random_bytes(30, 100, 64, device=device) for _ in range(num_parts)] for _ in range(2)
    )
    ids = torch.randperm(100)[:77].to(device)
    of, sums = make_places(0, 30, tuple(range(77)), device), Sums(30 * 77, device)
    slot = make_slot(30 * 77, num_parts * 64, device)
    pack_and_seal(slot, sources, ids, of, sums)
    assert verified(slot, targets, ids, of, sums)
    for source, target in zip(sources, targets, strict=True):
        assert torch.equal(target[:, ids], source[:, ids])


@pytest.mark.parametrize("unit", [0, 255, 256, 299])
@pytest.mark.parametrize("at", ["first byte", "last byte", "digest"])
def test_one_wrong_unit_of_many_shows(device: torch.device, unit: int, at: str) -> None:
    pools = [random_bytes(100, 7, 64, device=device)]
    ids, of = torch.tensor([6, 0, 3], device=device), make_places(0, 100, (4, 0, 9), device)
    slot, sums = make_slot(300, 64, device), Sums(300, device)
    pack_and_seal(slot, pools, ids, of, sums)
    begins = {"first byte": 64 * unit, "last byte": 64 * unit + 63, "digest": 64 * 300 + 8 * unit}
    slot[begins[at]] ^= 1
    assert not verified(slot, pools, ids, of, sums)


@pytest.mark.parametrize(
    "change",
    [{"seed": 11}, {"layer_start": 2}, {"positions": torch.tensor([4, 0, 10])}],
    ids=["seed", "layer", "position"],
)
def test_the_same_units_elsewhere_are_wrong(
    device: torch.device, change: dict[str, object]
) -> None:
    pools, sums = make_pools(1, 64, device), Sums(6, device)
    ids, of = torch.tensor([6, 0, 3], device=device), make_places(1, 2, (4, 0, 9), device)
    slot = make_slot(6, 64, device)
    pack_and_seal(slot, pools, ids, of, sums)
    elsewhere = of._replace(**change)  # type: ignore[arg-type]
    elsewhere = elsewhere._replace(positions=elsewhere.positions.to(device))
    assert not verified(slot, pools, ids, elsewhere, sums)


def test_lists_may_begin_somewhere(device: torch.device) -> None:
    """At a place that is no multiple of what a kernel likes best."""
    pools, sums = make_pools(1, 64, device), Sums(6, device)
    ids, of = torch.tensor([6, 0, 3], device=device), make_places(1, 2, (4, 0, 9), device)
    later = make_places(1, 2, (77, 4, 0, 9), device)._replace(num_positions=3, first=1)
    slot, other = make_slot(6, 64, device), make_slot(6, 64, device)
    pack_and_seal(slot, pools, ids, of, sums)
    shifted = torch.tensor([5, 6, 0, 3], device=device)
    pack_and_seal(other, pools, shifted, later, sums)
    assert torch.equal(slot[:-24], other[:-24])
    expected = pools[0].clone()
    pools[0][:, ids] = 0
    pools[0][0], pools[0][3:] = expected[0], expected[3:]
    assert verified(slot, pools, shifted, later, sums)
    assert torch.equal(pools[0], expected)


def test_no_blocks(device: torch.device) -> None:
    pools, of = make_pools(1, 64, device), make_places(0, 2, (), device)
    slot, no_ids = make_slot(0, 64, device), torch.empty(0, dtype=torch.int64, device=device)
    before = slot.clone()
    pack_and_seal(slot, pools, no_ids, of, Sums(0, device))
    assert torch.equal(slot, before)
    assert verified(slot, pools, no_ids, of, Sums(0, device))


def test_without_digests_units_are_copied_alone(device: torch.device) -> None:
    pools = make_pools(1, 64, device)
    ids, of = torch.tensor([6, 0, 3], device=device), make_places(1, 2, (4, 0, 9), device)
    slot = make_slot(6, 64, device)
    behind = slot[6 * 64 :].clone()
    pack_and_seal(slot, pools, ids, of, None)
    assert torch.equal(slot[: 6 * 64].view(2, 3, 64), pools[0][1:3][:, ids])
    assert torch.equal(slot[6 * 64 :], behind)


@PARTS
def test_without_digests_units_are_put_into_blocks_alone(
    device: torch.device, num_parts: int, unit_bytes: int
) -> None:
    pools = make_pools(num_parts, unit_bytes, device)
    expected = [pool.clone() for pool in pools]
    ids, of = torch.tensor([5, 2], device=device), make_places(1, 3, (1, 8), device)
    slot = make_slot(6, num_parts * unit_bytes, device)
    verdict = Verdict(is_pinned=slot.is_cuda)
    units = slot[: 6 * num_parts * unit_bytes].view(3, 2, -1)
    for part, pool in enumerate(expected):
        unpack_blocks(units, pool, 1, 3, ids, part=part, num_parts=num_parts)
    unpack_and_check(slot, pools, ids, of, None, verdict.num_right)
    if slot.is_cuda:
        torch.cuda.synchronize()
    assert all(map(torch.equal, pools, expected))
    assert not verdict.has_verified(of.num_units)
