"""A journal of finished steps, and growing files beside it: what a killed run left whole is known, and work goes on there.

One line of JSON a step, written and flushed when the step is done. With growing files every line says how long each of
them was then; steps of which a file has lost bytes do not count, and neither does a line that was cut off.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from clear_adapters.errors import ClearValueError

Entry = Mapping[str, Any]
"""What a step left behind, as plain data."""


def size_of(path: Path) -> int:
    """Bytes; -1 of a file that is not there."""
    return path.stat().st_size if path.is_file() else -1


def sha256_of(path: Path) -> str:
    """Hash of a file."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def file_facts(path: Path) -> dict[str, Any]:
    """What tells a file from another: its name, bytes and hash."""
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def write_whole(path: Path, text: str) -> None:
    """Writes a text file whole or not at all: beside its place, and then moved there."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def claim(folder: Path, file: str, settings: Mapping[str, Any]) -> None:
    """Makes a folder the place of one build, whose settings stand in a file there; of the same settings it may be already.

    Args:
        folder: made if it is not there.
        file: name of the file of settings.
        settings: plain data.

    Raises:
        ClearValueError: the folder holds something else, or a build of other settings.
    """
    text = json.dumps(settings, sort_keys=True, indent=2) + "\n"
    path = folder / file
    if path.is_file():
        if (there := path.read_bytes()) != text.encode():
            raise ClearValueError(
                f"{folder} holds a data set of other settings ({_difference(there, json.loads(text))}; see {path}): "
                "choose another folder, or delete it"
            )
        return
    if folder.is_dir() and any(p.suffix != ".lock" for p in folder.iterdir()):
        raise ClearValueError(f"{folder} is not empty and no data set of this kind: choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)


def _difference(there: bytes, here: Mapping[str, Any]) -> str:
    try:
        old = json.loads(there)
    except ValueError:
        old = None
    if not isinstance(old, dict):
        return "the file is damaged"
    return ", ".join(_differences(old, here, ""))


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], above: str) -> Iterator[str]:
    for key in sorted({*old, *new}):
        there, here = old.get(key), new.get(key)
        if isinstance(there, dict) and isinstance(here, dict):
            yield from _differences(there, here, f"{above}{key} ")
        elif there != here:
            yield f"{above}{key} {there!r} there and {here!r} here"


class Journal:
    """The steps that are done, and how far the growing files are whole.

    Attributes:
        path: of the journal.
        done: finished steps.
        complete: whether the run said that there are no more.
    """

    def __init__(
        self,
        path: Path,
        files: Mapping[str, Path] | None = None,
        *,
        seen: Callable[[Entry], None] = lambda entry: None,
    ) -> None:
        """Reads what is there.

        Args:
            path: of the journal; it need not be there.
            files: growing files by name, under their final paths; they grow under `PATH.part`.
            seen: called with each step's entry, those that are read and then those that are written.
        """
        self.path = path
        self.done = 0
        self.complete = False
        self._files = dict(files or {})
        self._sizes: dict[str, int] = {}
        self._kept = 0
        self._seen = seen
        self._read()
        if self.complete:
            self.close()

    def _read(self) -> None:
        if not self.path.is_file():
            return
        parts = {name: size_of(part) for name, part in self._parts().items()}
        whole = {n: size if size >= 0 else size_of(self._files[n]) for n, size in parts.items()}
        with self.path.open("rb") as opened:
            for text in opened:
                try:
                    line = json.loads(text)
                except ValueError:  # cut off when the run was killed
                    return
                if not text.endswith(b"\n"):
                    return
                found = whole if line["complete"] else parts
                if any(found[name] < size for name, size in line["sizes"].items()):
                    return
                self._sizes, self.complete = line["sizes"], line["complete"]
                self._kept += len(text)
                if not self.complete:
                    self.done += 1
                    self._seen(line["made"])

    def _parts(self) -> dict[str, Path]:
        return {name: path.with_name(path.name + ".part") for name, path in self._files.items()}

    def opened(self, heads: Mapping[str, bytes] | None = None) -> Writer:
        """A context that writes steps, from the last whole one on.

        Args:
            heads: first bytes of growing files, by name.
        """
        return Writer(self, heads or {})

    def close(self) -> None:
        """Gives the files their names; the journal itself stays until its owner removes it."""
        for name, part in self._parts().items():
            if part.is_file():
                part.replace(self._files[name])


class Writer:
    """An opened journal; leaving it without an exception says that no step is missing."""

    def __init__(self, journal: Journal, heads: Mapping[str, bytes]) -> None:
        self._journal, self._heads = journal, heads
        self._stack = ExitStack()
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> Writer:
        j = self._journal
        for name, path in j._parts().items():
            path.touch()
            opened = self._stack.enter_context(path.open("r+b"))
            opened.truncate(j._sizes.get(name, 0))
            opened.seek(0, os.SEEK_END)
            if j.done == 0:
                opened.write(self._heads.get(name, b""))
            self._files[name] = opened
        self._log = self._stack.enter_context(j.path.open("ab"))
        self._log.truncate(j._kept)
        return self

    def write(self, entry: Entry, parts: Mapping[str, bytes] | None = None) -> None:
        """Puts a finished step on disk.

        Args:
            entry: what it left behind.
            parts: bytes by which the growing files grow.
        """
        for name, text in (parts or {}).items():
            self._files[name].write(text)
        self._journal.done += 1
        self._note(entry, False)
        self._journal._seen(entry)

    def _note(self, entry: Entry, complete: bool) -> None:
        j = self._journal
        for opened in self._files.values():
            opened.flush()
        j._sizes = {name: opened.tell() for name, opened in self._files.items()}
        line = {"sizes": j._sizes, "made": entry, "complete": complete}
        text = json.dumps(line, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        self._log.write(text)
        self._log.flush()
        j._kept += len(text)

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._note({}, True)
            self._journal.complete = True
        self._stack.close()
