"""Numbers that depend on seed and position alone."""

from __future__ import annotations

import numpy as np

from kernels.randomness import uniforms


def draw(seeds: list[int], positions: list[int]) -> list[float]:
    drawn: list[float] = uniforms(
        np.array(seeds, np.uint64), np.array(positions, np.uint64)
    ).tolist()
    return drawn


def splitmix64(seed: int, position: int) -> float:
    """The reference, in Python's integers."""
    mask = 2**64 - 1

    def mix(bits: int) -> int:
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & mask
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & mask
        return bits ^ (bits >> 31)

    state = (mix(seed) + (position + 1) * 0x9E3779B97F4A7C15) & mask
    return (mix(state) >> 11) * 2.0**-53


def test_they_are_splitmix64_at_an_index() -> None:
    keys = [(0, 0), (0, 1), (1, 0), (2**63 - 1, 131_072), (123_456_789, 7)]
    drawn = draw([seed for seed, _ in keys], [position for _, position in keys])
    assert drawn == [splitmix64(*key) for key in keys]


def test_a_stream_does_not_change_between_versions() -> None:
    """A migrated sequence continues on a node of another version: these values are a contract."""
    assert draw([42, 42, 43], [10, 11, 10]) == [
        splitmix64(42, 10),
        splitmix64(42, 11),
        splitmix64(43, 10),
    ]
    assert draw([42], [10])[0].hex() == "0x1.87656a3f8c3d9p-1"


def test_neighbours_in_the_batch_do_not_matter() -> None:
    alone = draw([5], [100])
    assert draw([1, 5, 9], [7, 100, 3])[1] == alone[0]


def test_seeds_and_positions_are_spread_evenly() -> None:
    size = 50_000
    by_position = uniforms(np.full(size, 7, np.uint64), np.arange(size, dtype=np.uint64))
    by_seed = uniforms(np.arange(size, dtype=np.uint64), np.full(size, 7, np.uint64))
    for numbers in (by_position, by_seed):
        assert numbers.min() >= 0.0
        assert numbers.max() < 1.0
        counts, _ = np.histogram(numbers, bins=100, range=(0.0, 1.0))
        chi_squared = float(((counts - size / 100) ** 2 / (size / 100)).sum())
        assert 55 < chi_squared < 155  # 99 degrees of freedom
        lag = float(np.corrcoef(numbers[:-1], numbers[1:])[0, 1])
        assert abs(lag) < 0.02
