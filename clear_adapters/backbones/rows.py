"""A cache for a block that is computed again and again behind contexts that stay: the steps of a flow.

The rows of a context keep their keys and values without holes, and all of them end where the block begins, so that it is written
at one place. Attention then needs no mask, and heads that share keys no copies: the fastest kernels take neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from clear_adapters.backbones.attention import one_shape
from clear_adapters.backbones.base import Context


class _Run(NamedTuple):
    """Neighbouring rows that see the same places.

    Attributes:
        first, stop: the rows.
        begin, end: places of their context and their block.
    """

    first: int
    stop: int
    begin: int
    end: int


class _Part:
    """The rows of one context."""

    def __init__(self, context: Context, tokens: Sequence[int]) -> None:
        valid = context.valid.cpu()
        counts = [int(n) for n in valid.sum(1)]
        self._start = max(counts)
        read = context.cache.read(context.length)
        layers, two, rows, heads, _, width = read.shape
        self._data = read.new_empty(layers, two, rows, heads, self._start + max(tokens), width)
        for row, (own, count) in enumerate(zip(valid, counts, strict=True)):
            if bool(own[:count].all()):
                entries = read[:, :, row, :, :count]
            else:
                entries = read[:, :, row].index_select(3, own.nonzero()[:, 0].to(read.device))
            self._data[:, :, row, :, self._start - count : self._start] = entries
        places = [(self._start - n, self._start + own) for n, own in zip(counts, tokens, strict=True)]
        self._runs, stop = [], 0
        for (begin, end), some in groupby(places):
            first, stop = stop, stop + len(list(some))
            self._runs.append(_Run(first, stop, begin, end))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        held = self._data[layer]
        for place, new in enumerate((k, v)):
            held[place, :, :, self._start :].copy_(new)
        q = q.to(held.dtype)  # norms under autocast give 32 bits
        found = []
        for first, stop, begin, end in self._runs:
            own, (keys, values) = q[first:stop], held[:, first:stop, :, begin:end]
            shared = q.shape[1] // keys.shape[1]
            if shared > 1 and q.element_size() > 2:
                # The kernel that takes grouped heads is for 16-bit types.
                keys, values = (x.repeat_interleave(shared, 1) for x in (keys, values))
                shared = 1
            with one_shape():
                out = F.scaled_dot_product_attention(own, keys, values, enable_gqa=shared > 1)
            found.append(out.transpose(1, 2))
        return found


class Rows:
    """Contexts side by side, all of their rows one after the other."""

    def __init__(self, contexts: Sequence[Context], tokens: Sequence[int]) -> None:
        """Copies what the contexts have read. Waits for the device.

        Args:
            contexts: of one number of rows.
            tokens: of each row's block; what stands behind them is padding.
        """
        self._parts = [_Part(context, tokens) for context in contexts]

    def first(self, contexts: int) -> Rows:
        """Of the first contexts only; shares storage."""
        some = Rows.__new__(Rows)
        some._parts = self._parts[:contexts]
        return some

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        """Each row's block attends to its context and to itself.

        Args:
            layer: of the model.
            q: (B, H, L, d) of the blocks' tokens.
            k: (B, kv_heads, L, d).
            v: as k.

        Returns:
            (R, L, H, d) of rows that follow on one another, B in all.
        """
        given = zip(self._parts, *(x.chunk(len(self._parts)) for x in (q, k, v)), strict=True)
        return [out for part, *own in given for out in part.attend(layer, *own)]
