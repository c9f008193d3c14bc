"""Whether a row restores: by its severity, by what the base model makes of the degraded picture, or by a teacher's choice."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from clear_adapters.adapter import attach
from clear_adapters.attached import AttachedModel
from clear_adapters.datasets.example import Example


class Answerer(Protocol):
    """The base model of the paper's rule.

    Attributes:
        name: for records.
        batch: rows at a time.
    """

    name: str
    batch: int

    def answers(self, examples: Sequence[Example]) -> list[str]:
        """What it answers to the degraded pictures of at most `batch` rows."""


class BaseModel:
    """The plain model of a backbone, asked in its family's own chat format."""

    def __init__(
        self,
        model: str,
        *,
        device: str | None = None,
        batch: int = 16,
        seed: int = 0,
        max_new_tokens: int = 128,
    ) -> None:
        """Notes what to load; nothing is loaded before it is asked.

        Args:
            model: `builtin:NAME`, a folder or a Hub id.
            device: where it runs.
            batch: rows at a time.
            seed: of sampling, the same for every row.
            max_new_tokens: longest answer.
        """
        self.name, self.batch = model, batch
        self._device, self._seed, self._limit = device, seed, max_new_tokens
        self._attached: AttachedModel | None = None

    def answers(self, examples: Sequence[Example]) -> list[str]:
        """The model's answers.

        Raises:
            ImageError: a picture cannot be read.
            CheckpointError: the model cannot be loaded.
        """
        if self._attached is None:
            self._attached = attach(self.name, lora=False, bridge=False, device=self._device)
        text = replace(self._attached.config.text, max_new_tokens=self._limit)
        with self._attached.disabled():
            found = self._attached.answer(
                [e.load() for e in examples], [e.question for e in examples], text=text, seed=self._seed
            )
        return [r.text for r in (found if isinstance(found, list) else [found])]


def batches(rows: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    """Rows in portions of at most `size`."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def drawn(ids: Iterable[str], seed: int) -> list[str]:
    """Ids in an order that follows from the seed: which rows go first where only some are needed."""
    return sorted(ids, key=lambda i: (hashlib.blake2b(f"{seed}/balance/{i}".encode()).digest(), i))


def wanted(direct: int, restore: int, share: float | None) -> tuple[int, int]:
    """How many rows of each path give the share of restorations with as many rows as there can be.

    Args:
        direct: rows there are that answer at once.
        restore: rows there are that restore.
        share: share of restorations; None takes all.

    Returns:
        Rows to take of each.
    """
    if share is None:
        return direct, restore
    if share in (0, 1):
        return (0, restore) if share else (direct, 0)
    total = min(direct / (1 - share), restore / share)
    return min(direct, round(total * (1 - share))), min(restore, round(total * share))
