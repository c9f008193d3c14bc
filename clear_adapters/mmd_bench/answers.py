"""The answers of one system to one set: a JSONL file that grows batch by batch and can be gone on with.

A batch is written whole, so what is there after a kill ends at a batch's end, but for a line cut off, which is dropped
together with its batch: the next run then asks in the same batches as one that was never stopped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clear_adapters.errors import ClearValueError


class AnswerFile:
    """One line a question, in the order of the set.

    Attributes:
        path: where it lies.
        records: what is in it.
    """

    def __init__(self, path: str | Path, indices: Sequence[str], batch_size: int) -> None:
        """Reads what is there, and drops a batch that is not whole.

        Args:
            path: the file; it need not exist.
            indices: of all questions, in order.
            batch_size: rows a batch.

        Raises:
            ClearValueError: the file holds answers to other questions.
        """
        self.path = Path(path)
        self.records: list[dict[str, Any]] = []
        if not self.path.is_file():
            return
        # Not splitlines, which also splits at characters that may stand in an answer.
        for text in self.path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                self.records.append(json.loads(text))
            except ValueError:  # cut off when the run was killed
                break
        count = len(self.records)
        if count < len(indices):
            count -= count % batch_size
        self.records = self.records[:count]
        for number, (record, index) in enumerate(zip(self.records, indices, strict=False), 1):
            if record.get("index") != index:
                raise ClearValueError(
                    f"{self.path}, line {number}: answers question {record.get('index')!r} where {index!r} is asked: "
                    "choose another output folder"
                )
        if count > len(indices):
            raise ClearValueError(f"{self.path} holds {count} answers to {len(indices)} questions")
        part = self.path.with_name(self.path.name + ".part")
        part.write_text("".join(map(_line, self.records)), encoding="utf-8")
        part.replace(self.path)

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Adds a batch."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as opened:
            opened.write("".join(map(_line, records)))
        self.records.extend(records)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, sort_keys=True) + "\n"
