"""The growing sets of one task, with the counts of what was written and left out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clear_adapters.journal import Journal, Writer
from clear_adapters.mmd_bench.pictures import Made
from clear_adapters.mmd_bench.questions import lines_of
from clear_adapters.mmd_bench.tasks import Task

_PICTURES = "pictures"


class TaskJournal(Journal):
    """The journal of one task's sets; a step is one row of the input.

    Attributes:
        counts: what was written and left out so far.
    """

    def __init__(self, folder: Path, task: Task, conditions: Sequence[str]) -> None:
        self.counts: dict[str, Any] = {"rows": 0, "pictures": 0, "bad": [], "left_with_group": 0}
        self._conditions = tuple(conditions)
        files = {c: folder / task.file_name(c) for c in conditions}
        files[_PICTURES] = folder / f"{task.file}.manifest.jsonl"
        super().__init__(folder / f"{task.file}.journal", files, seen=self._add)

    def _add(self, step: Mapping[str, Any]) -> None:
        for key, value in step.items():
            self.counts[key] += value

    @contextmanager
    def rows(self, header: str) -> Iterator[TaskWriter]:
        """A context in which rows can be written, from the last whole one on."""
        with self.opened(dict.fromkeys(self._conditions, header.encode())) as writer:
            yield TaskWriter(writer)


class TaskWriter:
    """Writes rows of all sets."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def write(self, made: Made) -> None:
        """Puts one row of the input on disk, in every set."""
        pictures = "".join(json.dumps(p) + "\n" for p in made.pictures).encode()
        step = {
            "rows": made.written,
            "pictures": len(made.pictures),
            "bad": lines_of(made.bad),
            "left_with_group": made.left,
        }
        self._writer.write(step, {**made.rows, _PICTURES: pictures})
