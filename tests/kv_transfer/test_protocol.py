"""Frame headers: what was packed is read, anything else is refused before it is used."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.protocol import (
    SLOT_READ_BYTES,
    CommitMessage,
    FrameHeader,
    FrameLimits,
    FrameMalformed,
    SlotName,
    pack_commit,
    pack_slot_read,
    parse_header,
    parse_message,
    parse_slot_read,
    write_header,
)

LIMITS = FrameLimits(num_layers=4, unit_bytes=32, slot_bytes=32 * 4 * 8)


def make_header(
    *,
    positions: tuple[int, ...] = (2, 3, 9),
    layer_start: int = 1,
    num_layers: int = 3,
    slot: SlotName | None = None,
) -> FrameHeader:
    num_units = num_layers * len(positions)
    return FrameHeader(
        transfer_id=bytes(range(16)),
        incarnation=2**63 - 1,
        epoch=7,
        nonce=2**64 - 1,
        seq=5,
        layer_start=layer_start,
        num_layers=num_layers,
        positions=positions,
        payload_bytes=LIMITS.payload_bytes(num_units),
        slot=slot,
    )


def packed(header: FrameHeader) -> bytearray:
    buffer = bytearray(LIMITS.max_header_bytes)
    del buffer[write_header(header, memoryview(buffer)) :]
    return buffer


@pytest.mark.parametrize("slot", [None, SlotName(0, 0), SlotName(7, 2**64 - 1)])
def test_a_header_is_read_as_it_was_written(slot: SlotName | None) -> None:
    header = make_header(slot=slot)
    assert parse_header(memoryview(packed(header)), LIMITS) == header


def test_what_is_said_of_a_slot_is_read_as_it_was_written() -> None:
    name = SlotName(3, 2**40)
    assert parse_slot_read(pack_slot_read(name)) == name
    with pytest.raises(FrameMalformed):
        parse_slot_read(b"\0" * SLOT_READ_BYTES)


def test_what_an_earlier_header_left_in_the_buffer_is_ignored() -> None:
    buffer = bytearray(b"\xff" * LIMITS.max_header_bytes)
    write_header(make_header(), memoryview(buffer))
    assert parse_header(memoryview(buffer), LIMITS).seq == 5


@settings(deadline=None)
@given(st.integers(0), st.integers(0, 7))
def test_any_flipped_bit_is_refused(place: int, bit: int) -> None:
    data = packed(make_header())
    data[place % len(data)] ^= 1 << bit
    with pytest.raises(FrameMalformed):
        parse_header(memoryview(data), LIMITS)


@settings(deadline=None)
@given(st.integers(0, 200))
def test_a_truncated_header_is_refused(length: int) -> None:
    data = packed(make_header())
    with pytest.raises(FrameMalformed):
        parse_header(memoryview(data[: length % len(data)]), LIMITS)


@settings(deadline=None)
@given(st.binary(max_size=400))
def test_noise_is_refused(data: bytes) -> None:
    with pytest.raises(FrameMalformed):
        parse_header(memoryview(data), LIMITS)


@pytest.mark.parametrize(
    "header",
    [
        make_header(layer_start=2, num_layers=3),
        make_header(positions=(3, 2)),
        make_header(positions=(2, 2)),
    ],
    ids=["layers beyond the last", "positions descend", "a position twice"],
)
def test_a_map_that_cannot_be_is_refused(header: FrameHeader) -> None:
    with pytest.raises(FrameMalformed):
        parse_header(memoryview(packed(header)), LIMITS)


def test_a_frame_larger_than_a_slot_is_refused_by_its_counts() -> None:
    header = make_header(positions=tuple(range(11)), num_layers=3)
    buffer = bytearray(10_000)
    write_header(header, memoryview(buffer))
    with pytest.raises(FrameMalformed, match="size"):
        parse_header(memoryview(buffer), LIMITS)


def test_a_payload_length_that_does_not_fit_the_map_is_refused() -> None:
    larger = FrameLimits(num_layers=4, unit_bytes=64, slot_bytes=1 << 20)
    with pytest.raises(FrameMalformed, match="payload"):
        parse_header(memoryview(packed(make_header())), larger)


def make_commit() -> CommitMessage:
    return CommitMessage(
        transfer_id=bytes(range(16)),
        epoch=2**32 - 1,
        nonce=2**64 - 1,
        num_frames=3,
        first_token_id=128_255,
    )


def test_a_commit_and_a_header_are_told_apart_in_the_buffer_they_share() -> None:
    buffer = bytearray(LIMITS.max_header_bytes)
    write_header(make_header(), memoryview(buffer))
    message = parse_message(memoryview(buffer), LIMITS)
    assert isinstance(message, FrameHeader)
    commit = pack_commit(make_commit())
    buffer[: len(commit)] = commit
    assert parse_message(memoryview(buffer), LIMITS) == make_commit()


@pytest.mark.parametrize("byte", range(len(pack_commit(make_commit()))))
def test_a_commit_with_one_wrong_byte_is_malformed(byte: int) -> None:
    buffer = bytearray(pack_commit(make_commit()))
    buffer[byte] ^= 0x40
    with pytest.raises(FrameMalformed):
        parse_message(memoryview(buffer), LIMITS)


@pytest.mark.parametrize("num_bytes", [4, 20, 53])
def test_a_commit_that_is_cut_short_is_malformed(num_bytes: int) -> None:
    data = pack_commit(make_commit())[:num_bytes]
    with pytest.raises(FrameMalformed):
        parse_message(memoryview(data), LIMITS)
