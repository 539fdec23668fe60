"""What this GPU reaches in the simplest programs: the limits that every figure stands beside.

The copy is timed as an elementwise kernel over 2 GiB. `Tensor.copy_` is no measure inside a CUDA
graph: there it becomes a memcpy node, which the copy engines run (2.7 TB/s on an H200) and not the
multiprocessors (4.2 TB/s). Both are measured, the faster one is the limit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.kernels.timing import median_seconds

COPY_BYTES = 2 << 30
PINNED_BYTES = 512 << 20
MATMUL_SIZE = 8192


@dataclass(frozen=True, slots=True)
class Ceilings:
    """copy: bytes read and written per second. matmul: FLOP per second, bfloat16."""

    copy: float
    matmul: float

    def floor_seconds(self, num_bytes: float, num_flops: int) -> float:
        return max(num_bytes / self.copy, num_flops / self.matmul)

    def line(self) -> str:
        return f"copy {self.copy / 1e12:.2f} TB/s, product {self.matmul / 1e12:.0f} TFLOP/s"


def measure_ceilings() -> Ceilings:
    ceilings = Ceilings(copy_bandwidth(), matmul_rate())
    torch.cuda.empty_cache()
    return ceilings


def copy_bandwidth() -> float:
    """Of random numbers, neither of the two tensors in any cache."""
    source = torch.empty(COPY_BYTES // 2, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    memcpy = median_seconds(lambda: target.copy_(source))
    kernel = median_seconds(lambda: torch.neg(source, out=target))
    return 2 * COPY_BYTES / min(memcpy, kernel)


def matmul_rate() -> float:
    """Of random numbers: zeros draw less power and run faster. In short bursts, since a GPU that
    multiplies for long lowers its clock below what a layer of a model meets."""
    a, b = (
        torch.randn(MATMUL_SIZE, MATMUL_SIZE, dtype=torch.bfloat16, device="cuda") for _ in range(2)
    )
    out = torch.empty_like(a)
    return 2 * MATMUL_SIZE**3 / median_seconds(lambda: torch.mm(a, b, out=out))


def pinned_copy_rate() -> float:
    """Bytes per second from pinned main memory to the GPU: the limit of weights that live there."""
    host = torch.empty(PINNED_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(PINNED_BYTES, dtype=torch.uint8, device="cuda")
    return PINNED_BYTES / median_seconds(lambda: target.copy_(host, non_blocking=True))
