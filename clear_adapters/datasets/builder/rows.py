"""What a source gives: questions about clean pictures, and what stands in the place of those that cannot be used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clear_adapters.datasets.tsv import TsvFile, picture_bytes
from clear_adapters.errors import ClearValueError
from clear_adapters.prompts import CHOOSE
from clear_adapters.scoring import letters_of


@dataclass(frozen=True)
class Picture:
    """Where a clean picture lies: a file, or a row of a table.

    Attributes:
        name: as the source names it, without the folders above, which differ between machines.
        path: the file.
        row: line and byte offset of the row in a table.
    """

    name: str
    path: Path
    row: tuple[int, int] | None = None

    def read(self) -> bytes:
        """The bytes of the image file.

        Raises:
            ClearValueError: the row holds none.
            OSError: the file cannot be read.
        """
        return self.path.read_bytes() if self.row is None else picture_bytes(TsvFile(self.path), self.row)


@dataclass(frozen=True)
class Row:
    """A question about a clean picture.

    Attributes:
        id: unique in its source.
        question: what is asked, options included.
        answer: the truth; of a question with options its letter or text.
        picture: where it lies.
        place: where the row stands in its file, in words.
        options: texts in the order of their letters.
        kind: of the question, or the subset it is from.
        group: rows of one group never stand in two splits.
        fact: a sentence that says what in the picture gives the answer.
    """

    id: str
    question: str
    answer: str
    picture: Picture
    place: str
    options: tuple[str, ...] = ()
    kind: str = ""
    group: str = ""
    fact: str = ""


@dataclass(frozen=True)
class Rejected:
    """A row, or something like one, that is not in the data.

    Attributes:
        id: of the row, or of what stands in its place.
        stage: `source`, `picture`, `pathway`, `trace` or `balance`.
        reason: in a few words, for counting.
        detail: in a sentence.
        place: where the row stands.
        tries: what a teacher wrote, and what is wrong with each.
    """

    id: str
    stage: str
    reason: str
    detail: str = ""
    place: str = ""
    tries: tuple[Mapping[str, Any], ...] = ()


@dataclass
class Found:
    """What a source gave.

    Attributes:
        rows: sampled ones, in the order of the source.
        rejected: rows that cannot be used.
        read: rows in all.
        not_sampled: usable ones that were not drawn.
    """

    rows: list[Row] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    read: int = 0
    not_sampled: int = 0


@dataclass(frozen=True)
class Problem:
    """What is wrong with a row."""

    reason: str
    detail: str = ""
    id: str = ""


class RowError(ClearValueError):
    """A row that cannot be used.

    Attributes:
        reason: in a few words, for counting.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def problem_of(error: ClearValueError, name: object) -> Problem:
    """An error as what is wrong with the row of a name."""
    reason = error.reason if isinstance(error, RowError) else "bad row"
    return Problem(reason, str(error), "" if name is None else str(name))


Placed = Iterator[tuple[str, Row | Problem]]
"""Places in a file, in words, and what stands there."""


def words_of(entry: Mapping[str, Any], key: str) -> str:
    """The text under a key of a row.

    Raises:
        RowError: there is none, or it is empty.
    """
    value = entry.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if value is None:
        raise RowError(
            "bad row", f"key {key!r} is missing; the row has {', '.join(map(repr, entry)) or 'none'}"
        )
    if not isinstance(value, str):
        raise RowError("bad row", f"{key}={value!r}: must be a text")
    if not value.strip():
        raise RowError("empty text", f"{key} is empty")
    return value.strip()


def with_options(question: str, options: list[str]) -> str:
    """A question as it is asked with its options: a letter and a text a line."""
    listed = [f"{letter}. {text}" for letter, text in letters_of(options).items()]
    return "\n".join([question, *listed, CHOOSE])
