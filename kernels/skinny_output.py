"""What becomes of a tile's sums: scaled, activated, added, rounded once. For `skinny_stream`."""

from __future__ import annotations

from kernels.gluon_api import gl, gluon_jit
from kernels.skinny_peers import send


@gluon_jit
def _finish(
    sums: gl.tensor, FACTOR: gl.constexpr, scale_ptr: gl.tensor, scale_stride: gl.tensor,
    bias_ptr: gl.tensor, column: gl.tensor, OUTPUTS: gl.constexpr,
) -> gl.tensor:  # fmt: skip
    """The sum over the warps, times what was left out of it."""
    y = gl.sum(sums, axis=0) * FACTOR
    if scale_ptr is not None:
        y *= gl.load(scale_ptr + column * scale_stride, mask=column < OUTPUTS, other=0.0)
    if bias_ptr is not None:
        y += gl.load(bias_ptr + column, mask=column < OUTPUTS, other=0.0).to(gl.float32)
    return y


@gluon_jit
def write(
    sums: gl.tensor, up_sums: gl.tensor, FACTOR: gl.constexpr, scale_ptr: gl.tensor,
    scale_stride: gl.tensor, bias_ptr: gl.tensor, residual: gl.tensor, out_ptr: gl.tensor,
    column: gl.tensor, target: gl.tensor, mask: gl.tensor, inboxes_ptr: gl.tensor,
    epoch: gl.tensor, OUT: gl.constexpr, GATED: gl.constexpr, RANK: gl.constexpr,
    SIZE: gl.constexpr, CAPACITY: gl.constexpr,
) -> None:  # fmt: skip
    """To out, or to all SIZE ranks."""
    if GATED:
        y = _finish(sums, FACTOR, scale_ptr, scale_stride, bias_ptr, column, OUT)
        up = _finish(up_sums, FACTOR, scale_ptr, scale_stride, bias_ptr, column + OUT, 2 * OUT)
        y = y / (1.0 + gl.exp(-y)) * up
    else:
        y = _finish(sums + up_sums, FACTOR, scale_ptr, scale_stride, bias_ptr, column, OUT)
    if residual is not None:
        y += residual
    if SIZE > 1:
        send(y, target, mask, inboxes_ptr, epoch, RANK, SIZE, CAPACITY)
    else:
        gl.store(out_ptr + target, y.to(out_ptr.dtype.element_ty), mask=mask)


@gluon_jit
def write_pairs(
    sums: gl.tensor, FACTOR: gl.constexpr, scale_ptr: gl.tensor, scale_stride: gl.tensor,
    bias_ptr: gl.tensor, residual_ptr: gl.tensor, out_ptr: gl.tensor, first: gl.tensor,
    num_rows: gl.tensor, OUT: gl.constexpr, ROWS: gl.constexpr, RESULT: gl.constexpr,
) -> None:  # fmt: skip
    """A tile of 8 gates and what is behind them."""
    PAIR: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [1, 8], [1, 0])
    line = gl.arange(0, 16, gl.SliceLayout(1, RESULT))[:, None]
    y = _finish(
        sums, FACTOR, scale_ptr, scale_stride, bias_ptr, first + line % 8 + line // 8 * OUT, 2 * OUT
    )
    gate, up = gl.split(gl.permute(gl.reshape(y, [2, 8, ROWS]), (1, 2, 0)))
    y = gl.convert_layout(gate / (1.0 + gl.exp(-gate)) * up, PAIR)
    column = first + gl.arange(0, 8, gl.SliceLayout(1, PAIR))[:, None]
    row = gl.arange(0, ROWS, gl.SliceLayout(0, PAIR))[None, :]
    mask = (column < OUT) & (row < num_rows)
    target = row * OUT + column
    if residual_ptr is not None:
        y += gl.load(residual_ptr + target, mask=mask, other=0.0).to(gl.float32)
    gl.store(out_ptr + target, y.to(out_ptr.dtype.element_ty), mask=mask)
