"""An objective: one training stage's loss, and the batches it is taken over."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from clear_adapters.datasets.example import Example


@dataclass(frozen=True)
class Draw:
    """An example as it is drawn in one epoch.

    Attributes:
        example: the example.
        epoch: how often the data set was gone through before.
        seed: of everything random about it: a function of run, example and epoch, never of its batch.
        part: which of several processes this is for, where they share the work on it; else 0.
    """

    example: Example
    epoch: int
    seed: int
    part: int = 0


class Order(Dataset[Draw]):
    """A data set repeated as often as training needs, each pass in an order of its own.

    One long pass, so that data workers live through the run and resuming is a matter of skipping.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        length: int,
        seed: int,
        *,
        batch: int = 1,
        repeat: int = 1,
        parts: int = 1,
    ) -> None:
        """Sets the order.

        Args:
            examples: the data set.
            length: draws in all, repetitions included.
            seed: of the order and of everything random about a draw.
            batch: draws of one optimizer step, of all processes.
            repeat: steps in a row that get the same draws.
            parts: processes that share the work on an example: each draw comes so often, one part after the other.
        """
        self._examples = examples
        self._length = length
        self._seed = seed
        self._batch = batch
        self._repeat = repeat
        self._parts = parts
        self._held: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return self._length * self._parts

    def __getitem__(self, place: int) -> Draw:
        place, part = divmod(place, self._parts)
        step, within = divmod(place, self._batch)
        epoch, within = divmod(step // self._repeat * self._batch + within, len(self._examples))
        if self._held is None or self._held[0] != epoch:
            generator = torch.Generator().manual_seed(row_seed(self._seed, "order", epoch))
            self._held = (epoch, torch.randperm(len(self._examples), generator=generator))
        example = self._examples[int(self._held[1][within])]
        return Draw(example, epoch, row_seed(self._seed, example.id, epoch), part)


def row_seed(seed: int, name: str, epoch: int) -> int:
    """A seed of 63 bits for one example in one epoch of one run."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Objective(ABC):
    """One stage's loss.

    Attributes:
        parts: names of the parts of the loss, which are logged.
        counts: names of what the parts are averaged over; they stand in `batch["counts"]` before `loss`.
    """

    parts: tuple[str, ...]
    counts: ClassVar[tuple[str, ...]]

    @abstractmethod
    def collate(self, draws: Sequence[Draw]) -> dict[str, Any]:
        """A batch, made in a data worker: tensors and things with `to`, and `counts` (len(self.counts),) float32.

        What `prepare` makes of it may be something else; then `counts` comes from there.
        """

    def prepare(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """What the model has to do before an optimizer step, such as sampling; without gradient, in evaluation mode.

        Called once for each optimizer step with all of this process's batches of it, under the run's autocast. Raises
        on every process or on none.

        Returns:
            As many batches, with `counts`.
        """
        return batches

    def facts(self) -> dict[str, tuple[float, float]]:
        """Further means for the log, over the steps since the last call: by name a sum and what it is divided by.

        The names are the same on every process.
        """
        return {}

    @abstractmethod
    def loss(self, module: nn.Module, batch: dict[str, Any], counts: Tensor) -> dict[str, Tensor]:
        """The batch's share of the loss: `loss` with gradient, and each of `parts`.

        Args:
            module: `AttachedModel.module`, or what DDP or FSDP made of it.
            batch: from `prepare`, on the device.
            counts: of all batches that make up one optimizer step, of all processes. Shares so add up to the loss of
                one large batch. Nothing of the batch may be read back to the host here.
        """
