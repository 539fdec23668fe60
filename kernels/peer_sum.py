"""Sums a small tensor over the ranks of a node in one kernel, through memory they share.

Each rank owns an inbox that every other rank can write to (peer access over NVLink):

    inbox  int64 [2, size, capacity]    by parity of the epoch, then by sender

A word of an inbox carries 4 bytes of payload and 4 bytes of epoch, written together, so data need
neither a fence nor a flag of their own: whoever finds the epoch it waits for has the payload (the
"LL" protocol of NCCL). One call is one epoch. Every program of a launch works alone:

    1. It reads its own epoch counter and writes its words into the inboxes of the others.
    2. It waits until the words of all others are in its own inbox.
    3. It adds them up in the order of ranks, in float32: all ranks get the same bits.
    4. It stores its epoch for the next call.

Why two parities are enough: a program that writes epoch e has received all of e - 1, which a peer
sends in a kernel that runs after its kernel of e - 2 has ended, inbox read. Whatever an earlier
call with other sizes left in an inbox has another epoch.

Whoever has a sum may also read what another rank had written before, into memory of its own that
others map: a kernel that has ended leaves its writes where NVLink reads. Behind `peer_meet` that
needs no knowledge of the hardware: a fence before words are sent, and one when all have come, order
it for all GPUs. (What was written into another GPU's memory does need them, see `peer_push`.)

A launch has at most `MAX_PROGRAMS` programs, so all of them run at once and none waits for a peer
that cannot start. In a chain (`chained_launch`) the kernel behind may start when they all do: it
reads its weights while this one waits for the other GPU.

All ranks must make the same calls in the same order. Nothing is read on the host, so calls can be
captured in CUDA graphs. A rank that never comes leaves the others waiting for ever: watch the
processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.dispatch import (
    chained_launch,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    jit_for_any,
    next_power_of_two,
    tl,
)

MAX_PROGRAMS = 128
# Words of one program. Small ones are the fastest: 8 KiB take 1.9 us, with 256 words 3.0 (H200).
_SMALLEST_BLOCK = 64
_LARGEST_BLOCK = 8192


@dataclass(frozen=True, slots=True, eq=False)
class PeerInboxes:
    """One rank's way to the others.

    `addresses`: int64 `[size]` on the device, of all inboxes, the own one included, as this
    rank's device sees them. `epochs`: int32 on the device, one for each program, zero at first.
    `capacity`: words that one sender can have in an inbox at once, `inbox_words(...)`.
    """

    rank: int
    size: int
    addresses: torch.Tensor
    epochs: torch.Tensor
    capacity: int

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether `peer_sum` can take a tensor of this size."""
        return tensor.numel() * tensor.element_size() <= 4 * self.capacity


