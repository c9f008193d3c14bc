"""What passes between engine and backbone: restorations, and what a batch of rows has read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from clear_adapters.errors import ClearValueError
from clear_adapters.sampling import RowRandom

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass
class FlowTrace:
    """How flow latents were sampled: S recorded steps.

    Attributes:
        x: (B, S, N, C) float32, the latent before each step.
        x_next: (B, S, N, C) float32, the latent after it.
        t: (S,) float32, time before each step.
        dt: (S,) float32, length of each step.
        sigma: noise level.
        logprobs: (B, S) float32.
    """

    x: Tensor
    x_next: Tensor
    t: Tensor
    dt: Tensor
    sigma: float
    logprobs: Tensor

    def row(self, i: int) -> FlowTrace:
        """One row, still batched."""
        return replace(
            self, x=self.x[i : i + 1], x_next=self.x_next[i : i + 1], logprobs=self.logprobs[i : i + 1]
        )


@dataclass
class Restoration:
    """What the model generated for the clean picture, for B rows on one grid.

    Attributes:
        kind: `flow` or `codes`.
        grid: (h, w) of its tokens; N = h w.
        size: (height, width) in pixels.
        latent: (B, N, C) float32, of kind flow.
        codes: (B, N) int64, of kind codes.
        trace: how it was sampled; of kind flow only when the sampler was stochastic.
        code_logprobs: (B, N) float32, of kind codes; only when they were sampled from the model itself, without guidance.
        image: of a restoration of one row, its pixels once they were decoded by `Backbone.decode_each`.
    """

    kind: Literal["flow", "codes"]
    grid: tuple[int, int]
    size: tuple[int, int]
    latent: Tensor | None = None
    codes: Tensor | None = None
    trace: FlowTrace | None = None
    code_logprobs: Tensor | None = None
    image: Image | None = None

    @property
    def tokens(self) -> Tensor:
        """The latent (B, N, C), or the codes (B, N).

        Raises:
            ClearValueError: it holds neither.
        """
        found = self.latent if self.kind == "flow" else self.codes
        if found is None:
            raise ClearValueError(
                f"a restoration of kind {self.kind!r} has no {'latent' if self.kind == 'flow' else 'codes'}: make it by "
                "`restore` or `encode_images`"
            )
        return found

    @property
    def rows(self) -> int:
        """B."""
        tensor = self.latent if self.latent is not None else self.codes
        return 0 if tensor is None else int(tensor.shape[0])

    @classmethod
    def joined(cls, parts: Sequence[Restoration]) -> Restoration:
        """Restorations of one kind, grid and size as the rows of one, without their traces."""

        def together(found: list[Tensor | None]) -> Tensor | None:
            known = [x for x in found if x is not None]
            return torch.cat(known) if known else None

        return replace(
            parts[0],
            latent=together([p.latent for p in parts]),
            codes=together([p.codes for p in parts]),
            trace=None,
            code_logprobs=None,
            image=None,
        )

    def row(self, i: int) -> Restoration:
        """One row, still batched; shares storage."""

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[i : i + 1]

        return replace(
            self,
            latent=cut(self.latent),
            codes=cut(self.codes),
            trace=None if self.trace is None else self.trace.row(i),
            code_logprobs=cut(self.code_logprobs),
        )


# ------------------------------------------------------------------------------------------------------ context


@dataclass
class Context:
    """What a batch of rows has read so far.

    Appending returns a new context and leaves the old one usable. The two share storage: like a slice of an
    array, the first to append writes in place behind what is read, a second one copies first.

    Attributes:
        cache: the family's own key-value store, shared between forks.
        length: cache entries in use, the same for all rows; rows that did not read a block have holes there.
        valid: (B, length) bool, False at holes and padding.
        position: (B,) int64, the next position id of each row.
        random: the rows' random streams.
        sizes: (height, width) in pixels of the last picture each row read; what a restoration will have.
    """

    cache: Any
    length: int
    valid: Tensor
    position: Tensor
    random: RowRandom
    sizes: tuple[tuple[int, int] | None, ...]

    @classmethod
    def empty(cls, cache: Any, rows: int, seeds: Sequence[int], device: torch.device) -> Context:
        """One that has read nothing.

        Args:
            cache: an empty one for so many rows.
            rows: B.
            seeds: of the rows' random streams.
            device: of the cache.

        Raises:
            ClearValueError: not a seed a row.
        """
        if len(seeds) != rows:
            raise ClearValueError(f"{len(seeds)} seeds for {rows} rows: give one seed a row")
        return cls(
            cache=cache,
            length=0,
            valid=torch.zeros(rows, 0, dtype=torch.bool, device=device),
            position=torch.zeros(rows, dtype=torch.int64, device=device),
            random=RowRandom.from_seeds(list(seeds), device),
            sizes=(None,) * rows,
        )

    @property
    def rows(self) -> int:
        """B."""
        return int(self.position.shape[0])

    def fork(self) -> Context:
        """The same context, to go on separately. Copies nothing; draws of one do not advance the other."""
        return replace(self, random=self.random.clone())

    def hide(self, rows: Sequence[int], start: int) -> Context:
        """Takes back, for some rows, what was read from cache entry `start` on. Copies only the mask.

        Positions of those rows must be restored by the caller.
        """
        valid = self.valid.clone()
        valid[list(rows), start:] = False
        return replace(self, valid=valid)

    def expand(self, copies: int) -> Context:
        """Each row `copies` times, neighbours together. Copies the cache; seeds stay equal: set `random`."""
        index = torch.arange(self.rows, device=self.position.device).repeat_interleave(copies)
        return self._gather(index)

    def select(self, rows: Sequence[int]) -> Context:
        """Some rows, in the order given. Copies their part of the cache."""
        return self._gather(torch.tensor(list(rows), dtype=torch.int64, device=self.position.device))

    def _gather(self, index: Tensor) -> Context:
        host = index.tolist()
        return Context(
            cache=self.cache.gather(index, self.length),
            length=self.length,
            valid=self.valid[index],
            position=self.position[index],
            random=self.random.select(index),
            sizes=tuple(self.sizes[i] for i in host),
        )
