"""The passes of one flow: the same block of latent tokens, with other latents in it, behind contexts that stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from clear_adapters.backbones import fast
from clear_adapters.backbones.bagel.model import Frame
from clear_adapters.backbones.base import Context
from clear_adapters.backbones.cache import stack
from clear_adapters.backbones.graphs import Repeated, can_capture
from clear_adapters.backbones.rows import Rows

if TYPE_CHECKING:
    from clear_adapters.backbones.bagel.backbone import BagelBackbone

_CAPTURED = 4096
"""Tokens of a pass up to which it is captured: the more there are, the longer a GPU computes for what the host launches, and
the more memory a graph holds."""


class FlowPasses(Protocol):
    """What a flow needs."""

    def velocities(self, x: Tensor, t: float, copies: int) -> list[Tensor]:
        """Velocities (R, N, C) float32 of latents behind each of the first `copies` contexts; nothing is read.

        They stay until the next call.
        """
        ...


def flow_passes(
    backbone: BagelBackbone, contexts: Sequence[Context], places: Tensor, valid: Tensor, tokens: Sequence[int]
) -> FlowPasses:
    """The passes of a flow, by rows where that way is taken.

    Args:
        backbone: the model.
        contexts: of R rows each; the guidance branches come behind the first.
        places: (R, N) int64, grid places of the latent tokens.
        valid: (R, N) bool, False at padding.
        tokens: of each row's block, its two marks included.
    """
    if fast.takes("rows", backbone.device):
        return RowPasses(backbone, contexts, places, valid, tokens)
    return MaskedPasses(backbone, contexts, places, valid)


class MaskedPasses:
    """Passes behind contexts with holes, which a mask hides."""

    def __init__(
        self, backbone: BagelBackbone, contexts: Sequence[Context], places: Tensor, valid: Tensor
    ) -> None:
        self._backbone, self._contexts = backbone, contexts
        self._places, self._valid = places, valid
        self._joint: dict[int, Context] = {}

    def velocities(self, x: Tensor, t: float, copies: int) -> list[Tensor]:
        """See `FlowPasses`."""
        model = self._backbone.model
        every, valid = x.repeat(copies, 1, 1), self._valid.repeat(copies, 1)
        if copies not in self._joint:
            some = self._contexts[:copies]
            self._joint[copies] = some[0] if copies == 1 else stack(list(some))
        context = self._joint[copies]
        time = torch.full((1,), t, device=x.device)
        tokens = model.embed_latents(every, self._places.repeat(copies, 1), time)
        step = self._backbone.image_pass(context, tokens, valid, generation=True)
        self._joint[copies] = replace(context, cache=step.scratch)
        velocity = model.velocity(step.gen).view(every.shape) * valid[..., None]
        return list(velocity.chunk(copies))


class RowPasses:
    """Passes of which everything that does not change is laid out once, without holes, and which are captured."""

    def __init__(
        self,
        backbone: BagelBackbone,
        contexts: Sequence[Context],
        places: Tensor,
        valid: Tensor,
        tokens: Sequence[int],
    ) -> None:
        self._backbone, self._contexts = backbone, contexts
        self._places, self._valid = places, valid
        self._rows = Rows(contexts, tokens)
        self._frames: dict[int, tuple[Frame, Tensor]] = {}
        self._repeated: dict[int, tuple[Repeated, Tensor]] = {}
        device = backbone.device
        self._experts = backbone.model.language_model.model.experts(both=True)
        self._x = torch.zeros(*valid.shape, backbone.latent_width, device=device)
        self._time = torch.zeros(1, device=device)
        # The casts of autocast do not outlive the caller's step.
        self._captures = can_capture(backbone.model, device) and not torch.is_autocast_enabled(device.type)

    def velocities(self, x: Tensor, t: float, copies: int) -> list[Tensor]:
        """See `FlowPasses`."""
        self._x.copy_(x)
        self._time.fill_(t)
        tokens = copies * self._valid.shape[0] * (self._valid.shape[1] + 2)
        if not self._captures or tokens > _CAPTURED:
            return list(self._pass(copies).chunk(copies))
        if copies not in self._repeated:
            found = self._x.new_empty(copies * len(self._x), *self._x.shape[1:])
            self._repeated[copies] = Repeated(x.device, "a step of a flow"), found
        repeated, found = self._repeated[copies]
        repeated(partial(self._pass_into, found, copies))
        return list(found.chunk(copies))

    def _pass_into(self, found: Tensor, copies: int) -> None:
        found.copy_(self._pass(copies))

    def _pass(self, copies: int) -> Tensor:
        """Velocities of the latents and the time that are in place, (copies R, N, C)."""
        model = self._backbone.model
        frame, edges = self._frame(copies)
        every, places = self._x.repeat(copies, 1, 1), self._places.repeat(copies, 1)
        # Not a view of (B, N, D): to the compiler those are another kind.
        tokens = model.embed_latents(every.flatten(0, 1), places.flatten(), self._time)
        _, gen, _ = model.language_model.model(edges, tokens, frame, self._rows.first(copies))
        return model.velocity(gen).view(every.shape) * self._valid.repeat(copies, 1)[..., None]

    def _frame(self, copies: int) -> tuple[Frame, Tensor]:
        """The layout of a pass, and the embeddings of its marks (2 copies R, D).

        The marks stand before the latents: all tokens of a block see each other and share a position, so their order is free.
        """
        if copies not in self._frames:
            model, marks = self._backbone.model, self._backbone.marks
            decoder, device = model.language_model.model, self._places.device
            b, length = copies * self._places.shape[0], self._places.shape[1] + 2
            table = torch.arange(b * length).view(b, length)
            und, gen = table[:, :2].flatten().to(device), table[:, 2:].flatten().to(device)
            position = torch.cat([c.position for c in self._contexts[:copies]])
            cos, sin = decoder.rotary(position[:, None])
            ends = torch.tensor([marks.image_start, marks.image_end]).to(device)
            edges = decoder.embed_tokens(ends).repeat(b, 1)
            self._frames[copies] = (
                Frame((b, length), und, gen, cos, sin, None, experts=self._experts),
                edges,
            )
        return self._frames[copies]
