"""Products that ranks sum while they are made: each sends its tiles to the others. For
`skinny_stream`, in Gluon.

By the protocol of `peer_sum`, with inboxes of its own: a letter is one output in float32 and the
epoch, written together. A program writes the letters of each tile as soon as it has its sums, into
the inboxes of all ranks, its own too. Behind its last tile it waits for the letters of all ranks,
adds them up in the order of ranks, and rounds once. What a kernel of its own would take, its start
and the way over NVLink, is hidden behind the other tiles but for that of the last one.

All ranks cut a product into the same tiles for the same programs, so that a program has to wait
for one like itself only.
"""

from __future__ import annotations

from kernels.gluon_api import gl, gluon_jit


@gluon_jit
def send(
    y: gl.tensor, target: gl.tensor, mask: gl.tensor, inboxes_ptr: gl.tensor, epoch: gl.tensor,
    RANK: gl.constexpr, SIZE: gl.constexpr, CAPACITY: gl.constexpr,
) -> None:  # fmt: skip
    """float32 y to place `target` of all ranks."""
    payload = y.to(gl.int32, bitcast=True).to(gl.int64) & 0xFFFFFFFF
    letter = (epoch.to(gl.int64) << 32) | payload
    place = (epoch & 1).to(gl.int64) * (SIZE * CAPACITY) + RANK * CAPACITY + target
    for peer in gl.static_range(SIZE):
        inbox = gl.load(inboxes_ptr + peer).to(gl.pointer_type(gl.int64))
        gl.store(inbox + place, letter, mask=mask)


@gluon_jit
def _letters(ptrs: gl.tensor, mask: gl.tensor, epoch: gl.tensor) -> gl.tensor:
    """float32, once all are of this epoch."""
    got = gl.load(ptrs, mask=mask, other=0, volatile=True)
    while gl.max(gl.max((mask & ((got >> 32).to(gl.int32) != epoch)).to(gl.int32), 1), 0) != 0:
        got = gl.load(ptrs, mask=mask, other=0, volatile=True)
    return got.to(gl.int32).to(gl.float32, bitcast=True)


@gluon_jit
def receive(
    out_ptr: gl.tensor, num_rows: gl.tensor, inboxes_ptr: gl.tensor, epochs_ptr: gl.tensor,
    epoch: gl.tensor, OUT: gl.constexpr, ROWS: gl.constexpr, TILES: gl.constexpr,
    RANK: gl.constexpr, SIZE: gl.constexpr, CAPACITY: gl.constexpr,
) -> None:  # fmt: skip
    """The sums of this program's tiles, at most TILES, to out."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [1, 8], [0, 1])
    line = gl.arange(0, 16 * TILES, gl.SliceLayout(1, LAYOUT))[:, None]
    row = gl.arange(0, ROWS, gl.SliceLayout(0, LAYOUT))[None, :]
    column = (gl.program_id(0) + line // 16 * gl.num_programs(0)) * 16 + line % 16
    mask = (column < OUT) & (row < num_rows)
    target = row * OUT + column
    own = gl.load(inboxes_ptr + RANK).to(gl.pointer_type(gl.int64))
    own += (epoch & 1).to(gl.int64) * (SIZE * CAPACITY)
    total = _letters(own + target, mask, epoch)
    for sender in gl.static_range(1, SIZE):
        total += _letters(own + sender * CAPACITY + target, mask, epoch)
    gl.store(out_ptr + target, total.to(out_ptr.dtype.element_ty), mask=mask)
    gl.store(epochs_ptr + gl.program_id(0), epoch)
