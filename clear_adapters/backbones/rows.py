"""A cache for a block that is computed again and again behind contexts that stay: the steps of a flow.

Each row keeps the keys and values of its own context without holes, and they end where the block begins, which is one place
for all rows. Attention then needs no mask, and heads that share keys no copies: the fastest kernels take neither.
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
    """Rows one after the other that see the same places.

    Attributes:
        first, stop: the rows.
        begin, end: places of their context and their block.
    """

    first: int
    stop: int
    begin: int
    end: int


class Rows:
    """Contexts side by side, all of their rows one after the other."""

    def __init__(self, contexts: Sequence[Context], tokens: Sequence[int]) -> None:
        """Copies what the contexts have read. Waits for the device.

        Args:
            contexts: of one number of rows.
            tokens: of each row's block; what stands behind them is padding.
        """
        valid = [context.valid.cpu() for context in contexts]
        counts = [int(n) for v in valid for n in v.sum(1)]
        self._start, block = max(counts), max(tokens)
        self._data = self._copied(contexts, valid, block)
        ends = [self._start + n for _ in contexts for n in tokens]
        places = [(self._start - n, end) for n, end in zip(counts, ends, strict=True)]
        self._runs, row = [], 0
        for (begin, end), some in groupby(places):
            first, row = row, row + len(list(some))
            self._runs.append(_Run(first, row, begin, end))

    def _copied(self, contexts: Sequence[Context], valid: Sequence[Tensor], block: int) -> Tensor:
        """(layers, 2, B, H, K, d), with room for a block."""
        rows = contexts[0].rows
        data = None
        for number, (context, seen) in enumerate(zip(contexts, valid, strict=True)):
            read = context.cache.read(context.length)
            if data is None:
                layers, two, _, heads, _, width = read.shape
                data = read.new_empty(layers, two, len(contexts) * rows, heads, self._start + block, width)
            for row, own in enumerate(seen):
                count = int(own.sum())
                if bool(own[:count].all()):
                    entries = read[:, :, row, :, :count]
                else:
                    entries = read[:, :, row].index_select(3, own.nonzero()[:, 0].to(read.device))
                data[:, :, number * rows + row, :, self._start - count : self._start] = entries
        assert data is not None
        return data

    def first(self, rows: int) -> Rows:
        """Of the first rows only; shares storage."""
        some = Rows.__new__(Rows)
        some._data, some._start = self._data, self._start
        some._runs = [run._replace(stop=min(run.stop, rows)) for run in self._runs if run.first < rows]
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
        held = self._data[layer, :, : len(q)]
        for place, new in enumerate((k, v)):
            held[place, :, :, self._start :].copy_(new)
        q = q.to(held.dtype)  # norms under autocast give 32 bits
        found = []
        for run in self._runs:
            own, (keys, values) = (
                q[run.first : run.stop],
                held[:, run.first : run.stop, :, run.begin : run.end],
            )
            shared = q.shape[1] // keys.shape[1]
            if shared > 1 and q.element_size() > 2:
                # The kernel that takes grouped heads is for 16-bit types.
                keys, values = (x.repeat_interleave(shared, 1) for x in (keys, values))
                shared = 1
            with one_shape():
                out = F.scaled_dot_product_attention(own, keys, values, enable_gqa=shared > 1)
            found.append(out.transpose(1, 2))
        return found
