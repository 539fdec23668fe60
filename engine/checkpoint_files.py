"""The files of a checkpoint: which there are, what they hold, and one name for it all.

Every fault of theirs is a `ConfigError` that names the file and the tensor.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from engine.kv_scales import is_kv_scale
from engine.models.json_facts import read_json_object
from engine.stored_matrices import TensorHeader, bad

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import ExitStack
    from pathlib import Path

    import torch

    from engine.models.config import ModelConfig
    from engine.tensor_parallel.shard import Shard


INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
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


class CheckpointReader:
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
