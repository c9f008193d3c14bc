"""Sampling a restoration's codes one after another, several contexts of a row side by side for guidance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clear_adapters.backbones.base import Context
from clear_adapters.backbones.layout import SLOT
from clear_adapters.backbones.writer import Step, Writer
from clear_adapters.sampling import TextSampling

_OVER = -2
"""In a script: the row's restoration is complete."""


class CodeWriter(Writer):
    """A batch of rows that sample codes, with fixed tokens between them where the family has such.

    What is read next (`feed`) is a token id, or `-1 - code` for a code. The R rows may stand several times in the context,
    one guidance branch after the other; every branch reads the code that was chosen.
    """

    def __init__(
        self,
        step: Step,
        context: Context,
        sampling: TextSampling,
        first: Tensor,
        scripts: Sequence[Sequence[int]],
        *,
        captures: bool = False,
    ) -> None:
        """Makes ready; nothing is read yet.

        Args:
            step: as for `Writer`, of all branches at once, to the logits (R, K) that codes are chosen from.
            context: R rows for each branch; it stays usable.
            sampling: of the codes.
            first: (R,) int64, the token that each row reads before its first code.
            scripts: for each row what follows: `SLOT` where a code is chosen, or the id of the token that stands there.
            captures: whether the step may be captured.
        """
        rows = len(scripts)
        longest = max(len(s) for s in scripts)
        table = torch.tensor([[*s, *[_OVER] * (longest - len(s))] for s in scripts])
        super().__init__(
            step, context, sampling, range(context.rows), (0, _OVER), captures=captures, room=longest
        )
        device = context.position.device
        self._copies = context.rows // rows
        self._script = table.to(device)
        self.feed.copy_(first.to(device).repeat(self._copies))
        self.tokens = torch.full((rows, longest), SLOT, device=device)
        self.logprobs = torch.zeros(rows, longest, device=device)
        self._random = context.random.clone()
        self._places = [(row == SLOT).nonzero()[:, 0].to(device) for row in table]
        self.chooses = (table == SLOT).any(0).tolist()
        self._plain = bool((table == SLOT).all())

    def _choose(self, logits: Tensor) -> None:
        script = self._script.index_select(1, self._place)[:, 0]
        chosen = script == SLOT
        token, logprob = self._draw(logits, chosen)
        self.tokens.index_copy_(1, self._place, torch.where(chosen, token, SLOT)[:, None])
        self.logprobs.index_copy_(1, self._place, torch.where(chosen, logprob, 0.0)[:, None])
        self.feed.copy_(torch.where(chosen, -1 - token, script.clamp(min=0)).repeat(self._copies))
        self.reading.copy_((script != _OVER).repeat(self._copies))

    @property
    def codes(self) -> list[Tensor]:
        """(1, N) int64 codes of each row on the device; those that are not chosen yet are 0. Copies."""
        chosen = self.tokens.clamp(min=0)
        if self._plain:
            return list(chosen.split(1))
        return [t.index_select(0, at)[None] for t, at in zip(chosen, self._places, strict=True)]

    @property
    def code_logprobs(self) -> list[Tensor]:
        """(1, N) float32 of each row on the device. Copies."""
        return [s.index_select(0, at)[None] for s, at in zip(self.logprobs, self._places, strict=True)]

    @property
    def counts(self) -> Tensor:
        """(R,) int64, draws that the rows have taken."""
        return self._random.counts

    def release(self, length: int) -> None:
        """Gives the room behind a length back: nothing there was read for good."""
        self._slots.release(length)
