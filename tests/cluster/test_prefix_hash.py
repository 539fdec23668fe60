from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.prefix_hash import BlockHash, hash_blocks, root_hash

ROOT = root_hash("model", b"")
tokens = st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=40)


def test_the_bytes_never_change() -> None:
    """Registry entries and caches of running nodes hold these: a change is a new version."""
    assert ROOT.hex() == "d68591401b485d485fa3d5ed442ddadf"
    assert [h.hex() for h in hash_blocks([1, 2, 3, 70000, 5, 6, 7, 8, 9], 4, ROOT)] == [
        "e0350f6e09407bc2a0888b61b41baff1",
        "ec9710a4bf38bbb661e18fdcd6151920",
    ]


def test_every_process_computes_the_same_bytes() -> None:
    code = (
        "from cluster.prefix_hash import *;"
        "print(hash_blocks(list(range(64)), 16, root_hash('m', b's'))[-1].hex())"
    )
    here = hash_blocks(list(range(64)), 16, root_hash("m", b"s"))[-1].hex()
    for seed in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == here


def test_only_full_blocks_have_a_hash() -> None:
    assert hash_blocks([], 4, ROOT) == []
    assert hash_blocks([1, 2, 3], 4, ROOT) == []
    assert len(hash_blocks(range(8), 4, ROOT)) == 2
    assert hash_blocks(list(range(11)), 4, ROOT) == hash_blocks(range(8), 4, ROOT)


@given(tokens, tokens)
def test_different_prefixes_have_different_hashes(first: list[int], second: list[int]) -> None:
    for index, (a, b) in enumerate(
        zip(hash_blocks(first, 4, ROOT), hash_blocks(second, 4, ROOT), strict=False)
    ):
        end = (index + 1) * 4
        assert (a == b) == (first[:end] == second[:end])


@given(tokens, st.data())
def test_a_changed_token_changes_its_block_and_all_after_it(
    ids: list[int], data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(ids) // 4 * 4 - 1))
    changed = [*ids]
    changed[at] ^= 1
    before, after = hash_blocks(ids, 4, ROOT), hash_blocks(changed, 4, ROOT)
    assert before[: at // 4] == after[: at // 4]
    assert not set(before[at // 4 :]) & set(after[at // 4 :])


@given(tokens, st.integers(1, 4))
def test_a_chain_can_be_continued_from_any_block(ids: list[int], num_first: int) -> None:
    whole = hash_blocks(ids, 4, ROOT)
    first = whole[:num_first]
    rest = hash_blocks(ids[len(first) * 4 :], 4, first[-1])
    assert first + rest == whole


@given(st.text(max_size=8), st.binary(max_size=8), st.text(max_size=8), st.binary(max_size=8))
def test_model_and_salt_separate_roots(m1: str, s1: bytes, m2: str, s2: bytes) -> None:
    assert (root_hash(m1, s1) == root_hash(m2, s2)) == ((m1, s1) == (m2, s2))


@given(tokens)
def test_block_sizes_separate_caches(ids: list[int]) -> None:
    assert not set(hash_blocks(ids, 2, ROOT)) & set(hash_blocks(ids, 4, ROOT))


def test_a_root_is_never_a_blocks_hash() -> None:
    """Even a model key and salt that spell a block's message give another digest."""
    block = hash_blocks([0] * 4, 4, ROOT)[0]
    message = ROOT + bytes(16)
    key_length = int.from_bytes(message[:8], "little")
    assert key_length > 0
    assert root_hash("", message[8:]) != block


@pytest.mark.parametrize("bad", [[-1, 0], [2**32, 0], [1.5, 0], ["a", 0]])
def test_ids_out_of_range_are_refused(bad: list[int]) -> None:
    with pytest.raises(ValueError, match="token id"):
        hash_blocks(bad, 2, ROOT)


def test_a_root_that_is_not_a_digest_is_refused() -> None:
    with pytest.raises(ValueError, match="root"):
        hash_blocks([1, 2], 2, BlockHash(b"short"))
