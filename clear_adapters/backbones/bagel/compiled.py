"""BAGEL's layers compiled in two parts, before their attention and behind it.

What is compiled are functions of tensors alone: of a compiled function of a layer the host looks through all of the layer's modules
at every call.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clear_adapters.backbones.bagel.model import Frame, Layer, rotate, weigh_scores
from clear_adapters.backbones.cache import Pass, Slots
from clear_adapters.backbones.joined import Joined, join
from clear_adapters.backbones.rows import Rows

_SUFFIXES = ("", "_moe_gen")
_LOG = logging.getLogger(__name__)
_FORMS = 64
"""Of each part that are compiled in a process at most: for one row and for several, without LoRA and with each rank and scale."""


class Expert(NamedTuple):
    """One expert of a layer as tensors, its products of one input joined.

    Attributes:
        before: weight of the norm before attention.
        heads: (N, D) to queries, keys and values, (N, (heads + 2 kv_heads) d).
        queries: weight of their norm.
        keys: weight of theirs.
        out: of attention.
        behind: weight of the norm behind it.
        rise: (N, D) to both halves of the MLP, (N, 2 F).
        fall: (N, F) to (N, D).
    """

    before: Tensor
    heads: Joined
    queries: Tensor
    keys: Tensor
    out: Joined
    behind: Tensor
    rise: Joined
    fall: Joined


def expert_of(layer: Any, suffix: str) -> Expert | None:
    """An expert of a layer as it is now; None where its products are not plain ones."""
    attention, mlp = layer.self_attn, getattr(layer, f"mlp{suffix}")
    heads = join([getattr(attention, f"{n}_proj{suffix}") for n in "qkv"])
    out, rise = join([getattr(attention, f"o_proj{suffix}")]), join([mlp.gate_proj, mlp.up_proj])
    fall = join([mlp.down_proj])
    if heads is None or out is None or rise is None or fall is None:
        return None
    before, behind = (getattr(layer, f"{n}_layernorm{suffix}").weight for n in ("input", "post_attention"))
    queries, keys = (getattr(attention, f"{n}_norm{suffix}").weight for n in "qk")
    return Expert(before, heads, queries, keys, out, behind, rise, fall)


class Compiled:
    """The layers of answers: of what is read, of text that is written, and of latents that are sampled."""

    def __init__(self, backend: str | Any = "inductor") -> None:
        """Makes ready; compiling waits for the first pass.

        Args:
            backend: of `torch.compile`.
        """
        make = partial(torch.compile, backend=backend)
        self._enter_token, self._leave_token = make(_enter_token), make(_leave_token)
        self._enter_tokens, self._enter_block = make(_enter_tokens), make(_enter_block)
        self._leave_block = make(_leave_block)
        self._weights = make(weigh_scores)
        self._told = False

    def _weigh(self, scores: Tensor, bias: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
        return self._weights(_many(scores, 0, 3), _many(bias, 0, 3), scale, dtype)

    def experts(self, layers: Sequence[nn.Module], both: bool, bare: bool) -> list[list[Expert]] | None:
        """Of each layer, the first or both of them; None where one is not made of plain products, or of `bare` ones has LoRA."""
        found = []
        for layer in layers:
            own = [expert_of(layer, suffix) for suffix in (_SUFFIXES if both else _SUFFIXES[:1])]
            whole = [e for e in own if e is not None]
            if len(whole) < len(own):
                self._tell()
                return None
            if bare and whole[0].heads.first is not None:
                return None
            found.append(whole)
        return found

    def _tell(self) -> None:
        """That compiling changes nothing, once."""
        if not self._told:
            _LOG.warning(
                "layers of this model are not compiled: they are quantized, or adapted in part or otherwise than by plain LoRA. They "
                "run as they are, which is slower"
            )
        self._told = True

    def run(
        self, layers: Sequence[Any], und: Tensor, gen: Tensor, frame: Frame, cache: Slots | Rows | Pass
    ) -> tuple[Tensor, Tensor]:
        """All layers: the states (U, D) and (G, D) after the last one.

        Args:
            layers: the decoder's.
            und: (U, D), all tokens or, of blocks with latents, the first two of each.
            gen: (G, D), the others, or none.
            frame: with the experts.
            cache: the room of a turn, the contexts of a flow, or those behind which a block is read.
        """
        # The compiler's own limit would be reached by the third adapter, whose passes then ran uncompiled.
        settings = torch._dynamo.config
        with settings.patch(recompile_limit=max(_FORMS, settings.recompile_limit)):
            return self._run(layers, und, gen, frame, cache)

    def _run(
        self, layers: Sequence[Any], und: Tensor, gen: Tensor, frame: Frame, cache: Slots | Rows | Pass
    ) -> tuple[Tensor, Tensor]:
        assert frame.experts is not None
        both = gen.shape[0] > 0
        # Copies, here and of what attention gives: views are of a form of their own.
        states = [_many(x.clone()) for x in ((und, gen) if both else (und,))]
        # Nothing, but not of a form of its own.
        added = [_many(torch.zeros_like(x)) for x in states]
        cos, sin = frame.cos, frame.sin
        if isinstance(cache, Pass) and not both:
            # To the compiler one row is not as many: it sees tokens.
            wide = (x.expand(-1, -1, frame.shape[1], -1) for x in (cos, sin))
            cos, sin = (x.reshape(len(und), 1, -1).contiguous() for x in wide)
        cos, sin = _many(cos), _many(sin)
        for layer, experts in zip(layers, frame.experts, strict=True):
            attention = layer.self_attn
            given = (states, added, experts, cos, sin, attention.q_norm.eps)
            if isinstance(cache, Slots):
                keys, values = (_many(x, 0, 2) for x in cache.room(attention.layer))
                states, q = self._enter_token(*given, keys, values, cache.place)
                outs = [attention.attend_one(q, keys, values, frame, self._weigh)]
                leave = self._leave_token
            else:
                states, *heads = (self._enter_block if both else self._enter_tokens)(
                    *given, attention.kv_heads
                )
                outs = _attend(attention, heads, frame, cache, both)
                leave = self._leave_block
            states = [_many(x) for x in states]
            states, added = leave([_many(x) for x in outs], states, experts, attention.q_norm.eps)
            added = [_many(x) for x in added]
        states = [x + y for x, y in zip(states, added, strict=True)]
        return states[0], states[1] if both else gen


def _attend(
    attention: Any, heads: list[Tensor], frame: Frame, cache: Rows | Pass, both: bool
) -> list[Tensor]:
    """What attention gives each expert's tokens, (N, heads d), of queries, keys and values (B, L, H, d) or (B L, H, d)."""
    b, length = frame.shape
    q, k, v = (x.view(b, length, *x.shape[-2:]).transpose(1, 2) for x in heads)
    if isinstance(cache, Rows):
        found = cache.attend(attention.layer, q, k, v)
    else:
        found = [attention.attend(q, k, v, frame, cache).view(b, length, *heads[0].shape[-2:])]
    parts = [[x[:, :2] for x in found], [x[:, 2:] for x in found]] if both else [found]
    return [torch.cat([x.flatten(0, 1).flatten(1) for x in some]) for some in parts]


