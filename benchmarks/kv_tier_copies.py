"""Rates of copies between the pool of a GPU and host memory, beside a plain copy: the first part of
`kv_tiers`."""

from __future__ import annotations

import statistics
import sys
import threading
import time
from contextlib import closing
from typing import TYPE_CHECKING, cast

import torch

from cluster.prefix_hash import BlockHash
from engine.block_copies import BlockCopy, CopyKind
from engine.host_copier import HostCopier
from engine.host_tier import HostEntry

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence as SequenceOf

    from engine.reservation import Hold


MIB = 1 << 20


def require(is_true: bool, problem: str) -> None:
    if not is_true:
        raise SystemExit(f"kv_tiers: {problem}")


def copy_of(kind: CopyKind, block_ids: SequenceOf[int], slots: SequenceOf[int]) -> BlockCopy:
    """As the block manager asks for them, but of blocks that nobody has to hold."""
    name = BlockHash(b"")
    entries = tuple(HostEntry(slot, name, None, is_private=False) for slot in slots)
    return BlockCopy(kind, tuple(block_ids), entries, cast("Hold", None))


def seconds_of(copier: HostCopier, copies: SequenceOf[BlockCopy]) -> float:
    """Wall time until all of them, started at once, have ended."""
    left = threading.Semaphore(0)
    began = time.perf_counter()
    for copy in copies:
        copier.start(copy, lambda digests: left.release() if digests else sys.exit("failed"))
    for _ in copies:
        left.acquire()
    return time.perf_counter() - began


def plain_gbps(num_bytes: int, device: torch.device, *, to_host: bool, repeats: int) -> float:
    """One copy between contiguous pinned memory and the device: the best of some."""
    on_gpu = device.type == "cuda"
    here = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=on_gpu)
    there = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        (here if to_host else there).copy_(there if to_host else here, non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return num_bytes / best / 1e9


def rates(arguments: argparse.Namespace) -> list[str]:
    device = torch.device(arguments.device)
    num_layers, unit_bytes = arguments.num_layers, arguments.unit_kib * 1024
    num_blocks = arguments.mib * MIB // (num_layers * unit_bytes)
    pool = torch.randint(
        0, 256, (num_layers, 2 * num_blocks, unit_bytes), dtype=torch.uint8, device=device
    )
    rows = [
        "| blocks x size | slots | direction | GB/s (median, best) | plain copy GB/s | ratio |",
        "|---|---|---|---:|---:|---:|",
    ]
    with closing(HostCopier((pool,), 2 * num_blocks)) as copier:
        ids = torch.randperm(2 * num_blocks).tolist()[:num_blocks]
        layouts = {
            "side by side": list(range(num_blocks)),
            "scattered": torch.randperm(2 * num_blocks).tolist()[:num_blocks],
        }
        check(copier, pool, ids[:64], layouts["scattered"][:64])
        for name, slots in layouts.items():
            for size in (num_blocks, min(num_blocks, 64), min(num_blocks, 8), 1):
                for kind in CopyKind:
                    copy = copy_of(kind, ids[:size], slots[:size])
                    rows.append(rate_row(copier, copy, name, arguments))
        rows.append(both_row(copier, ids, layouts["side by side"], arguments.repeats))
    return rows


def rate_row(
    copier: HostCopier, copy: BlockCopy, layout: str, arguments: argparse.Namespace
) -> str:
    """One copy, beside a plain one of as many bytes."""
    size, device = len(copy.block_ids), torch.device(arguments.device)
    num_bytes = size * copier.block_bytes
    times = [seconds_of(copier, [copy]) for _ in range(arguments.repeats)]
    to_host = copy.kind is CopyKind.SAVE
    plain = plain_gbps(num_bytes, device, to_host=to_host, repeats=arguments.repeats)
    median, best = (num_bytes / f(times) / 1e9 for f in (statistics.median, min))
    return (
        f"| {size} x {copier.block_bytes / MIB:.2f} MiB | {layout} | {copy.kind} "
        f"| {median:.1f}, {best:.1f} | {plain:.1f} | {median / plain:.2f} |"
    )


def both_row(copier: HostCopier, ids: list[int], slots: list[int], repeats: int) -> str:
    """Half of the blocks saved while the other half is loaded."""
    half = len(ids) // 2
    both = [
        copy_of(CopyKind.SAVE, ids[:half], slots[:half]),
        copy_of(CopyKind.LOAD, ids[half:], slots[half:]),
    ]
    seconds = statistics.median(seconds_of(copier, both) for _ in range(repeats))
    total = len(ids) * copier.block_bytes / seconds / 1e9
    return (
        f"| {len(ids)} x {copier.block_bytes / MIB:.2f} MiB | side by side | both at once | "
        f"{total:.1f} in all | | |"
    )


def check(copier: HostCopier, pool: torch.Tensor, ids: list[int], slots: list[int]) -> None:
    """What is saved is what was there, and comes back as it was."""
    wanted = pool[:, ids].clone()
    seconds_of(copier, [copy_of(CopyKind.SAVE, ids, slots)])
    saved = copier.slots[slots].view(len(ids), *wanted.shape[::2])
    require(torch.equal(saved.transpose(0, 1), wanted.cpu()), "saved blocks differ")
    pool[:, ids] = 0
    if pool.is_cuda:
        torch.cuda.synchronize()
    seconds_of(copier, [copy_of(CopyKind.LOAD, ids, slots)])
    require(torch.equal(pool[:, ids], wanted), "loaded blocks differ")
