"""Sealed digests fit one place of one transfer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kv_transfer.digests import PlaceSeal, digest_seed

UNITS = np.arange(6, dtype=np.uint64).reshape(2, 3)
SEED = digest_seed(b"t" * 16, b"tenant")
SEED_ON_THE_WIRE = 0x5414E1F16AB83C0B
SEALED_ON_THE_WIRE = 0x79C7CEBB74511635


def seal(units: np.ndarray = UNITS, **changes: object) -> np.ndarray:
    fields = {"seed": SEED, "layer_start": 0, "positions": (0, 1, 2), **changes}
    place = PlaceSeal(num_layers=len(units), **fields)  # type: ignore[arg-type]
    return place.seal(units)


def test_both_ends_seal_alike() -> None:
    assert np.array_equal(seal(), seal(UNITS.copy()))
    assert seal().shape == UNITS.shape


@pytest.mark.parametrize(
    "change",
    [
        {"seed": digest_seed(b"u" * 16, b"tenant")},
        {"seed": digest_seed(b"t" * 16, b"other")},
        {"layer_start": 1},
        {"positions": (1, 2, 3)},
    ],
    ids=["transfer", "tenant", "layer", "position"],
)
def test_the_same_bytes_elsewhere_have_other_digests_in_every_unit(
    change: dict[str, Any],
) -> None:
    assert not np.any(seal() == seal(**change))


def test_one_changed_unit_shows_in_its_digest_alone() -> None:
    changed = UNITS.copy()
    changed[1, 2] += np.uint64(1)
    assert (seal() != seal(changed)).tolist() == [[False] * 3, [False, False, True]]


def test_two_blocks_swapped_are_seen() -> None:
    assert not np.array_equal(seal(), seal(UNITS[:, [1, 0, 2]]))


def test_places_of_a_long_prompt_all_differ() -> None:
    units = np.zeros((64, 4096), dtype=np.uint64)
    sealed = seal(units, positions=tuple(range(4096)))
    assert len(np.unique(sealed)) == sealed.size


def test_fields_of_the_seed_cannot_run_into_each_other() -> None:
    assert digest_seed(b"ab", b"c") != digest_seed(b"a", b"bc")


def test_the_wire_format_does_not_drift() -> None:
    sealed = seal(np.array([[1]], dtype=np.uint64), layer_start=2, positions=(3,))
    assert SEED == SEED_ON_THE_WIRE
    assert int(sealed[0, 0]) == SEALED_ON_THE_WIRE