def _many(x: Tensor, *dims: int) -> Tensor:
    """Of any size in some dimensions, the first by default: one form is compiled for all sizes, and one for 1."""
    torch._dynamo.maybe_mark_dynamic(x, dims or (0,))
    return x


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _enter_heads(
    states: list[Tensor], added: list[Tensor], experts: list[Expert], eps: float
) -> tuple[list[Tensor], list[Tensor]]:
    """The states of each expert with what the layer before adds to them, and queries, keys and values (N, all heads, d)."""
    states = [x + y for x, y in zip(states, added, strict=True)]
    parts = [e.heads(_rms(x, e.before, eps)) for e, x in zip(experts, states, strict=True)]
    return states, [x.view(len(x), -1, len(e.queries)) for e, x in zip(experts, parts, strict=True)]


def _enter_token(
    states: list[Tensor],
    added: list[Tensor],
    experts: list[Expert],
    cos: Tensor,
    sin: Tensor,
    eps: float,
    keys: Tensor,
    values: Tensor,
    place: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """A layer before its attention for one token of each row: the states, and queries (B, heads, 1, d).

    New keys and values go to a place (1,) of the room, (B, kv_heads, K, d).
    """
    states, (x,) = _enter_heads(states, added, experts, eps)
    q, k, v = _heads(x[:, :, None], experts[0], cos, sin, eps, keys.shape[1], 1)
    keys.index_copy_(2, place, k.to(keys.dtype))
    values.index_copy_(2, place, v.to(values.dtype))
    return states, q.to(keys.dtype)


def _enter_tokens(
    states: list[Tensor],
    added: list[Tensor],
    experts: list[Expert],
    cos: Tensor,
    sin: Tensor,
    eps: float,
    shared: int,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """A layer before its attention for tokens of one expert: the states, and queries, keys and values (N, H, d).

    The rotary tables are (N, 1, d).
    """
    states, (x,) = _enter_heads(states, added, experts, eps)
    return states, *_heads(x, experts[0], cos, sin, eps, shared, 1)


def _enter_block(
    states: list[Tensor],
    added: list[Tensor],
    experts: list[Expert],
    cos: Tensor,
    sin: Tensor,
    eps: float,
    shared: int,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """A layer before its attention for blocks with latents: the states, and queries, keys and values (B, L, H, d).

    The first two tokens of each are the first expert's; the rotary tables are (B, 1, 1, d). Not transposed, which would be a
    copy.
    """
    states, parts = _enter_heads(states, added, experts, eps)
    blocks = [x.view(cos.shape[0], -1, *x.shape[1:]) for x in parts]
    pieces = [_heads(x, e, cos, sin, eps, shared, 2) for x, e in zip(blocks, experts, strict=True)]
    q, k, v = (torch.cat(piece, 1) for piece in zip(*pieces, strict=True))
    return states, q, k, v


def _leave_token(
    outs: list[Tensor], states: list[Tensor], experts: list[Expert], eps: float
) -> tuple[list[Tensor], list[Tensor]]:
    """A layer behind its attention: the states of each expert, and what its MLP adds to them."""
    states = [x + e.out(y) for x, y, e in zip(states, outs, experts, strict=True)]
    added = []
    for x, e in zip(states, experts, strict=True):
        gate, up = e.rise(_rms(x, e.behind, eps)).chunk(2, -1)
        added.append(e.fall(F.silu(gate) * up))
    return states, added


def _leave_block(
    outs: list[Tensor], states: list[Tensor], experts: list[Expert], eps: float
) -> tuple[list[Tensor], list[Tensor]]:
    """The same for blocks, whose forms the compiler so counts apart: it keeps few of each function."""
    return _leave_token(outs, states, experts, eps)


def _heads(
    x: Tensor, expert: Expert, cos: Tensor, sin: Tensor, eps: float, shared: int, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """All heads in a dimension to queries and keys, normalised and turned, and values."""
    q, k, v = x.split([x.shape[dim] - 2 * shared, shared, shared], dim)
    q, k = _rms(q, expert.queries, eps), _rms(k, expert.keys, eps)
    return rotate(q, cos, sin), rotate(k, cos, sin), v


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
