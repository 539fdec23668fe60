"""Launches of Triton and Gluon kernels that cost the host little more than the driver's call.

`kernel[grid](...)` of Triton finds out anew at each call what it has compiled for such arguments.
For nine of them that takes 31 us of an H200's host, where the driver and what is left here take 14,
and far more for matrices that are copied in blocks, which Triton describes in words. Here a call
that is like an earlier one goes straight to what was compiled for that.

Life of a call
    1. Of each argument is read what a kernel can be compiled for, its kind, and the number that is
       passed on, its value. Kinds, constants, options and the device are the key.
    2. A key that is new: Triton compiles and launches, and its compiled kernel is remembered.
    3. Else that kernel's launcher is called. Hooks of Triton and its check that no global variable
       of a kernel has changed are left out.

A key tells apart at least what Triton does, whose rules are: types; whether addresses and integers
are multiples of 16; whether an integer is 1, and in how many bits it fits, or that alone where the
kernel is compiled for any. Call sites pass what a kernel is given at run time by position, and
constants and options by name; any other call is left to Triton, as are all on other GPUs than
NVIDIA's and in its interpreter.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

try:
    import triton
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ImportError:
    triton = TensorDescriptor = None

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

__all__ = ["KeptLaunch", "Launches", "direct", "read", "width_of_int"]

# A torch without CUDA has neither.
_device_of_cuda: Callable[[], int] | None = getattr(torch._C, "_cuda_getDevice", None)
_stream_of_cuda: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)

# The kind of what only Triton knows how to launch with.
_STRANGE = object()
# Of this version the function in C is known that launchers call after asking for scratch memory.
_KNOWN = triton is not None and triton.__version__.startswith("3.6.")


class _Compiled(NamedTuple):
    """What is called for a key: `run(*grid, stream, *kernel, *values)`.

    owner: with it the kernel would be unloaded.
    """

    run: Callable[..., object]
    kernel: tuple[object, ...]
    owner: object

    @classmethod
    def of(cls, compiled: Any) -> _Compiled:
        """compiled: Triton's, launched before."""
        run, hooks = compiled.run, (None, None, None)  # metadata for hooks, and two hooks
        if not _KNOWN or run.global_scratch_size or run.profile_scratch_size:
            return cls(run, (compiled.function, compiled.packed_metadata, *hooks), compiled)
        modes, scratch = (run.launch_cooperative_grid, run.launch_pdl), (None, None)
        metadata = compiled.packed_metadata
        return cls(run.launch, (compiled.function, *modes, *scratch, metadata, *hooks), compiled)


class KeptLaunch(NamedTuple):
    """Of calls that differ in their values alone, which is for the caller to know: values are those
    of `read`. To find that out of arguments takes longer than all else that a launch takes."""

    run: Callable[..., object]
    kernel: tuple[object, ...]
    constants: tuple[None, ...]

    def __call__(self, num_programs: int, stream: int, *values: object) -> None:
        """On this stream, which need not be the current one."""
        self.run(num_programs, 1, 1, stream, *self.kernel, *values, *self.constants)


