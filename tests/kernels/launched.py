"""A process that says what becomes of kernels where they are compiled, not interpreted.

It needs no GPU: it pretends that torch has CUDA, and Triton launches nothing. In a process of its
own because Triton decides at its import, see TRITON_INTERPRET.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import SimpleNamespace
from typing import Any

import torch
import triton

import kernels
from kernels import launch

torch.version.cuda = "13.0"
launch._device_of_cuda = lambda: 0
launch._stream_of_cuda = lambda device: 7

from kernels.silu_mul import _silu_mul_kernel  # noqa: E402
from kernels.thin_linear import _thin_kernel  # noqa: E402


def all_kernels() -> dict[str, Any]:
    """Every kernel of the package that is launched, by name."""
    found = pkgutil.iter_modules(kernels.__path__)
    modules = [importlib.import_module(f"kernels.{each.name}") for each in found]
    return {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if name.endswith("_kernel") and isinstance(value, triton.JITFunction)
    }


def is_readable(kernel: Any) -> bool:
    """Whether what is given at run time stands in front of all constants."""
    constants = [parameter.is_constexpr for parameter in kernel.params]
    return constants == sorted(constants)


def launched() -> list[Any]:
    """What three like launches of a kernel came to."""
    calls = []

    def run(*args: object, grid: Any, warmup: bool, **named: object) -> Any:
        calls.append("triton")
        return SimpleNamespace(
            function=5, packed_metadata=(4, 1, 0), run=lambda *given: calls.append(given[:5])
        )

    _silu_mul_kernel.run = run
    x = torch.zeros(2048)
    for grid in ((2,), (2, 3), lambda _: (2,)):
        _silu_mul_kernel[grid](x, x, 1, SIZE=1024, BLOCK=1024, CHAINED=False, num_warps=4)
    return calls


if __name__ == "__main__":
    kernels_here = all_kernels()
    assert len(kernels_here) > 25
    print(*(name for name, kernel in kernels_here.items() if not is_readable(kernel)))
    print(all(isinstance(each.launches, launch.Launches) for each in kernels_here.values()))
    print(_thin_kernel.is_gluon(), _silu_mul_kernel.is_gluon(), type(_silu_mul_kernel).__name__)
    print(launched())
