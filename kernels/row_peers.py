"""A row that the programs of several ranks make together, read whole by each of them. For
`row_layer`, in Gluon.

By the protocol of `peer_sum`, with inboxes of its own: a letter is one output in float32 and the
epoch, written together. Programs send the letters of each tile to all ranks (`skinny_peers.send`).
Then each waits for those of the last tiles, reads all, adds them up in the order of ranks and
rounds once: a sum over the ranks and a meeting of the programs are one trip over NVLink.

A layer is two epochs: one behind attention, one behind its end. Two parities are enough. Who sends
the first one's letters has seen the layer before end, so it has letters that peers send once all
their programs have met, those of the first epoch read; who sends the second one's has letters that
peers send in this layer, which is behind the end of the one before.
"""

from __future__ import annotations

from typing import Any

from kernels.gluon_api import gl, gluon_jit


@gluon_jit
def receive_row(
    inboxes_ptr: gl.tensor, epoch: gl.tensor, place: gl.tensor, out_ptr: gl.tensor,
    IN: gl.constexpr, RANK: gl.constexpr, SIZE: gl.constexpr, CAPACITY: gl.constexpr,
) -> gl.tuple:  # fmt: skip
    """The row of this epoch as of `load_units`; the first program writes it to out, too."""
    UNIT: gl.constexpr = place.shape[0] * place.shape[1]
    UNITS: gl.constexpr = (IN + UNIT - 1) // UNIT
    own = gl.load(inboxes_ptr + RANK).to(gl.pointer_type(gl.int64))
    own = gl.multiple_of(own + (epoch & 1).to(gl.int64) * (SIZE * CAPACITY), 16)
    _await_last_tiles(own, epoch, IN, SIZE, CAPACITY)
    letters = _letters(own, place, IN, SIZE, CAPACITY)
    while _misses_any(letters, epoch, place, IN, SIZE):
        letters = _letters(own, place, IN, SIZE, CAPACITY)
    units: gl.tuple = ()
    for unit in gl.static_range(UNITS):
        total = _payload(letters[unit])
        for sender in gl.static_range(1, SIZE):
            total += _payload(letters[sender * UNITS + unit])
        x = total.to(out_ptr.dtype.element_ty)
        if gl.program_id(0) == 0:
            gl.store(out_ptr + unit * UNIT + place, x, mask=unit * UNIT + place < IN)
        units = units + (x,)  # noqa: RUF005
    return units


@gluon_jit
def _await_last_tiles(
    own: gl.tensor, epoch: gl.tensor, IN: gl.constexpr, SIZE: gl.constexpr, CAPACITY: gl.constexpr
) -> None:
    """One letter each of what programs make last: less to ask for again and again than all."""
    EACH: gl.constexpr = 128
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    at = gl.arange(0, EACH * SIZE, LAYOUT)
    tile = gl.maximum((IN + 15) // 16 - 1 - at % EACH, 0)
    ptrs = own + at // EACH * CAPACITY + tile * 16
    got = gl.load(ptrs, volatile=True)
    while gl.max(((got >> 32).to(gl.int32) != epoch).to(gl.int32), 0) != 0:
        got = gl.load(ptrs, volatile=True)


@gluon_jit
def _letters(
    own: gl.tensor, place: gl.tensor, IN: gl.constexpr, SIZE: gl.constexpr, CAPACITY: gl.constexpr
) -> gl.tuple:
    """Of all units of the first rank, then of the second one's."""
    UNIT: gl.constexpr = place.shape[0] * place.shape[1]
    letters: gl.tuple = ()
    for sender in gl.static_range(SIZE):
        for unit in gl.static_range((IN + UNIT - 1) // UNIT):
            at = unit * UNIT + place
            got = gl.load(own + sender * CAPACITY + at, mask=at < IN, other=0, volatile=True)
            letters = letters + (got,)  # noqa: RUF005
    return letters


@gluon_jit
def _misses_any(
    letters: gl.tuple, epoch: gl.tensor, place: gl.tensor, IN: gl.constexpr, SIZE: gl.constexpr
) -> Any:
    UNIT: gl.constexpr = place.shape[0] * place.shape[1]
    UNITS: gl.constexpr = (IN + UNIT - 1) // UNIT
    missing = gl.full(place.shape, 0, gl.int32, place.type.layout)
    for sender in gl.static_range(SIZE):
        for unit in gl.static_range(UNITS):
            differs = (letters[sender * UNITS + unit] >> 32).to(gl.int32) != epoch
            missing |= (differs & (unit * UNIT + place < IN)).to(gl.int32)
    return gl.max(gl.max(missing, 1), 0) != 0


@gluon_jit
def _payload(letters: gl.tensor) -> gl.tensor:
    return letters.to(gl.int32).to(gl.float32, bitcast=True)
