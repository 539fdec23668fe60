"""Digests are sealed for their places, and compared, as the host does it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.seal_digests import Places, Verdict, check_digests, places_of, seal_digests

UNITS_BYTES = 80
SEEDS = [(1 << 63) - 1, (1 << 62) + 12345, 7]


def places(seed: int, device: torch.device, positions: tuple[int, ...] = (4, 0, 9)) -> Places:
    kept = torch.tensor([*positions, 77], device=device)  # lists are longer than most frames
    return Places(seed, 3, 100, kept, len(positions))


def sealed(digests: torch.Tensor, of: Places) -> torch.Tensor:
    layers = np.arange(of.layer_start, of.layer_start + of.num_layers, dtype=np.uint64)
    positions = of.positions[: of.num_positions].cpu().numpy().view(np.uint64)
    added = places_of(of.seed, layers[:, None], positions).reshape(-1)
    return torch.from_numpy((digests.cpu().numpy().view(np.uint64) + added).view(np.int64))


def random_digests(num: int, device: torch.device) -> torch.Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (num,), dtype=torch.int64).to(device)


def slot_of(of: Places, device: torch.device) -> torch.Tensor:
    num_bytes = UNITS_BYTES + 8 * of.num_units + 24
    return torch.full((num_bytes,), 0xA5, dtype=torch.uint8, device=device)


def compared(digests: torch.Tensor, of: Places, slot: torch.Tensor) -> Verdict:
    """The verdict of one comparison that has ended."""
    verdict = Verdict(of.num_units, is_pinned=slot.is_cuda)
    check_digests(digests, of, slot, UNITS_BYTES, verdict.num_right)
    if slot.is_cuda:
        torch.cuda.synchronize()
    return verdict


@pytest.mark.parametrize("seed", SEEDS)
def test_sealed_digests_stand_behind_the_units(device: torch.device, seed: int) -> None:
    of = places(seed, device)
    slot, digests = slot_of(of, device), random_digests(of.num_units, device)
    expected = sealed(digests, of)
    kept = torch.cat([digests, torch.zeros(9, dtype=torch.int64, device=device)])
    seal_digests(kept, of, slot, UNITS_BYTES)
    end = UNITS_BYTES + 8 * of.num_units
    assert torch.equal(slot[UNITS_BYTES:end].view(torch.int64).cpu(), expected)
    assert (slot[:UNITS_BYTES] == 0xA5).all()
    assert (slot[end:] == 0xA5).all()
    assert not kept.any(), "they are zero for the next move"


@pytest.mark.parametrize("seed", SEEDS)
def test_the_same_digests_at_the_same_places_are_right(device: torch.device, seed: int) -> None:
    of = places(seed, device)
    slot, digests = slot_of(of, device), random_digests(of.num_units, device)
    seal_digests(digests.clone(), of, slot, UNITS_BYTES)
    assert compared(digests, of, slot).has_verified(of.num_units)
    assert not digests.any()


@pytest.mark.parametrize("unit", [0, 255, 256, 299])
def test_one_wrong_digest_of_many_shows(device: torch.device, unit: int) -> None:
    of = places(SEEDS[0], device)
    slot, digests = slot_of(of, device), random_digests(of.num_units, device)
    seal_digests(digests.clone(), of, slot, UNITS_BYTES)
    digests[unit] += 1
    assert not compared(digests, of, slot).has_verified(of.num_units)


@pytest.mark.parametrize(
    "change",
    [{"seed": 11}, {"layer_start": 4}, {"positions": torch.tensor([4, 0, 10])}],
    ids=["seed", "layer", "position"],
)
def test_the_same_digests_elsewhere_are_wrong(
    device: torch.device, change: dict[str, object]
) -> None:
    of = places(SEEDS[1], device)
    slot, digests = slot_of(of, device), random_digests(of.num_units, device)
    seal_digests(digests.clone(), of, slot, UNITS_BYTES)
    elsewhere = of._replace(**change)  # type: ignore[arg-type]
    elsewhere = elsewhere._replace(positions=elsewhere.positions.to(device))
    assert not compared(digests, elsewhere, slot).has_verified(of.num_units)


@pytest.mark.parametrize("told", [256, 44])
def test_a_comparison_of_which_one_program_says_nothing_has_verified_nothing(told: int) -> None:
    verdict = Verdict(300, is_pinned=False)
    verdict.num_right[0] = told
    assert not verdict.has_verified(300)


def test_no_units(device: torch.device) -> None:
    of = places(SEEDS[0], device)._replace(num_layers=0)
    slot = slot_of(of, device)
    seal_digests(torch.zeros(0, dtype=torch.int64, device=device), of, slot, UNITS_BYTES)
    assert (slot == 0xA5).all()


def test_what_was_never_compared_is_not_verified() -> None:
    assert not Verdict(300, is_pinned=False).has_verified(300)


def test_what_was_verified_before_says_nothing_of_the_next_move(device: torch.device) -> None:
    of = places(SEEDS[0], device)
    slot, digests = slot_of(of, device), random_digests(of.num_units, device)
    seal_digests(digests.clone(), of, slot, UNITS_BYTES)
    verdict = compared(digests, of, slot)
    verdict.reset()
    assert not verdict.has_verified(of.num_units)
