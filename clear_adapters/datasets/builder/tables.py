"""Rows of a table in VLMEvalKit's form, whose pictures stay in the file."""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping
from pathlib import Path

from clear_adapters.datasets.builder.rows import (
    Picture,
    Placed,
    Problem,
    Row,
    RowError,
    problem_of,
    with_options,
    words_of,
)
from clear_adapters.datasets.example import below
from clear_adapters.datasets.tsv import POINTER, TsvError, TsvFile, TsvRow, options_in
from clear_adapters.errors import ClearValueError
from clear_adapters.scoring import letter_of, lone_letter


def read_table(path: Path, folder: Path) -> Placed:
    """The rows of a table.

    Args:
        path: the TSV file.
        folder: that pictures are below where the table names them.

    Raises:
        TsvError: it is no such table.
    """
    file = TsvFile(path)
    by_path = "image" not in file.columns and "image_path" in file.columns
    file.require("index", "image_path" if by_path else "image", "question", "answer")
    bad: list[TsvError] = []
    rows = list(_placed(file, bad))
    own = {
        r.values.get("index", "").strip(): (r.line, r.offset)
        for r in rows
        if len(r.values.get("image", "").strip()) > POINTER
    }
    for error in bad:
        yield f"line {error.line}", Problem("bad row", error.reason)
    for row in rows:
        index = row.values.get("index", "").strip()
        try:
            yield f"line {row.line}", _row(path, folder, row, index, own, by_path)
        except ClearValueError as error:
            yield f"line {row.line}", problem_of(error, index)


def _placed(file: TsvFile, bad: list[TsvError]) -> Iterator[TsvRow]:
    """The rows without their pictures, which would not fit into memory."""
    for row in file.rows(bad):
        image = row.values.get("image", "")
        short = image if len(image.strip()) <= POINTER else "x" * (POINTER + 1)
        yield TsvRow(row.line, row.offset, {**row.values, "image": short} if image else row.values)


def _column_of(answer: str, filled: Mapping[str, str]) -> str | None:
    """The column that holds the true option; a letter up to the last column is never taken for the text of another."""
    letter = lone_letter(answer)
    if len(letter) == 1 and "A" <= letter <= max(filled):
        return letter if letter in filled else None
    return letter_of(answer, filled)


def _row(
    path: Path, folder: Path, row: TsvRow, index: str, own: Mapping[str, tuple[int, int]], by_path: bool
) -> Row:
    values = row.values
    if not index:
        raise RowError("bad row", "the row has no index")
    question, answer = words_of(values, "question"), words_of(values, "answer")
    filled = options_in(values)
    options = list(filled.values())
    if options:
        letter = _column_of(answer, filled)
        if letter is None:
            raise RowError("answer is no option", f"the answer {answer!r} is none of the options")
        # Columns that are empty are not asked about, so the letters after them move up.
        answer = string.ascii_uppercase[list(filled).index(letter)]
        hint = values.get("hint", "").strip()
        question = with_options(f"{hint}\n{question}" if hint else question, options)
    if by_path:
        name = values.get("image_path", "").strip()
        if not name:
            raise RowError("no picture", "the row names no picture")
        picture = Picture(name, below(folder, name, "image"))
    else:
        image = values.get("image", "").strip()
        if not image:
            raise RowError("no picture", "the row holds no picture")
        if image.startswith("["):
            raise RowError(
                "several pictures", "several pictures in one row: one a question can be asked about"
            )
        place = (row.line, row.offset) if len(image) > POINTER else own.get(image)
        if place is None:
            raise RowError("missing picture", f"points at the picture of row {image!r}, which is not there")
        picture = Picture(f"{path.name}, line {place[0]}", path, place)
    return Row(
        id=index,
        question=question,
        answer=answer,
        picture=picture,
        place=f"line {row.line}",
        options=tuple(options),
        kind=values.get("category", "").strip(),
        group=values.get("group", "").strip(),
    )
