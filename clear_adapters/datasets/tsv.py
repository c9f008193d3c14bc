"""Tables in VLMEvalKit's form: one TSV file a benchmark, its pictures as base64 text in the rows.

Files of this kind reach gigabytes, so nothing here holds more than one row. A row is known by the line and the byte at
which it begins; what needs a picture reads that row again.
"""

from __future__ import annotations

import base64
import binascii
import csv
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from clear_adapters.errors import ClearValueError

POINTER = 64
"""An image field of at most so many characters is the index of another row (VLMEvalKit's rule)."""

_LONGEST_ROW = 2**26
"""Bytes. Far above any picture; a quote that is never closed would take the rest of the file for one row."""


@dataclass(frozen=True)
class TsvRow:
    """One row.

    Attributes:
        line: the line of the file on which it begins; the header is line 1.
        offset: the byte at which it begins.
        values: text by column; empty fields are left out.
    """

    line: int
    offset: int
    values: dict[str, str]


class TsvError(ClearValueError):
    """A table that cannot be used as it is; the message names file and line.

    Attributes:
        path: of the file.
        line: where; None where it concerns the whole file.
        reason: without the place.
    """

    def __init__(self, path: Path, line: int | None, reason: str) -> None:
        place = str(path) if line is None else f"{path}, line {line}"
        super().__init__(f"{place}: {reason}")
        self.path = path
        self.line = line
        self.reason = reason

    def __reduce__(self) -> tuple[type[TsvError], tuple[Path, int | None, str]]:
        """Let it pass between processes, which `args` alone would not."""
        return type(self), (self.path, self.line, self.reason)


class _Lines:
    """The lines of a file as text, with the place of the next one; a row may take only so many bytes of them."""

    def __init__(self, path: Path, opened: BinaryIO, line: int, offset: int) -> None:
        self.path, self.opened, self.line, self.offset = path, opened, line, offset
        self.begin()

    def begin(self) -> None:
        """A row begins at the next line."""
        self.start = self.second = (self.line, self.offset)
        self.left = _LONGEST_ROW

    def go_back(self) -> None:
        """To the line after the one on which the row began: what follows may not be part of it."""
        self.line, self.offset = self.second
        self.opened.seek(self.offset)

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        raw = self.opened.readline(self.left + 1)
        if not raw:
            raise StopIteration
        length, too_long = len(raw), len(raw) > self.left
        while too_long and not raw.endswith(b"\n"):
            raw = self.opened.readline(2**16)
            if not raw:
                break
            length += len(raw)
        first = (self.line, self.offset) == self.start
        self.line += 1
        self.offset += length
        self.left -= length
        if first:
            self.second = (self.line, self.offset)
        if too_long:
            what = "the line" if first else "a quote opens that is not closed, or the row"
            raise TsvError(
                self.path,
                self.start[0],
                f"{what} has more than {_LONGEST_ROW:,} bytes, which no picture takes: mend the row or leave it out",
            )
        try:
            return raw.decode("utf-8-sig" if self.line == 2 and self.offset == length else "utf-8")
        except UnicodeDecodeError as error:
            raise TsvError(self.path, self.start[0], f"not UTF-8 text ({error.reason})") from None


class TsvFile:
    """A table on disk.

    Attributes:
        path: where it lies.
        columns: names of the columns, in order.
    """

    def __init__(self, path: str | Path) -> None:
        """Reads the header alone.

        Raises:
            TsvError: there is no file or no header, or a column stands in it twice.
        """
        self.path = Path(path)
        self.columns: tuple[str, ...] = ()  # not known yet, so the header may have any number of fields
        # A limit of the whole process: its default, 128 KiB, is less than one photograph.
        csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_ROW))
        try:
            with self.path.open("rb") as opened:
                first = next(self._records(opened, 1, 0), None)
        except OSError as error:
            raise TsvError(self.path, None, f"cannot be read ({error.strerror})") from error
        if first is None:
            raise TsvError(self.path, None, "is empty: a table begins with the names of its columns")
        if isinstance(first, TsvError):
            raise first
        self.columns = tuple(first[2])
        twice = sorted({c for c in self.columns if self.columns.count(c) > 1})
        if twice:
            raise TsvError(self.path, 1, f"column {twice[0]!r} stands twice in the header")

    def require(self, *columns: str) -> None:
        """Checks that columns are there.

        Raises:
            TsvError: one is not.
        """
        for name in columns:
            if name not in self.columns:
                raise TsvError(
                    self.path, 1, f"column {name!r} is missing; the columns are {', '.join(self.columns)}"
                )

    def rows(self, bad: list[TsvError] | None = None) -> Iterator[TsvRow]:
        """The rows in order.

        After a bad row the reading goes on at the line after the one on which it began, so that a quote that is not
        closed costs one row. Further lines of a bad row are bad rows of their own.

        Args:
            bad: takes up what is wrong with rows, which are then left out.

        Raises:
            TsvError: a row is damaged or cut off, and `bad` is None.
        """
        with self.path.open("rb") as opened:
            records = self._records(opened, 1, 0)
            next(records, None)
            for record in records:
                if not isinstance(record, TsvError):
                    yield self._row(record)
                elif bad is None:
                    raise record
                else:
                    bad.append(record)

    def read(self, row: TsvRow | tuple[int, int]) -> TsvRow:
        """One row again.

        Args:
            row: the row, or its line and offset.

        Raises:
            TsvError: there is no such row any more.
        """
        line, offset = (row.line, row.offset) if isinstance(row, TsvRow) else row
        with self.path.open("rb") as opened:
            opened.seek(offset)
            record = next(self._records(opened, line, offset), None)
        if record is None:
            raise TsvError(self.path, line, "the file has changed: there is no row here any more")
        if isinstance(record, TsvError):
            raise record
        return self._row(record)

    def _row(self, record: tuple[int, int, list[str]]) -> TsvRow:
        line, offset, fields = record
        return TsvRow(line, offset, {c: f for c, f in zip(self.columns, fields, strict=True) if f != ""})

    def _records(
        self, opened: BinaryIO, line: int, offset: int
    ) -> Iterator[tuple[int, int, list[str]] | TsvError]:
        lines = _Lines(self.path, opened, line, offset)
        while True:
            lines.begin()
            start = lines.start
            try:
                fields = next(csv.reader(lines, delimiter="\t", strict=True))
                if fields and self.columns and len(fields) != len(self.columns):
                    raise csv.Error(f"{len(fields)} fields for {len(self.columns)} columns")
            except StopIteration:
                return
            except TsvError as error:
                lines.go_back()
                yield error
            except csv.Error as error:
                lines.go_back()
                yield TsvError(self.path, start[0], f"the row is cut off or damaged ({error})")
            else:
                if fields:
                    yield (*start, fields)


def options_in(values: Mapping[str, str]) -> dict[str, str]:
    """The options of a row by the letters of their columns; columns that are empty are left out."""
    return {c: values[c].strip() for c in string.ascii_uppercase if values.get(c, "").strip()}


def picture_bytes(file: TsvFile, place: tuple[int, int]) -> bytes:
    """The encoded picture in a row.

    Raises:
        TsvError: the row holds no base64 text.
    """
    text = file.read(place).values.get("image", "")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise TsvError(file.path, place[0], f"the picture is no base64 text ({error})") from None


def format_row(fields: list[str]) -> str:
    """One line of such a table, as pandas writes it: fields with a tab, quote or line break are quoted."""
    return "\t".join(
        '"' + f.replace('"', '""') + '"' if any(c in f for c in '\t\n\r"') else f for f in fields
    ) + ("\n")
