"""From safetensors files to the memory of a model.

Life of a load
    1. `open_checkpoint` finds the files (sharded by an index, or one) and reads their headers:
       name, type and shape of each tensor, checked against what the model needs, so a wrong
       checkpoint is refused before any byte is copied.
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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from engine.kv_scales import KV_SCALE_KINDS, fill_kv_scales, is_kv_scale
from engine.models.json_facts import read_json_object
from engine.stored_matrices import FLOATS, PlainMatrix, TensorHeader, bad, stored_matrix
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
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from cluster.startup import Phase
    from engine.models.config import ModelConfig
    from engine.models.quantization import Quantization
    from engine.stored_matrices import StoredMatrix
    from engine.weight_views import Modules

__all__ = [
    "Checkpoint",
    "dummy_fingerprint",
    "fill_dummy",
    "fingerprint",
    "load_weights",
    "num_bytes",
    "open_checkpoint",
    "plain_modules",
]

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_DUMMY_STD = 0.02  # what these families are initialised with before training
_DUMMY_INPUT_SCALE = 0.02  # room for normed inputs, a few of which exceed 5
_SAMPLES_PER_FILE = 64
_SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Files whose headers were read, in the order of the bytes."""

    files: tuple[Path, ...]
    headers: Mapping[str, TensorHeader]


def open_checkpoint(folder: Path) -> Checkpoint:
    """Raises `ConfigError` when there are no safetensors, or one cannot be read."""
    files = _checkpoint_files(folder)
    headers: dict[str, TensorHeader] = {}
    for path in files:
        for header in _read_headers(path):
            if header.name in headers:
                raise bad(f"{header.name} is in {headers[header.name].path.name} and {path.name}")
            headers[header.name] = header
    return Checkpoint(files, headers)


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
        reader = _Reader(checkpoint, device, stack)
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


def fingerprint(config: ModelConfig, checkpoint: Checkpoint) -> str:
    """Hex digest that differs between models with other facts, other tensors or other values.

    Reads every name, type and shape, and 64 samples of each file rather than all of it: enough
    to tell apart fine-tunes of one model, at no cost in start-up time.
    """
    digest = hashlib.sha256(repr(config).encode())
    for name in sorted(checkpoint.headers):
        header = checkpoint.headers[name]
        digest.update(f"{name} {header.dtype} {header.shape}\n".encode())
        if is_kv_scale(name):  # samples may miss a number that all KV depends on
            digest.update(_tensor_bytes(header))
    for path in checkpoint.files:
        size = path.stat().st_size
        step = max(_SAMPLE_BYTES, size // _SAMPLES_PER_FILE)
        with path.open("rb") as file:
            for offset in range(0, size, step):
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]


def dummy_fingerprint(config: ModelConfig, seed: int) -> str:
    """The same for weights that `fill_dummy` draws: equal where they are equal."""
    return hashlib.sha256(f"dummy {seed} {config!r}".encode()).hexdigest()[:32]


def _checkpoint_files(folder: Path) -> tuple[Path, ...]:
    if (folder / INDEX_FILE).is_file():
        weight_map = read_json_object(folder / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise bad(f"{INDEX_FILE} has no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if "/" in name or not (folder / name).is_file():
                raise bad(f"{INDEX_FILE} names {name}, which is not in {folder}")
        return tuple(folder / name for name in names)
    if (folder / SINGLE_FILE).is_file():
        return (folder / SINGLE_FILE,)
    raise bad(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}")


def _read_headers(path: Path) -> list[TensorHeader]:
    headers = []
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.offset_keys():
                stored = file.get_slice(name)
                headers.append(
                    TensorHeader(name, path, stored.get_dtype(), tuple(stored.get_shape()))
                )
    except (OSError, SafetensorError) as error:
        raise bad(f"{path.name} is not a whole safetensors file: {error}") from error
    return headers


def _tensor_bytes(header: TensorHeader) -> bytes:
    with safe_open(header.path, framework="pt") as file:
        values: torch.Tensor = file.get_tensor(header.name)
    return repr(values.flatten().tolist()).encode()


class _Reader:
    """Tensors by name from all files of a checkpoint, which stay open as long as `stack`."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, stack: ExitStack) -> None:
        self._headers = checkpoint.headers
        self._device = device
        self._files: dict[Path, Any] = {}
        for path in checkpoint.files:
            try:
                self._files[path] = stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise bad(f"{path.name} cannot be read: {error}") from error

    def names_in_order(self) -> Iterator[str]:
        """As their bytes lie in the files."""
        for file in self._files.values():
            yield from file.offset_keys()

    def read(self, name: str) -> torch.Tensor:
        path = self._headers[name].path
        try:
            tensor: torch.Tensor = self._files[path].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise bad(f"{path.name} cannot be read: {error}") from error
        return tensor.to(self._device)

    def read_part(self, name: str, shard: Shard) -> torch.Tensor:
        """What the shard has of a plain tensor; nothing else of it is read."""
        dim = shard.cut_dim(name)
        if dim is None:
            return self.read(name)
        path, shape = self._headers[name].path, self._headers[name].shape
        begin, count = shard.range_of(shape[dim])
        place = (slice(None),) * dim + (slice(begin, begin + count),)
        try:
            part: torch.Tensor = self._files[path].get_slice(name)[place]
        except (OSError, SafetensorError) as error:
            raise bad(f"{path.name} cannot be read: {error}") from error
        return part.to(self._device)


def _check_complete(
    checkpoint: Checkpoint,
    modules: Modules,
    quantization: Quantization | None,
    reader: _Reader,
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


def _is_redundant(name: str, reader: _Reader) -> bool:
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
