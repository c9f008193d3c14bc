"""How rows are laid out before they become tensors: blocks, positions, branches; and the frames of a family's blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

SLOT = -1
"""In a frame: a place that a code, or a token of the understanding encoder, takes."""


@dataclass
class Row:
    """One row under construction; places count inside the row.

    Attributes:
        ids: token ids, 0 at places of other tokens.
        positions: position ids.
        block: number of each token's block.
        full: whether the block is bidirectional.
        branch: of each token.
        gen: places of latent tokens.
        patches: places of the understanding encoder's tokens.
        next_position: by branch.
        blocks: blocks so far.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    block: list[int] = field(default_factory=list)
    full: list[bool] = field(default_factory=list)
    branch: list[int] = field(default_factory=list)
    gen: list[int] = field(default_factory=list)
    patches: list[int] = field(default_factory=list)
    next_position: dict[int, int] = field(default_factory=lambda: {0: 0})
    blocks: int = 0

    def open(self, branch: int) -> int:
        """The position at which a block of a branch starts: a branch goes on from where the trunk was."""
        return self.next_position.setdefault(branch, self.next_position[0])

    def add(self, ids: list[int], positions: list[int], full: bool, branch: int) -> int:
        """Adds a block; returns the place of its first token."""
        first = len(self.ids)
        self.ids += ids
        self.positions += positions
        self.block += [self.blocks] * len(ids)
        self.full += [full] * len(ids)
        self.branch += [branch] * len(ids)
        self.blocks += 1
        return first


def place_tokens(
    values: Tensor,
    uses: Sequence[tuple[Tensor | int, int]],
    pictures: Sequence[Tensor],
    counts: Sequence[int],
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Lays out what restorations are read from: given tokens, and those of pictures that are encoded later.

    Args:
        values: (T, ...) zeros, filled with given tokens in place.
        uses: in order, given tokens (n, ...) or the number of a picture, and how many tokens that are; they sum to T.
        pictures: (3, H, W) pixels.
        counts: tokens of each picture.

    Returns:
        The values; (T,) int64 places in the joined tokens of all pictures, -1 where a token is given; and the pictures
        (n, 3, H, W) grouped by size, in the order of those tokens.
    """
    sizes: dict[tuple[int, ...], list[int]] = {}
    for i, pixels in enumerate(pictures):
        sizes.setdefault(tuple(pixels.shape[-2:]), []).append(i)
    first: dict[int, int] = {}
    total = 0
    for i in (i for members in sizes.values() for i in members):
        first[i] = total
        total += counts[i]
    source = torch.full((len(values),), -1, dtype=torch.int64)
    given: list[Tensor] = []
    at = 0
    for origin, count in uses:
        if isinstance(origin, int):
            source[at : at + count] = torch.arange(first[origin], first[origin] + count)
        else:
            given.append(origin)
        at += count
    if given:
        # All at once: what was sampled lies on the device, and each copy would wait for it.
        values[source < 0] = torch.cat(given).to(values)
    return values, source, [torch.stack([pictures[i] for i in members]) for members in sizes.values()]


class Frames(Protocol):
    """The tokens that a family of codes puts around and between what a block holds. Needs no weights.

    A frame is a list of token ids in which `SLOT` marks the places of codes or of picture tokens, in order.
    """

    @property
    def start(self) -> list[int]:
        """What every row begins with."""
        ...

    @property
    def end(self) -> int:
        """The end-of-turn token."""
        ...

    def text(self, own: bool) -> tuple[list[int], list[int]]:
        """What stands before and behind a text; before the model's own at least one token, behind it the end token."""
        ...

    def restoration(self, grid: tuple[int, int]) -> list[int]:
        """Of a restoration; begins with a token and has a slot for each code, row by row."""
        ...

    def condition(self, grid: tuple[int, int]) -> list[int]:
        """Of a given picture's own codes."""
        ...

    def picture(self, count: int) -> list[int]:
        """Of a given picture's tokens from the understanding encoder; empty for a family without one."""
        ...
