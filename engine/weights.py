"""From safetensors files to the memory of a model.

Life of a load
    1. `open_checkpoint` (`checkpoint_files.py`) finds the files, sharded by an index or one, and
       reads their headers: name, type and shape of each tensor, checked against what the model
       needs, so a wrong checkpoint is refused before any byte is copied.
    2. `load_weights` brings module by module from the mapped files into the model's own memory,
       converting on the way: types, quantised layouts, and plain floats to what the model keeps
       them as. Merged matrices are filled by slices. Nothing is held twice: at most one matrix
       is on its way.
    3. `fill_dummy` stands in for both when only the speed matters.

A view is memory to fill, named `<module>.<kind>` (`engine/weight_views.py`).

Every fault of the files is a `ConfigError` that names the file and the tensor.
"""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch

from engine.checkpoint_files import Checkpoint, CheckpointReader
from engine.kv_scales import KV_SCALE_KINDS, fill_kv_scales, is_kv_scale
from engine.stored_matrices import FLOATS, PlainMatrix, bad, stored_matrix
from engine.tensor_parallel.shard import WHOLE, Shard
from engine.weight_views import (
    by_module,
    cut,
    fill,
    fill_weights,
    is_quantized,
    matrix_shape,
    num_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cluster.startup import Phase
    from engine.models.quantization import Quantization
    from engine.stored_matrices import StoredMatrix
    from engine.weight_views import Modules

__all__ = ["fill_dummy", "load_weights", "num_bytes", "plain_modules"]

_DUMMY_STD = 0.02  # what these families are initialised with before training
_DUMMY_INPUT_SCALE = 0.02  # room for normed inputs, a few of which exceed 5


def plain_modules(
    checkpoint: Checkpoint | None, quantization: Quantization | None
) -> frozenset[str]:
    """Modules that a quantised checkpoint has left as plain floats."""
    if checkpoint is None or quantization is None or quantization.on_load:
        return frozenset()
    return frozenset(
        name.removesuffix(".weight")
        for name, header in checkpoint.headers.items()
        if name.endswith(".weight") and header.dtype in FLOATS
    )


def load_weights(
    checkpoint: Checkpoint,
    views: Mapping[str, torch.Tensor],
    progress: Phase,
    quantization: Quantization | None = None,
    shard: Shard = WHOLE,
) -> None:
    """Fill every view from the tensors of its module, or from the part that the shard has;
    `progress` advances in bytes filled.

    `quantization`: how the checkpoint is stored.
    """
    modules = by_module(views)
    device = next(iter(views.values())).device
    with ExitStack() as stack:
        reader = CheckpointReader(checkpoint, device, stack)
        matrices = _check_complete(checkpoint, modules, quantization, reader, shard)
        module_of = {matrix.names[0]: module for module, matrix in matrices.items()}
        for name in reader.names_in_order():
            module, _, kind = name.rpartition(".")
            if name in module_of:
                module = module_of[name]
                kinds, matrix = modules[module], matrices[module]
                if isinstance(matrix, PlainMatrix) and not is_quantized(kinds):
                    filled = fill(kinds["weight"], reader.read_part(name, shard))
                else:
                    filled = fill_weights(module, kinds, matrix.read(reader.read), shard)
                progress.advance(filled)
            elif kind == "bias" and kind in modules.get(module, {}):
                progress.advance(fill(modules[module][kind], reader.read_part(name, shard)))
        for module, kinds in modules.items():
            if kinds.keys() & KV_SCALE_KINDS:
                fill_kv_scales(module, kinds, checkpoint.headers, reader.read, shard)


def fill_dummy(
    views: Mapping[str, torch.Tensor], seed: int, progress: Phase, shard: Shard = WHOLE
) -> None:
    """Random weights of a realistic scale, the same for the same seed however many shards there
    are: each tensor is drawn whole, from a seed of its own. Drawn on the device of the first
    view, wherever the others are.

    What is kept quantised is drawn as bfloat16 and quantised; scales of KV are one.
    """
    device = next(iter(views.values())).device
    for module, kinds in by_module(views).items():
        if is_quantized(kinds):
            shape = shard.whole_shape(f"{module}.weight", matrix_shape(kinds))
            drawn = _drawn(f"{module}.weight", seed, shape, torch.bfloat16, device)
            fill_weights(module, kinds, drawn, shard)
        for kind, view in kinds.items():
            name = f"{module}.{kind}"
            if kind in KV_SCALE_KINDS or name.endswith("norm.weight"):
                view.fill_(1.0)
            elif kind == "input_scale":
                view.fill_(_DUMMY_INPUT_SCALE)
            elif kind == "bias" or not is_quantized(kinds):
                shape = shard.whole_shape(name, view.shape)
                view.copy_(cut(name, _drawn(name, seed, shape, view.dtype, device), shard))
        progress.advance(sum(map(num_bytes, kinds.values())))


def _drawn(
    name: str, seed: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Normal numbers from a seed of this tensor's own."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest()
    generator = torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little"))
    drawn = torch.empty(shape, dtype=dtype, device=device)
    return drawn.normal_(0.0, _DUMMY_STD, generator=generator)


def _check_complete(
    checkpoint: Checkpoint,
    modules: Modules,
    quantization: Quantization | None,
    reader: CheckpointReader,
    shard: Shard,
) -> dict[str, StoredMatrix]:
    """The stored matrices of all modules; raises `ConfigError` unless they and nothing else
    make up the model."""
    headers = checkpoint.headers
    found = {name: stored_matrix(name, headers, quantization) for name in modules}
    matrices = {name: matrix for name, matrix in found.items() if matrix is not None}
    biases = {f"{module}.bias" for module, kinds in modules.items() if "bias" in kinds}
    missing = [
        f"{module}.weight"
        for module, kinds in modules.items()
        if module not in matrices and not kinds.keys() <= KV_SCALE_KINDS
    ]
    missing += [name for name in biases if name not in headers]
    if missing:
        raise bad(f"the checkpoint lacks {_listed(missing)}")
    used = {name for matrix in matrices.values() for name in matrix.names} | biases
    # A tensor that is not used (a bias, an adapter) would silently give other answers.
    unknown = [name for name in headers if name not in used and not _is_redundant(name, reader)]
    if unknown and shard.rank == 0:  # other ranks have not all of them
        raise bad(f"the checkpoint has tensors that this model does not use: {_listed(unknown)}")
    for module, matrix in matrices.items():
        wanted = shard.whole_shape(f"{module}.weight", matrix_shape(modules[module]))
        _check_shape(matrix.names[0], matrix.shape, wanted)
    for name in biases:
        kinds = modules[name.removesuffix(".bias")]
        _check_shape(name, headers[name].shape, shard.whole_shape(name, kinds["bias"].shape))
        if headers[name].dtype not in FLOATS:
            raise bad(f"{name} is stored as {headers[name].dtype}")
    return matrices


def _check_shape(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if shape != wanted:
        raise bad(f"{name} has shape {list(shape)}; config.json asks for {list(wanted)}")


def _is_redundant(name: str, reader: CheckpointReader) -> bool:
    """Derived tensors that some exporters store: rotary tables, a tied output matrix, scales of
    what is not quantised here; and biases of zeros, which GPTQ's exporter adds to every matrix."""
    if name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight" or is_kv_scale(name):
        return True
    if name.endswith((".q_scale", ".prob_scale", ".input_scale")):
        return True
    return name.endswith(".bias") and not reader.read(name).any()


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
