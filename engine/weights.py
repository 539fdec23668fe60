"""From safetensors files to the memory of a model.

Life of a load
    1. `open_checkpoint` finds the files (sharded by an index, or one) and reads their headers:
       name, type and shape of each tensor, checked against what the model needs, so a wrong
       checkpoint is refused before any byte is copied.
    2. `load_weights` copies tensor by tensor from the mapped file into the model's own memory,
       converting the type on the way. Merged matrices are filled by slices. Nothing is held
       twice: at most one tensor is on its way.
    3. `fill_dummy` stands in for both when only the speed matters.

Every fault of the files is a `ConfigError` that names the file and the tensor.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open

from cluster.errors import ConfigError
from engine.models.json_facts import read_json_object
from engine.tensor_parallel.shard import WHOLE, Shard

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from cluster.startup import Phase
    from engine.models.config import ModelConfig

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_LOADABLE = ("BF16", "F16", "F32")
_DUMMY_STD = 0.02  # what these families are initialised with before training
_SAMPLES_PER_FILE = 64
_SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor as its file describes it."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]


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
                raise _bad(f"{header.name} is in {headers[header.name].path.name} and {path.name}")
            headers[header.name] = header
    return Checkpoint(files, headers)


def load_weights(
    checkpoint: Checkpoint,
    views: Mapping[str, torch.Tensor],
    progress: Phase,
    shard: Shard = WHOLE,
) -> None:
    """Fill every view from the tensor of its name, or from the part of it that the shard has;
    `progress` advances in bytes filled."""
    _check_complete(checkpoint, views, shard)
    for path in checkpoint.files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.offset_keys():
                    if name in views:
                        views[name].copy_(_part(file, name, shard))
                        progress.advance(num_bytes(views[name]))
        except (OSError, SafetensorError) as error:
            raise _bad(f"{path.name} cannot be read: {error}") from error


def fill_dummy(
    views: Mapping[str, torch.Tensor], seed: int, progress: Phase, shard: Shard = WHOLE
) -> None:
    """Random weights of a realistic scale, drawn on the device, the same for the same seed
    however many shards there are: each tensor is drawn whole, from a seed of its own."""
    for name, view in views.items():
        if name.endswith("norm.weight"):
            view.fill_(1.0)
        else:
            dim = shard.cut_dim(name)
            whole = view if dim is None else view.new_empty(shard.whole_shape(name, view.shape))
            generator = torch.Generator(device=view.device).manual_seed(_seed_of(name, seed))
            whole.normal_(0.0, _DUMMY_STD, generator=generator)
            if dim is not None:
                view.copy_(whole.narrow(dim, *shard.range_of(whole.shape[dim])))
        progress.advance(num_bytes(view))


def num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def fingerprint(config: ModelConfig, checkpoint: Checkpoint) -> str:
    """Hex digest that differs between models with other facts, other tensors or other values.

    Reads every name, type and shape, and 64 samples of each file rather than all of it: enough
    to tell apart fine-tunes of one model, at no cost in start-up time.
    """
    digest = hashlib.sha256(repr(config).encode())
    for name in sorted(checkpoint.headers):
        header = checkpoint.headers[name]
        digest.update(f"{name} {header.dtype} {header.shape}\n".encode())
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
            raise _bad(f"{INDEX_FILE} has no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if "/" in name or not (folder / name).is_file():
                raise _bad(f"{INDEX_FILE} names {name}, which is not in {folder}")
        return tuple(folder / name for name in names)
    if (folder / SINGLE_FILE).is_file():
        return (folder / SINGLE_FILE,)
    raise _bad(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}")


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
        raise _bad(f"{path.name} is not a whole safetensors file: {error}") from error
    return headers


def _part(file: Any, name: str, shard: Shard) -> torch.Tensor:
    """What the shard has of a tensor; nothing else of it is read."""
    dim = shard.cut_dim(name)
    if dim is None:
        return cast("torch.Tensor", file.get_tensor(name))
    stored = file.get_slice(name)
    begin, count = shard.range_of(stored.get_shape()[dim])
    cut = (slice(None),) * dim + (slice(begin, begin + count),)
    return cast("torch.Tensor", stored[cut])


def _seed_of(name: str, seed: int) -> int:
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")


def _check_complete(
    checkpoint: Checkpoint, views: Mapping[str, torch.Tensor], shard: Shard
) -> None:
    headers = checkpoint.headers
    missing = [name for name in views if name not in headers]
    if missing:
        raise _bad(f"the checkpoint lacks {_listed(missing)}")
    # A tensor that is not used (a bias, an adapter) would silently give other answers.
    unknown = [name for name in headers if name not in views and not _is_redundant(name)]
    if unknown and shard.rank == 0:  # other ranks have not all of them
        raise _bad(f"the checkpoint has tensors that this model does not use: {_listed(unknown)}")
    for name, view in views.items():
        header = headers[name]
        wanted = shard.whole_shape(name, view.shape)
        if header.shape != wanted:
            asked = list(wanted)
            raise _bad(f"{name} has shape {list(header.shape)}; config.json asks for {asked}")
        if header.dtype not in _LOADABLE:
            raise _bad(f"{name} is stored as {header.dtype}; supported are {', '.join(_LOADABLE)}")


def _is_redundant(name: str) -> bool:
    """Derived tensors that some exporters store: rotary tables, and a tied output matrix."""
    return name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _bad(problem: str) -> ConfigError:
    return ConfigError(f"Cannot load the model: {problem}.", param="model")
