"""Layers whose weights live in main memory and visit the GPU for the time they are used.

Life of an offloaded layer
    1. `offloaded_layers` chooses which, spread evenly, so that the others hide their copies.
    2. `take_out` gives it memory of the host while the decoder is built, so a model need not fit
       on the GPU to be loaded. The loader fills that.
    3. `adopt`, once filled: the layer is packed on the device, and its bytes move into pinned
       memory. `finish`, after the last: its tensors become views of one of two buffers there.
    4. Each pass: `begin` starts the first two copies on a stream of their own; `enter` makes the
       computation wait for the layer's copy; `leave` gives its buffer to the layer after the
       next. The same calls are captured into CUDA graphs, where events become edges.

A pass over offloaded layers takes at least their bytes over the rate of the bus.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from cluster.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from collections.abc import Sequence as SequenceOf

    from engine.models.decoder_layer import DecoderLayer

GIB = 1 << 30
NUM_BUFFERS = 2
# What a kernel may ask of the address of a tensor.
_ALIGNMENT = 256
# Torch's pinned allocator rounds up to powers of two: pieces of one waste the rest of the last.
_PIECE_BYTES = 64 << 20


def offloaded_layers(gib: float, layer_bytes: SequenceOf[int]) -> tuple[int, ...]:
    """Indices of the fewest layers whose absence frees `gib` GiB, the two buffers counted.

    Raises `ConfigError` when all of them together free less.
    """
    if gib == 0.0:
        return ()
    buffers = NUM_BUFFERS * max(layer_bytes)
    for number in range(NUM_BUFFERS + 1, len(layer_bytes) + 1):
        chosen = _spread(number, len(layer_bytes))
        if sum(layer_bytes[index] for index in chosen) - buffers >= gib * GIB:
            return chosen
    most = max(0, sum(layer_bytes) - buffers) / GIB
    raise ConfigError(
        f"--cpu-offload-gb {gib:g} is more than the layers of this model can free: {most:.2f}, "
        f"beside two buffers of {max(layer_bytes) / GIB:.2f} GiB.",
        param="cpu_offload_gb",
    )


def _spread(number: int, total: int) -> tuple[int, ...]:
    return tuple((2 * index + 1) * total // (2 * number) for index in range(number))


def tensor_bytes(layer: DecoderLayer) -> int:
    """Of all weights of a layer, which may have no memory yet (device "meta")."""
    return sum(slot.tensor.nbytes for slot in _slots(layer))


class Slot(NamedTuple):
    """An attribute that holds a tensor of weights."""

    owner: Any
    name: str
    tensor: torch.Tensor

    def bind(self, tensor: torch.Tensor) -> None:
        setattr(self.owner, self.name, tensor)


class _Place(NamedTuple):
    """Where in the bytes of its layer a slot's tensor lies; offset and strides in elements."""

    slot: Slot
    offset: int

    def view_in(self, buffer: torch.Tensor) -> torch.Tensor:
        tensor = self.slot.tensor
        view = torch.empty(0, dtype=tensor.dtype, device=buffer.device)
        return view.set_(buffer.untyped_storage(), self.offset, tensor.shape, tensor.stride())


class _Home(NamedTuple):
    """The bytes of one layer in pinned memory, in pieces, and where its tensors lie in them."""

    pieces: tuple[torch.Tensor, ...]
    places: tuple[_Place, ...]

    @property
    def num_bytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)

    def copy_to(self, buffer: torch.Tensor) -> None:
        begin = 0
        for piece in self.pieces:
            buffer[begin : begin + piece.nbytes].copy_(piece, non_blocking=True)
            begin += piece.nbytes