def inbox_words(num_bytes: int) -> int:
    """Capacity for tensors of up to `num_bytes`; at most `MAX_PROGRAMS * 8192`."""
    words = -(-num_bytes // 4)
    region = next_power_of_two(max(_SMALLEST_BLOCK, -(-words // MAX_PROGRAMS)))
    return MAX_PROGRAMS * min(region, _LARGEST_BLOCK)


def peer_sum(x: torch.Tensor, inboxes: PeerInboxes, *, contributes: bool = True) -> torch.Tensor:
    """Replaces x by its sum over all ranks, and returns it.

    x: contiguous, bfloat16, float16 or float32, a multiple of 4 bytes, within the capacity.
    `contributes` False: this rank adds nothing and the contents of x do not matter. That makes a
    broadcast of a sum with one contributor.
    """
    assert x.is_contiguous()
    assert inboxes.holds(x)
    num_bytes = x.numel() * x.element_size()
    assert num_bytes % 4 == 0
    if num_bytes:
        words = x.view(-1).view(torch.int32)
        _launch(words, inboxes, num_bytes // 4, _KINDS[x.dtype], contributes, fences=False)
    return x


def peer_meet(word: torch.Tensor, inboxes: PeerInboxes) -> None:
    """A sum of nothing, behind which each rank finds what the others have written before it.

    word: int32 `[1]`, overwritten.
    """
    _launch(word, inboxes, 1, "fp32", contributes=False, fences=True)


def _launch(
    words: torch.Tensor,
    inboxes: PeerInboxes,
    num_words: int,
    kind: str,
    contributes: bool,
    fences: bool,
) -> None:
    block = next_power_of_two(max(_SMALLEST_BLOCK, -(-num_words // MAX_PROGRAMS)))
    chained = chained_launch(words.device)
    _peer_sum_kernel[(-(-num_words // block),)](
        words, inboxes.addresses, inboxes.epochs, num_words,
        RANK=inboxes.rank, SIZE=inboxes.size, CAPACITY=inboxes.capacity,
        REGION=inboxes.capacity // MAX_PROGRAMS, BLOCK=block, CONTRIBUTES=contributes,
        KIND=kind, FENCES=fences, COMPILED=words.is_cuda, CHAINED=chained,
        num_warps=min(8, max(1, block // 256)), launch_pdl=chained,
    )  # fmt: skip


@jit
def fence(COMPILED: tl.constexpr) -> None:
    """Orders what all threads of the program did before it and after it, for all GPUs."""
    if COMPILED:
        tl.inline_asm_elementwise(
            "fence.acq_rel.sys; mov.u32 $0, 0;", "=r,r", [tl.program_id(0)], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip
    tl.debug_barrier()


_KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@jit_for_any("num_words")
def _peer_sum_kernel(
    x_ptr: tl.tensor, inboxes_ptr: tl.tensor, epochs_ptr: tl.tensor, num_words: tl.tensor,
    RANK: tl.constexpr, SIZE: tl.constexpr, CAPACITY: tl.constexpr, REGION: tl.constexpr,
    BLOCK: tl.constexpr, CONTRIBUTES: tl.constexpr, KIND: tl.constexpr, FENCES: tl.constexpr,
    COMPILED: tl.constexpr, CHAINED: tl.constexpr,
) -> None:  # fmt: skip
    if CHAINED:
        gdc_launch_dependents()
        gdc_wait()
    program = tl.program_id(0)
    epoch = tl.load(epochs_ptr + program) + 1
    column = tl.arange(0, BLOCK)
    word = program * BLOCK + column
    mask = word < num_words
    mine = tl.zeros([BLOCK], dtype=tl.int32)
    if CONTRIBUTES:
        mine = tl.load(x_ptr + word, mask=mask, other=0)
    place = (epoch & 1).to(tl.int64) * (SIZE * CAPACITY) + program * REGION + column
    letter = (epoch.to(tl.int64) << 32) | (mine.to(tl.int64) & 0xFFFFFFFF)
    if FENCES:
        fence(COMPILED)
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            inbox = tl.load(inboxes_ptr + peer).to(tl.pointer_type(tl.int64))
            tl.store(inbox + place + RANK * CAPACITY, letter, mask=mask)
    own = tl.load(inboxes_ptr + RANK).to(tl.pointer_type(tl.int64))
    low = tl.zeros([BLOCK], dtype=tl.float32)
    high = tl.zeros([BLOCK], dtype=tl.float32)
    for sender in tl.static_range(SIZE):
        words = mine
        if sender != RANK:
            letters = own + place + sender * CAPACITY
            got = tl.load(letters, mask=mask, other=0, volatile=True)
            while tl.max((mask & ((got >> 32).to(tl.int32) != epoch)).to(tl.int32), axis=0) != 0:
                got = tl.load(letters, mask=mask, other=0, volatile=True)
            words = got.to(tl.int32)
        low += _lower(words, KIND)
        high += _upper(words, KIND)
    if FENCES:
        fence(COMPILED)
    total = low.to(tl.int32, bitcast=True)
    if KIND != "fp32":
        total = _as_bits(high, KIND) << 16 | _as_bits(low, KIND) & 0xFFFF
    tl.store(x_ptr + word, total, mask=mask)
    tl.store(epochs_ptr + program, epoch)


@jit
def _lower(words: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """float32 of the first number in each word."""
    if KIND == "fp32":
        return words.to(tl.float32, bitcast=True)
    if KIND == "bf16":
        return (words << 16).to(tl.float32, bitcast=True)
    return words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@jit
def _upper(words: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """float32 of the second number; of one that fills the word, what does not matter."""
    if KIND == "fp16":
        return (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return (words & -65536).to(tl.float32, bitcast=True)


@jit
def _as_bits(numbers: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """float32 rounded to 16 bits, which are the lower ones of int32."""
    if KIND == "bf16":
        return numbers.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32)
    return numbers.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
