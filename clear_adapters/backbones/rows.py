"""A cache for a block that is computed again and again behind contexts that stay: the steps of a flow.

Each row keeps the keys and values of its own context without holes, with room for the block behind them. Attention then
needs no mask, and heads that share keys no copies: the fastest kernels take neither. Rows of equal lengths go together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clear_adapters.backbones.attention import one_shape
from clear_adapters.backbones.base import Context


@dataclass
class _Group:
    """Rows with as many context entries and as many tokens in the block.

    Attributes:
        rows: their numbers.
        data: (layers, 2, R, H, context + tokens, d).
        context: entries of the context.
        tokens: of the block.
    """

    rows: list[int]
    data: Tensor
    context: int
    tokens: int

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(R, L, heads, d); what padding asks is of no meaning, what it answers is left out."""
        held, end = self.data[layer], k.shape[2]
        q = q.to(held.dtype)  # norms under autocast give 32 bits
        for place, new in enumerate((k, v)):
            room = held[place, :, :, self.context :]
            if self.tokens == end:
                room.copy_(new)
            else:
                # The last token of the block is its closing mark, which stands behind the padding.
                room[:, :, :-1] = new[:, :, : self.tokens - 1]
                room[:, :, -1] = new[:, :, -1]
        keys, values, shared = held[0], held[1], q.shape[1] // k.shape[1]
        if shared > 1 and q.element_size() > 2:
            # The kernel that takes grouped heads is for 16-bit types.
            keys, values, shared = (
                keys.repeat_interleave(shared, 1),
                values.repeat_interleave(shared, 1),
                1,
            )
        with one_shape():
            return F.scaled_dot_product_attention(q, keys, values, enable_gqa=shared > 1).transpose(1, 2)


class Rows:
    """Contexts side by side, all of their rows one after the other.

    Args of `attend` are of the block: (B, H, L, d) with the rows of the first contexts, or of all.
    """

    def __init__(self, contexts: Sequence[Context], tokens: Sequence[int]) -> None:
        """Copies what the contexts have read. Waits for the device.

        Args:
            contexts: of one number of rows.
            tokens: of each row's block, marks included: its first `tokens - 1` places and its last are read.
        """
        self._parts: list[list[_Group]] = []
        for number, context in enumerate(contexts):
            self._parts.append(_groups(context, tokens, number * context.rows))

    def first(self, count: int) -> Rows:
        """Of the first contexts only; shares storage."""
        some = Rows.__new__(Rows)
        some._parts = self._parts[:count]
        return some

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, L, heads, d): each row's block attends to its context and to itself."""
        groups = [g for part in self._parts for g in part]
        if len(groups) == 1:
            return groups[0].attend(layer, q, k, v)
        found, order = [], [row for g in groups for row in g.rows]
        for g in groups:
            own = (_rows(x, g.rows) for x in (q, k, v))
            found.append(g.attend(layer, *own))
        if order == list(range(len(order))):
            return torch.cat(found)
        out = torch.empty((len(order), *found[0].shape[1:]), dtype=q.dtype, device=q.device)
        for g, part in zip(groups, found, strict=True):
            for place, row in enumerate(g.rows):
                out[row] = part[place]
        return out


def _rows(x: Tensor, rows: list[int]) -> Tensor:
    """Some rows; a view where they stand together."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return x[rows[0] : rows[-1] + 1]
    return torch.stack([x[row] for row in rows])


def _groups(context: Context, tokens: Sequence[int], before: int) -> list[_Group]:
    """A context's rows by their lengths; their numbers begin at `before`."""
    valid = context.valid.cpu()
    counts = valid.sum(1).tolist()
    by_length: dict[tuple[int, int], list[int]] = {}
    for row, count in enumerate(counts):
        by_length.setdefault((count, tokens[row]), []).append(row)
    read = context.cache.read(context.length)
    found = []
    for (count, own), rows in by_length.items():
        layers, two, _, heads, _, width = read.shape
        data = read.new_empty(layers, two, len(rows), heads, count + own, width)
        for place, row in enumerate(rows):
            if bool(valid[row, :count].all()):
                data[:, :, place, :, :count] = read[:, :, row, :, :count]
            else:
                index = valid[row].nonzero()[:, 0].to(read.device)
                data[:, :, place, :, :count] = read[:, :, row].index_select(3, index)
        found.append(_Group([before + row for row in rows], data, count, own))
    return found
