"""BAGEL's layers with what stands between the matrix products compiled into few kernels.

What is compiled are functions of tensors alone: of a compiled function of a layer the host looks through all of the layer's modules
at every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clear_adapters.backbones.bagel.model import Frame, Layer, rotate, weigh_scores
from clear_adapters.backbones.cache import Slots
from clear_adapters.backbones.joined import join
from clear_adapters.backbones.rows import Rows

_SUFFIXES = ("", "_moe_gen")


class Products:
    """The matrix products of one expert of a layer, those of one input joined.

    Attributes:
        heads: (N, D) to queries, keys and values, (N, (heads + 2 kv_heads) d).
        out: of attention.
        rise: (N, D) to both halves of the MLP, (N, 2 F).
        fall: (N, F) to (N, D).
        norms: before attention and behind it.
        head_norms: of queries and of keys.
    """

    def __init__(self, layer: Any, suffix: str) -> None:
        attention, mlp = layer.self_attn, getattr(layer, f"mlp{suffix}")
        self.heads = join([getattr(attention, f"{n}_proj{suffix}") for n in "qkv"])
        self.out = getattr(attention, f"o_proj{suffix}")
        self.rise = join([mlp.gate_proj, mlp.up_proj])
        self.fall = mlp.down_proj
        self.norms = [getattr(layer, f"{n}_layernorm{suffix}") for n in ("input", "post_attention")]
        self.head_norms = [getattr(attention, f"{n}_norm{suffix}") for n in "qk"]


class Compiled:
    """The layers of answers: of text that is written, and of latents that are sampled."""

    def __init__(self, backend: str | Any = "inductor") -> None:
        """Makes ready; compiling waits for the first pass.

        Args:
            backend: of `torch.compile`.
        """
        make = partial(torch.compile, backend=backend)
        self._norm, self._add_norm = make(_norm), make(_add_norm)
        self._gate, self._weights = make(_gate), make(weigh_scores)
        self._token_heads, self._block_heads = make(_token_heads), make(_block_heads)

    def _weigh(self, scores: Tensor, bias: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        return self._weights(_many(scores, 0, 3), _many(bias, 0, 3), scale, dtype)

    def products(self, layers: Sequence[nn.Module], flow: bool) -> list[list[Products]]:
        """Of each layer, for the passes of a turn or, with both experts, of a flow."""
        suffixes = _SUFFIXES if flow else _SUFFIXES[:1]
        return [[Products(layer, suffix) for suffix in suffixes] for layer in layers]

    def run(
        self, layers: Sequence[Any], und: Tensor, gen: Tensor, frame: Frame, cache: Slots | Rows
    ) -> tuple[Tensor, Tensor]:
        """All layers: the states (U, D) and (G, D) after the last one.

        Args:
            layers: the decoder's.
            und: (U, D), of text one token a row; of a flow each row's first and last token.
            gen: (G, D), of a flow all tokens between.
            frame: with the products.
            cache: the room of a turn, or the contexts of a flow.
        """
        flow = isinstance(cache, Rows)
        assert frame.products is not None
        states = [_many(x) for x in ((und, gen) if flow else (und,))]
        added: list[Tensor] = []
        cos, sin = (_many(x, 0, 2) for x in (frame.cos, frame.sin))
        for layer, experts in zip(layers, frame.products, strict=True):
            attention = layer.self_attn
            eps = attention.q_norm.eps
            weights = [e.norms[0].weight for e in experts]
            if added:
                states, seen = self._add_norm(states, added, weights, eps)
            else:
                seen = self._norm(states, weights, eps)
            parts = [_many(e.heads(x)) for e, x in zip(experts, seen, strict=True)]
            norms = [n.weight for e in experts for n in e.head_norms]
            if isinstance(cache, Rows):
                b, length = frame.shape
                u, g = (x.view(b, -1, x.shape[-1] // attention.head_dim, attention.head_dim) for x in parts)
                q, k, v = self._block_heads(
                    _many(u), _many(g, 0, 1), norms, cos, sin, eps, attention.kv_heads
                )
                found = cache.attend(attention.layer, q, k, v).reshape(b, length, -1)
                outs = [found[:, :: length - 1].flatten(0, 1), found[:, 1:-1].flatten(0, 1)]
            else:
                keys, values = (_many(x, 0, 2) for x in cache.room(attention.layer))
                q = self._token_heads(parts[0], norms, cos, sin, eps, keys, values, cache.place)
                outs = [attention.attend_one(q, keys, values, frame, self._weigh)]
            added = [_many(e.out(x)) for e, x in zip(experts, outs, strict=True)]
            states, seen = self._add_norm(states, added, [e.norms[1].weight for e in experts], eps)
            rises = [_many(e.rise(x)) for e, x in zip(experts, seen, strict=True)]
            added = [_many(e.fall(x)) for e, x in zip(experts, self._gate(rises), strict=True)]
        states = [x + y for x, y in zip(states, added, strict=True)]
        return states[0], states[1] if flow else gen


def _many(x: Tensor, *dims: int) -> Tensor:
    """Of any size in some dimensions, the first by default: one form is compiled for all sizes, and one for 1."""
    torch._dynamo.maybe_mark_dynamic(x, dims or (0,))
    return x


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _norm(states: list[Tensor], weights: list[Tensor], eps: float) -> list[Tensor]:
    """Of each expert."""
    return [_rms(x, w, eps) for x, w in zip(states, weights, strict=True)]


def _add_norm(
    states: list[Tensor], added: list[Tensor], weights: list[Tensor], eps: float
) -> tuple[list[Tensor], list[Tensor]]:
    """The states of each expert with what is added to them, and those normalised."""
    states = [x + y for x, y in zip(states, added, strict=True)]
    return states, _norm(states, weights, eps)


def _gate(rises: list[Tensor]) -> list[Tensor]:
    """(N, 2 F) of each expert to (N, F)."""
    halves = [x.chunk(2, -1) for x in rises]
    return [F.silu(gate) * up for gate, up in halves]


def _token_heads(
    x: Tensor,
    norms: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    eps: float,
    keys: Tensor,
    values: Tensor,
    place: Tensor,
) -> Tensor:
    """Queries (B, heads, 1, d) of (B, (heads + 2 kv_heads) d); keys and values go to their place in (B, kv_heads, K, d)."""
    shared, width = keys.shape[1], keys.shape[3]
    q, k, v = _split(x.view(len(x), -1, 1, width), shared, 1)
    keys.index_copy_(2, place, rotate(_rms(k, norms[1], eps), cos, sin).to(keys.dtype))
    values.index_copy_(2, place, v.to(values.dtype))
    return rotate(_rms(q, norms[0], eps), cos, sin).to(keys.dtype)


def _block_heads(
    und: Tensor, gen: Tensor, norms: list[Tensor], cos: Tensor, sin: Tensor, eps: float, shared: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (B, H, L, d) of blocks whose first and last tokens are `und`.

    The blocks' first and last tokens are in `und` (B, 2, heads + 2 kv_heads, d), the others in `gen` (B, L - 2, ...). The norms
    are weights for queries and keys of the one expert, then of the other; the rotary tables are (B, 1, L, d).
    """
    cos, sin = cos.transpose(1, 2), sin.transpose(1, 2)
    pieces: list[list[Tensor]] = [[], [], []]
    for x, (q_norm, k_norm), places in (
        (und[:, :1], norms[:2], slice(None, 1)),
        (gen, norms[2:], slice(1, -1)),
        (und[:, 1:], norms[:2], slice(-1, None)),
    ):
        q, k, v = _split(x, shared, 2)
        c, s = cos[:, places], sin[:, places]
        new = (rotate(_rms(q, q_norm, eps), c, s), rotate(_rms(k, k_norm, eps), c, s), v)
        for piece, part in zip(pieces, new, strict=True):
            piece.append(part)
    q, k, v = (torch.cat(piece, 1).transpose(1, 2) for piece in pieces)
    return q, k, v


def _split(x: Tensor, shared: int, dim: int) -> tuple[Tensor, ...]:
    """All heads in a dimension to those of queries, keys and values."""
    return x.split([x.shape[dim] - 2 * shared, shared, shared], dim)


class CompiledTraining:
    """A layer of training in two compiled parts, and its attention as it is between them.

    Both are functions of the layer, so that all layers share what is compiled: once for batches with latents, once for those
    without.
    """

    def __init__(self, backend: str | Any = "inductor") -> None:
        """Makes ready; compiling waits for the first pass.

        Args:
            backend: of `torch.compile`.
        """
        self._enter = torch.compile(Layer.enter, dynamic=True, backend=backend)
        self._leave = torch.compile(Layer.leave, dynamic=True, backend=backend)

    def __call__(self, layer: Any, und: Tensor, gen: Tensor, frame: Frame) -> tuple[Tensor, Tensor]:
        """As `Layer.forward` of a layer."""
        q, k, v = self._enter(layer, und, gen, *frame.layout)
        out = layer.self_attn.attend(q, k, v, frame, None)
        return self._leave(layer, out, und, gen, *frame.layout[:4])
