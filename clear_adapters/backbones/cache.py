"""A key-value cache that forks for free: contexts share storage until two of them append at the same place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clear_adapters.backbones.base import Context


@dataclass
class _Storage:
    """Keys and values of every layer, (layers, 2, B, H, capacity, d), and how far some context has read."""

    data: Tensor
    used: int


class Cache:
    """One context's view of a storage."""

    def __init__(self, storage: _Storage) -> None:
        self._storage = storage

    @classmethod
    def empty(
        cls, layers: int, rows: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> Cache:
        """A cache with nothing in it."""
        return cls(_Storage(torch.empty(layers, 2, rows, heads, 0, head_dim, dtype=dtype, device=device), 0))

    def reserve(self, length: int, more: int) -> Pass:
        """A pass that writes `more` entries behind `length`; copies when they are not free to write."""
        s = self._storage
        if s.used > length or s.data.shape[4] < length + more:
            capacity = max(length + more, 2 * length, 64)
            shape = list(s.data.shape)
            shape[4] = capacity
            # Zeros: what is masked still takes part in a sum, where NaN would spread.
            data = s.data.new_zeros(shape)
            data[..., :length, :] = s.data[..., :length, :]
            s = _Storage(data, length)
        return Pass(s, length, length + more)

    def gather(self, index: Tensor, length: int) -> Cache:
        """Some rows, copied."""
        return Cache(_Storage(self._storage.data[:, :, index, :, :length].clone(), length))

    def read(self, length: int) -> Tensor:
        """(layers, 2, B, H, length, d), a view."""
        return self._storage.data[..., :length, :]


class Pass:
    """Room for one forward: the layers write into it; `commit` keeps it, otherwise the next pass overwrites it."""

    def __init__(self, storage: _Storage, start: int, stop: int) -> None:
        self._storage = storage
        self.start = start
        self.stop = stop

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes (B, H, L, d) and gives everything read so far and now, (B, H, stop, d)."""
        data = self._storage.data[layer]
        data[0, :, :, self.start : self.stop] = keys
        data[1, :, :, self.start : self.stop] = values
        return data[0, :, :, : self.stop], data[1, :, :, : self.stop]

    def commit(self, length: int | None = None) -> Cache:
        """The cache with the written entries read; of them only those below `length`, where it is given."""
        self._storage.used = self.stop if length is None else length
        return Cache(self._storage)

    def release(self, length: int) -> None:
        """Gives everything from a length on back, as long as nobody has read behind it."""
        if self._storage.used == self.stop:
            self._storage.used = length

    def slots(self) -> Tensor:
        """(layers, 2, B, H, stop, d), a view: what is read, and the room."""
        return self._storage.data[..., : self.stop, :]

    def again(self) -> Cache:
        """The cache without them, on the storage that has room, so that a repeated pass does not copy again."""
        return Cache(self._storage)


class Slots:
    """Room for tokens that come one by one, each at a place that the device counts.

    Keys and values reach over all of the room, so that their shapes stay the same: what is not written is masked.

    Attributes:
        place: (1,) int64, where the next token goes.
    """

    def __init__(self, room: Pass, place: Tensor) -> None:
        self._room = room
        self._data = room.slots()
        self.place = place

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Writes (B, H, 1, d) at the place and gives the whole room, (B, H, stop, d)."""
        held, also = self.room(layer)
        held.index_copy_(2, self.place, keys.to(held.dtype))
        also.index_copy_(2, self.place, values.to(held.dtype))
        return held, also

    def room(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, (B, H, stop, d), to be written at the place."""
        held = self._data[layer]
        return held[0], held[1]

    def commit(self, length: int) -> Cache:
        """The cache with what was written below a length."""
        return self._room.commit(length)

    def release(self, length: int) -> None:
        """Gives everything from a length on back, as long as nobody has read behind it."""
        self._room.release(length)


def stack(contexts: list[Context]) -> Context:
    """Contexts of one batch size as one batch, one after the other; shorter ones are padded with holes."""
    length = max(c.length for c in contexts)
    parts, valid = [], []
    for c in contexts:
        data = c.cache.read(c.length)
        if c.length < length:
            wide = data.new_zeros(*data.shape[:4], length, data.shape[5])
            wide[..., : c.length, :] = data
            data = wide
        parts.append(data)
        mask = c.valid.new_zeros(c.rows, length)
        mask[:, : c.length] = c.valid
        valid.append(mask)
    first = contexts[0]
    return Context(
        cache=Cache(_Storage(torch.cat(parts, dim=2), length)),
        length=length,
        valid=torch.cat(valid),
        position=torch.cat([c.position for c in contexts]),
        random=first.random,
        sizes=tuple(s for c in contexts for s in c.sizes),
    )
