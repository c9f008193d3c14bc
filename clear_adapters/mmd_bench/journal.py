"""The growing files of a build, and beside them a journal of how far each was whole when the build was stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from clear_adapters.mmd_bench.pictures import Made
from clear_adapters.mmd_bench.questions import lines_of
from clear_adapters.mmd_bench.tasks import Task


def size_of(path: Path) -> int:
    """Bytes; -1 of a file that is not there."""
    return path.stat().st_size if path.is_file() else -1


class Journal:
    """The growing files of one task, and how far they are whole.

    Attributes:
        done: rows of the input that are in the files or were left out.
        complete: whether all are.
        counts: what was written and left out so far.
        kept: bytes of the journal that hold of the files.
    """

    def __init__(self, folder: Path, task: Task, conditions: Sequence[str]) -> None:
        self.files = {c: folder / task.file_name(c) for c in conditions}
        self.pictures = folder / f"{task.file}.manifest.jsonl"
        self.path = folder / f"{task.file}.journal"
        self.done = self.kept = 0
        self.sizes: dict[str, int] = {}
        self.complete = False
        self.counts: dict[str, Any] = {"rows": 0, "pictures": 0, "bad": [], "left_with_group": 0}
        self._read()
        if self.complete:
            self.close()

    def _read(self) -> None:
        """Reads as far as the files are as long as it says: one that was lost or cut off is built again from there."""
        if not self.path.is_file():
            return
        parts = {name: size_of(path) for name, path in self._parts().items()}
        whole = {n: size if size >= 0 else size_of(self._named()[n]) for n, size in parts.items()}
        with self.path.open("rb") as opened:
            for text in opened:
                try:
                    entry = json.loads(text)
                except ValueError:  # cut off when the run was killed
                    return
                found = whole if entry["complete"] else parts
                if any(found[name] < size for name, size in entry["sizes"].items()):
                    return
                self.done, self.sizes, self.complete = entry["done"], entry["sizes"], entry["complete"]
                self.add(entry["made"])
                self.kept += len(text)

    def add(self, made: Mapping[str, Any]) -> None:
        """Counts what one row gave."""
        for key, value in made.items():
            self.counts[key] += value

    def _named(self) -> dict[str, Path]:
        return {**self.files, "pictures": self.pictures}

    def _parts(self) -> dict[str, Path]:
        return {name: path.with_name(path.name + ".part") for name, path in self._named().items()}

    def opened(self, header: str) -> Any:
        """A context in which rows can be written, from the last whole one on."""
        return _Writer(self, header)

    def close(self) -> None:
        """Gives the files their names; the journal stays until the whole build is finished."""
        for name, path in self._named().items():
            part = self._parts()[name]
            if part.is_file():
                part.replace(path)


class _Writer:
    def __init__(self, journal: Journal, header: str) -> None:
        self.journal, self.header = journal, header

    def __enter__(self) -> Any:
        j = self.journal
        self.stack = ExitStack()
        self.files = {}
        for name, path in j._parts().items():
            path.touch()
            opened = self.stack.enter_context(path.open("r+b"))
            opened.truncate(j.sizes.get(name, 0))
            opened.seek(0, os.SEEK_END)
            if j.done == 0 and name != "pictures":
                opened.write(self.header.encode())
            self.files[name] = opened
        self.log = self.stack.enter_context(j.path.open("ab"))
        self.log.truncate(j.kept)
        return self.write

    def write(self, made: Made) -> None:
        j = self.journal
        for condition, text in made.rows.items():
            self.files[condition].write(text)
        self.files["pictures"].write("".join(json.dumps(p) + "\n" for p in made.pictures).encode())
        step = {
            "rows": made.written,
            "pictures": len(made.pictures),
            "bad": lines_of(made.bad),
            "left_with_group": made.left,
        }
        j.add(step)
        j.done += 1
        self._note(step, False)

    def _note(self, step: Mapping[str, Any], complete: bool) -> None:
        j = self.journal
        for opened in self.files.values():
            opened.flush()
        j.sizes = {name: opened.tell() for name, opened in self.files.items()}
        entry = {"done": j.done, "sizes": j.sizes, "made": step, "complete": complete}
        self.log.write(json.dumps(entry).encode() + b"\n")
        self.log.flush()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._note({}, True)
            self.journal.complete = True
        self.stack.close()