class OffloadedLayers:
    """Not thread-safe. On a CPU, where tests run it, copies happen when they are started."""

    def __init__(self, layer_bytes: Mapping[int, int], device: torch.device) -> None:
        """`layer_bytes`: bytes of the weights of each offloaded layer, by its index."""
        self._device = device
        self._layer_bytes = layer_bytes
        self._turn_of = {index: turn for turn, index in enumerate(sorted(layer_bytes))}
        self._homes: list[_Home] = []  # by turn
        self._buffers: list[torch.Tensor] = []
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._fetched, self._used = (
                [torch.cuda.Event() for _ in layer_bytes]  # type: ignore[no-untyped-call]
                for _ in range(2)
            )

    def __contains__(self, index: int) -> bool:
        return index in self._turn_of

    @property
    def layers_bytes(self) -> int:
        return sum(self._layer_bytes.values())

    @property
    def freed_bytes(self) -> int:
        """Bytes of the device that they would take, less the two buffers."""
        return self.layers_bytes - NUM_BUFFERS * max(self._layer_bytes.values())

    def shown(self) -> str:
        """What was moved where, for people."""
        return (
            f"layers {', '.join(map(str, self._turn_of))}: {self.host_bytes / GIB:.2f} GiB in "
            f"pinned memory, {self.buffer_bytes / GIB:.2f} GiB of buffers on {self._device}; each "
            f"step fetches them all"
        )

    @property
    def host_bytes(self) -> int:
        return sum(home.num_bytes for home in self._homes)

    @property
    def buffer_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers)

    def take_out(self, layer: DecoderLayer) -> None:
        """Memory of the host for its weights, empty."""
        for slot in _slots(layer):
            slot.bind(torch.empty_like(slot.tensor, device="cpu"))

    def adopt(self, layer: DecoderLayer) -> None:
        """Filled layers, in order: pack, and move to where they are fetched from."""
        for slot in _slots(layer):
            slot.bind(slot.tensor.to(self._device))
        for matrix in layer.matrices():
            matrix.pack()
        places, num_bytes = _layout(list(_slots(layer)))
        filled = torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)
        away = []
        for place in places:
            place.view_in(filled).copy_(place.slot.tensor)
            # Shape, strides and type are all that is kept.
            absent = place.slot._replace(tensor=place.slot.tensor.to("meta"))
            absent.bind(absent.tensor)
            away.append(place._replace(slot=absent))
        pieces = tuple(_pinned(piece) for piece in torch.split(filled, _PIECE_BYTES))
        self._homes.append(_Home(pieces, tuple(away)))

    def finish(self) -> None:
        """After the last layer: the tensors of all become views of the buffers."""
        largest = max(home.num_bytes for home in self._homes)
        self._buffers = [
            torch.empty(largest, dtype=torch.uint8, device=self._device) for _ in range(NUM_BUFFERS)
        ]
        for turn, home in enumerate(self._homes):
            for place in home.places:
                place.slot.bind(place.view_in(self._buffers[turn % NUM_BUFFERS]))

    def begin(self) -> None:
        """A pass starts on the current stream."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        for turn in range(min(NUM_BUFFERS, len(self._homes))):
            self._fetch(turn)

    def enter(self, index: int) -> None:
        """What is queued next reads the weights of layer `index`."""
        turn = self._turn_of.get(index)
        if turn is not None and self._stream is not None:
            torch.cuda.current_stream(self._device).wait_event(self._fetched[turn])

    def leave(self, index: int) -> None:
        """All that reads the weights of layer `index` is queued."""
        turn = self._turn_of.get(index)
        if turn is None or turn + NUM_BUFFERS >= len(self._homes):
            return
        if self._stream is not None:
            self._used[turn].record(torch.cuda.current_stream(self._device))
            self._stream.wait_event(self._used[turn])
        self._fetch(turn + NUM_BUFFERS)

    def _fetch(self, turn: int) -> None:
        home, buffer = self._homes[turn], self._buffers[turn % NUM_BUFFERS]
        if self._stream is None:
            home.copy_to(buffer)
            return
        with torch.cuda.stream(self._stream):
            home.copy_to(buffer)
            self._fetched[turn].record(self._stream)


def _slots(holder: Any) -> Iterator[Slot]:
    """The tensors of a layer and of its matrices, whatever class these are of."""
    for name in _attributes(holder):
        value = getattr(holder, name, None)
        if isinstance(value, torch.Tensor):
            yield Slot(holder, name, value)
        elif hasattr(value, "checkpoint_views"):
            yield from _slots(value)


def _attributes(holder: Any) -> list[str]:
    names = [name for base in type(holder).__mro__ for name in getattr(base, "__slots__", ())]
    return sorted({*names, *getattr(holder, "__dict__", {})} - {"__dict__", "__weakref__"})


def _layout(slots: SequenceOf[Slot]) -> tuple[list[_Place], int]:
    """Where each tensor of a layer lies, and the bytes of them all.

    By storage: two tensors over the same memory, a matrix and its transpose, stay that.
    """
    begins: dict[int, int] = {}
    end = 0
    places = []
    for slot in slots:
        storage = slot.tensor.untyped_storage()
        if storage.data_ptr() not in begins:
            begins[storage.data_ptr()] = end
            end += -(-storage.nbytes() // _ALIGNMENT) * _ALIGNMENT
        begin = begins[storage.data_ptr()] // slot.tensor.element_size()
        places.append(_Place(slot, begin + int(slot.tensor.storage_offset())))
    return places, end


def _pinned(piece: torch.Tensor) -> torch.Tensor:
    host = torch.empty(piece.nbytes, dtype=torch.uint8, pin_memory=piece.is_cuda)
    return host.copy_(piece)
