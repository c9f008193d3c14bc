"""Attention of packed rows block by block, without a mask over whole rows.

A mask over a row of L tokens makes a kernel compute all L x L pairs, of which a row of text, pictures and noised copies needs
about half, and takes the fastest kernels away. A block sees whole earlier blocks, so each is attended to on its own: a
picture's fully, the first text's causally, and the few queries of a later text behind all that stands before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

LONG = 1024
"""Rows from this length on are worth it: below, one call with a mask costs less than one for each block."""


@dataclass(frozen=True)
class Span:
    """A block of a row.

    Attributes:
        tokens: how many stand in it.
        full: whether they see each other both ways.
        seen: numbers of the earlier blocks of the row that it sees, in order.
    """

    tokens: int
    full: bool
    seen: tuple[int, ...]


def spans_of(block: Sequence[int], full: Sequence[bool], branch: Sequence[int]) -> tuple[Span, ...]:
    """The blocks of one row, from what stands at each of its places."""
    starts = [i for i in range(len(block)) if i == 0 or block[i] != block[i - 1]]
    found: list[Span] = []
    branches = [branch[i] for i in starts]
    for number, (start, stop) in enumerate(zip(starts, [*starts[1:], len(block)], strict=True)):
        own = branches[number]
        seen = tuple(i for i in range(number) if branches[i] in (0, own))
        found.append(Span(stop - start, full[start], seen))
    return tuple(found)


def attend_spans(q: Tensor, k: Tensor, v: Tensor, rows: Sequence[Sequence[Span]]) -> Tensor:
    """What `scaled_dot_product_attention` gives with the mask of `PackedBatch.visibility`, zeros at padding.

    Args:
        q: (B, heads, L, d).
        k: (B, fewer heads, L, d).
        v: as `k`.
        rows: the blocks of each row; what is left of a row is padding.

    Returns:
        (B, L, heads, d).
    """
    length = q.shape[2]
    q, k = q.to(v.dtype), k.to(v.dtype)  # norms under autocast give 32 bits
    done: list[Tensor] = []
    # Unbound and split: the backward pass then joins gradients, and adds up none of a whole batch.
    for own_q, own_k, own_v, spans in zip(q.unbind(0), k.unbind(0), v.unbind(0), rows, strict=True):
        sizes = [s.tokens for s in spans]
        sizes.append(length - sum(sizes))
        queries, keys, values = (x.split(sizes, 1) for x in (own_q, own_k, own_v))
        parts = [_attend(queries[i], keys, values, i, s) for i, s in enumerate(spans)]
        if sizes[-1]:
            parts.append(q.new_zeros(sizes[-1], q.shape[1], q.shape[3]))
        done.append(torch.cat(parts))
    return torch.stack(done)


def _attend(
    query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], number: int, span: Span
) -> Tensor:
    """(tokens, heads, d) of one block."""
    own = (*span.seen, number)
    key, value = (x[own[0]] if len(own) == 1 else torch.cat([x[i] for i in own], 1) for x in (keys, values))
    shared = query.shape[0] // key.shape[0]
    mask: Tensor | None = None
    causal = not span.full and not span.seen
    if not span.full and not causal:
        if query.element_size() == 2 and _has_flash(query.device):
            # Flash attention takes no mask, and knows a block at the end of its keys without.
            ending = causal_lower_right(span.tokens, key.shape[1])
            return _whole(query, key, value, attn_mask=ending, enable_gqa=shared > 1)
        before = key.shape[1] - span.tokens
        mask = torch.ones(span.tokens, key.shape[1], dtype=torch.bool, device=query.device).tril(before)
    if shared > 1 and (mask is not None or query.element_size() > 2):
        # Neither the kernel that takes masks nor that for 32-bit types takes grouped heads.
        key, value, shared = key.repeat_interleave(shared, 0), value.repeat_interleave(shared, 0), 1
    return _whole(query, key, value, attn_mask=mask, is_causal=causal, enable_gqa=shared > 1)


def _has_flash(device: torch.device) -> bool:
    if device.type != "cuda" or not torch.backends.cuda.flash_sdp_enabled():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _whole(query: Tensor, key: Tensor, value: Tensor, **more: Any) -> Tensor:
    out = F.scaled_dot_product_attention(query[None], key[None], value[None], **more)
    return out[0].transpose(0, 1)