class Launches:
    """One kernel's: `launches(grid, *args, **named)` is `kernel[grid](*args, **named)`."""

    __slots__ = (
        "_compiled", "_constants", "_device", "_for_any", "_kernel", "_num_given", "_stream",
    )  # fmt: skip

    def __init__(
        self, kernel: Any, *, device: Callable[[], int], stream: Callable[[int], int]
    ) -> None:
        """kernel: made by `triton.jit` or `gluon.jit`. device: the index of the current one;
        stream: the handle of a device's current stream."""
        given = [not parameter.is_constexpr for parameter in kernel.params]
        self._kernel = kernel
        self._device = device
        self._stream = stream
        self._num_given = sum(given)
        if not all(given[: self._num_given]):
            self._num_given = -1  # no call is like that
        # Integers that it is compiled for all values of.
        self._for_any = [
            index
            for index, parameter in enumerate(kernel.params)
            if getattr(parameter, "do_not_specialize", False)
        ]
        # Launchers want a place for each parameter, and do not look at those of constants.
        self._constants = (None,) * (len(given) - self._num_given)
        self._compiled: dict[Hashable, _Compiled] = {}

    def __call__(self, grid: tuple[int, ...], *args: object, **named: object) -> None:
        device = self._device()
        key, kinds, values = self._read(device, args, named)
        compiled = self._compiled.get(key)
        if compiled is None:
            ran = self._kernel.run(*args, grid=grid, warmup=False, **named)
            if len(args) == self._num_given and _STRANGE not in kinds:
                self._remember(key, ran)
            return
        run, kernel, _ = compiled
        x, y, z = (*grid, 1, 1)[:3]
        run(x, y, z, self._stream(device), *kernel, *values, *self._constants)

    def kept(self, *args: object, **named: object) -> KeptLaunch | None:
        """How a call like this one was launched before; None if none was."""
        key, _, _ = self._read(self._device(), args, named)
        compiled = self._compiled.get(key)
        return None if compiled is None else KeptLaunch(*compiled[:2], self._constants)

    def _read(
        self, device: int, args: tuple[object, ...], named: dict[str, object]
    ) -> tuple[Hashable, list[Any], list[object]]:
        """The key, and what `read` gives."""
        kinds, values = read(args)
        if len(args) == self._num_given:
            for index in self._for_any:
                if type(args[index]) is int:
                    kinds[index] = width_of_int(args[index])
        return (device, tuple(kinds), tuple(named), tuple(named.values())), kinds, values

    def _remember(self, key: Hashable, ran: Any) -> None:
        """ran: what Triton says that it launched; unknown versions may say anything else."""
        if isinstance(getattr(ran, "function", None), int):
            self._compiled[key] = _Compiled.of(ran)


def direct(kernel: Any) -> Any:
    """The same kernel, launched by `Launches` where that is possible: `kernel[grid](...)`."""
    if triton is None or not isinstance(kernel, triton.JITFunction):
        return kernel
    if torch.version.cuda is None or _device_of_cuda is None or _stream_of_cuda is None:
        return kernel
    kernel.launches = Launches(kernel, device=_device_of_cuda, stream=_stream_of_cuda)
    kernel.__class__ = _launched_directly(type(kernel))
    return kernel


def _launched_directly(kind: Any) -> type:
    """A class of the same name, which Triton asks for now and then."""

    def launch(kernel: Any, grid: Any) -> Any:
        if callable(grid):
            return kind.__getitem__(kernel, grid)
        return partial(kernel.launches, grid)

    return type(kind.__name__, (kind,), {"__getitem__": launch})


def read(args: Sequence[object]) -> tuple[list[Any], list[object]]:
    """Kinds and values, one each for every argument; both are compared or passed on only.

    The value of a CUDA tensor is its address; launchers check any other tensor themselves.
    """
    kinds: list[Any] = []
    values: list[object] = []
    for arg in args:
        if isinstance(arg, torch.Tensor):
            address = arg.data_ptr()
            kinds.append(arg.dtype if address % 16 == 0 else ("unaligned", arg.dtype))
            values.append(address if arg.is_cuda else arg)
        elif type(arg) is int:
            kinds.append(_kind_of_int(arg))
            values.append(arg)
        elif arg is None or type(arg) is float or type(arg) is bool:
            kinds.append(type(arg))
            values.append(arg)
        elif type(arg) is tuple:
            inner_kinds, inner_values = read(arg)
            kinds.append(_STRANGE if _STRANGE in inner_kinds else ("tuple", *inner_kinds))
            values.append(tuple(inner_values))
        else:
            kinds.append(_kind_of_other(arg))
            values.append(arg)
    return kinds, values


def width_of_int(value: Any) -> str:
    """The kind of one that its kernel is compiled for all values of."""
    if -(1 << 31) <= value < 1 << 31:
        return "i32"
    return "i64" if -(1 << 63) <= value < 1 << 63 else "u64"


def _kind_of_int(value: int) -> Hashable:
    if value == 1:
        return "one"
    if -(1 << 31) <= value < 1 << 31:
        return value % 16 == 0
    return value % 16 == 0, -(1 << 63) <= value < 1 << 63


def _kind_of_other(arg: Any) -> Hashable:
    """Of a matrix that is copied in blocks, what these are like."""
    if isinstance(arg, TensorDescriptor):
        return arg.base.dtype, tuple(arg.block_shape), arg.layout
    return _STRANGE
