"""Where questions come from: rows of LLaVA-style JSON or JSONL, of plain JSONL, and of VLMEvalKit's TSV.

Nothing here decodes a picture. Every row knows the line, or the entry of a JSON list, that it came from, and a row that
cannot be used is kept with the reason.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import re
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from clear_adapters.datasets.builder.plan import Plan
from clear_adapters.datasets.parts import is_text, letter_of, letters_of, matches
from clear_adapters.datasets.tsv import TsvError, TsvFile, TsvRow, picture_bytes
from clear_adapters.errors import ClearValueError
from clear_adapters.scoring import normalise

HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
"""Chinese characters (the Unicode blocks of Han ideographs)."""

CHOOSE = "Choose one option and answer with its letter."
_POINTER = 64
"""An image field of at most so many characters is the index of another row (VLMEvalKit's rule)."""
_TAGGED = re.compile(r"</?(?:think|answer)>|<image_restore>")


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


def read_rows(source: str | Path, pictures: str | Path | None, plan: Plan) -> Found:
    """Reads a source whole, drops what cannot be used and samples the rest by seed.

    Args:
        source: a `.json`, `.jsonl` or `.tsv` file.
        pictures: folder that the rows' picture names are below; None is the source's own folder.
        plan: filters, limit and seed.

    Raises:
        ClearValueError: the file cannot be read at all, or none of its rows can be used.
    """
    path = Path(source).expanduser()
    readers = {".json": _json, ".jsonl": _jsonl, ".tsv": _tsv}
    if path.suffix.lower() not in readers:
        raise ClearValueError(
            f"{str(source)!r}: a source is a .json, .jsonl or .tsv file, or a dataset repository of the Hub (owner/name)"
        )
    if not path.is_file():
        raise ClearValueError(f"there is no file {path}")
    folder = path.parent if pictures is None else Path(pictures).expanduser()
    if not folder.is_dir():
        raise ClearValueError(f"pictures={str(pictures)!r}: there is no folder of that name")
    found = Found()
    kept: list[tuple[int, int, Row]] = []
    ids: set[str] = set()
    asked: dict[tuple[str, str, str], str] = {}
    for number, (place, made) in enumerate(readers[path.suffix.lower()](path, folder)):
        found.read += 1
        problem = made if isinstance(made, Problem) else _unfit(made, asked, plan)
        if problem is not None:
            name = problem.id or f"{path.name}, {place}"
            found.rejected.append(Rejected(name, "source", problem.reason, problem.detail, place))
            continue
        assert isinstance(made, Row)
        asked[_key(made)] = place
        if made.id in ids:  # as of several questions about a picture
            made = replace(made, id=f"{made.id}@{place.replace(' ', '-')}")
        while made.id in ids:
            made = replace(made, id=made.id + "'")
        ids.add(made.id)
        order = _order(plan.seed, made.id)
        if plan.limit is None or len(kept) < plan.limit:
            heapq.heappush(kept, (-order, number, made))
            continue
        found.not_sampled += 1
        heapq.heappushpop(kept, (-order, number, made))
    found.rows = [row for _, _, row in sorted(kept, key=lambda k: k[1])]
    if not found.rows:
        first = found.rejected[0] if found.rejected else None
        told = f"; the first one, {first.place}: {first.detail or first.reason}" if first else ""
        raise ClearValueError(f"{path}: none of {found.read} rows can be used{told}")
    return found


def _order(seed: int, name: str) -> int:
    """A number that follows from seed and id alone, so that which rows are drawn does not depend on the others' order."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/sample/{name}".encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class Problem:
    """What is wrong with a row."""

    reason: str
    detail: str = ""
    id: str = ""


def _key(row: Row) -> tuple[str, str, str]:
    return row.id, row.question, row.picture.name


def _unfit(row: Row, asked: Mapping[tuple[str, str, str], str], plan: Plan) -> Problem | None:
    if _key(row) in asked:
        told = f"id {row.id!r} with the same question stands in {asked[_key(row)]} already"
        return Problem("repeated row", told, row.id)
    words = (row.id, row.question, row.answer, *row.options, row.kind, row.group, row.fact, row.picture.name)
    if not all(map(is_text, words)):
        return Problem("no text", "half a character (a lone surrogate) stands in it", row.id)
    if not plan.any_language and HAN.search(row.question + row.answer):
        return Problem("language", "there are Chinese characters in it", row.id)
    if any(map(_TAGGED.search, (row.question, row.answer, row.fact, *row.options))):
        told = "question, answer, an option or the fact holds a tag of the protocol"
        return Problem("tags in the text", told, row.id)
    if not (matches(row.answer, row.answer, row.options) if row.options else normalise(row.answer)):
        told = f"the answer {row.answer!r} holds nothing that counts, so no answer could match it"
        return Problem("answer cannot match", told, row.id)
    try:
        there = row.picture.row is not None or row.picture.path.is_file()
    except OSError as error:  # such as a name that no file system takes
        return Problem("missing picture", f"{row.picture.name[:80]!r}: {error.strerror}", row.id)
    if not there:
        return Problem("missing picture", f"there is no file {row.picture.path}", row.id)
    return None


class _RowError(ClearValueError):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def _problem(error: ClearValueError, name: object) -> Problem:
    reason = error.reason if isinstance(error, _RowError) else "bad row"
    return Problem(reason, str(error), "" if name is None else str(name))


Placed = Iterator[tuple[str, Row | Problem]]


# ---------------------------------------------------------------------------------------------------- JSON


def _json(path: Path, folder: Path) -> Placed:
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ClearValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(entries, list):
        raise ClearValueError(f"{path}: must be a list of rows, not {type(entries).__name__}")
    for number, entry in enumerate(entries, 1):
        yield f"entry {number}", _guarded(entry, folder, f"entry {number}")


def _jsonl(path: Path, folder: Path) -> Placed:
    with path.open("rb") as opened:
        for number, line in enumerate(opened, 1):
            if not line.strip():
                continue
            place = f"line {number}"
            try:
                entry = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                yield place, Problem("bad row", f"not valid JSON: {error}")
                continue
            yield place, _guarded(entry, folder, place)


def _guarded(entry: object, folder: Path, place: str) -> Row | Problem:
    try:
        if not isinstance(entry, dict):
            raise _RowError("bad row", f"a row must be a JSON object, not {type(entry).__name__}")
        return _row(entry, folder, place)
    except ClearValueError as error:
        return _problem(error, entry.get("id") if isinstance(entry, dict) else None)


def _row(entry: Mapping[str, Any], folder: Path, place: str) -> Row:
    if "conversations" in entry:
        question, answer = _exchange(entry["conversations"])
        plain = False
    else:
        question, answer, plain = _words(entry, "question"), _words(entry, "answer"), True
    options = entry.get("options") or []
    if not isinstance(options, list) or not all(isinstance(o, str) and o.strip() for o in options):
        raise _RowError("bad row", f"options={options!r}: must be a list of texts")
    if options:
        if len(options) > len(string.ascii_uppercase):
            raise _RowError("too many options", f"{len(options)} options, and there are letters for 26")
        letter = letter_of(answer, letters_of(options))
        if letter is None:
            raise _RowError("answer is no option", f"the answer {answer!r} is none of {options!r}")
        if plain:
            # The question that is written here asks for the letter.
            question, answer = with_options(question, options), letter
    name = entry.get("image")
    if isinstance(name, list):
        if len(name) != 1:
            raise _RowError(
                "several pictures", f"{len(name)} pictures in one row: one a question can be asked about"
            )
        name = name[0]
    if name in (None, ""):
        raise _RowError("no picture", "the row names no picture")
    if not isinstance(name, str):
        raise _RowError("bad row", f"image={name!r}: must be the name of a file")
    return Row(
        id=str(entry["id"]) if entry.get("id") not in (None, "") else place.replace(" ", "-"),
        question=question,
        answer=answer,
        picture=Picture(name, _below(folder, name)),
        place=place,
        options=tuple(options),
        kind=str(entry.get("kind") or entry.get("subset") or entry.get("data_source") or ""),
        group=str(entry.get("group") or ""),
        fact=str(entry.get("fact") or "").strip(),
    )


def _below(folder: Path, name: str) -> Path:
    windows = PureWindowsPath(name)
    if windows.is_absolute() or windows.drive or PurePosixPath(name).is_absolute() or ".." in windows.parts:
        raise _RowError(
            "bad row",
            f"image={name!r}: must be a path below {folder}, neither absolute nor through a parent folder",
        )
    return folder / name


def _words(entry: Mapping[str, Any], key: str) -> str:
    value = entry.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if value is None:
        raise _RowError(
            "bad row", f"key {key!r} is missing; the row has {', '.join(map(repr, entry)) or 'none'}"
        )
    if not isinstance(value, str):
        raise _RowError("bad row", f"{key}={value!r}: must be a text")
    if not value.strip():
        raise _RowError("empty text", f"{key} is empty")
    return value.strip()


def _exchange(turns: object) -> tuple[str, str]:
    """The first exchange of a conversation, which alone the authors use."""
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(t, dict) for t in turns[:2]):
        raise _RowError("bad row", "conversations must be a list of a human's and a model's turn")
    human, model = turns[0], turns[1]
    if human.get("from") not in ("human", "user") or model.get("from") not in ("gpt", "assistant"):
        raise _RowError("bad row", "conversations must begin with a turn from 'human' and one from 'gpt'")
    question, answer = _words(human, "value"), _words(model, "value")
    if question.count("<image>") > 1:
        raise _RowError(
            "several pictures", "the question names several pictures: one a question can be asked about"
        )
    question = question.replace("<image>", "").strip()
    if not question:
        raise _RowError("empty text", "the human's turn asks nothing")
    return question, answer


def with_options(question: str, options: list[str]) -> str:
    """A question as it is asked with its options: a letter and a text a line."""
    listed = [f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, options, strict=False)]
    return "\n".join([question, *listed, CHOOSE])


# ---------------------------------------------------------------------------------------------------- TSV


def _tsv(path: Path, folder: Path) -> Placed:
    file = TsvFile(path)
    by_path = "image" not in file.columns and "image_path" in file.columns
    file.require("index", "image_path" if by_path else "image", "question", "answer")
    bad: list[TsvError] = []
    rows = list(_placed(file, bad))
    own = {
        r.values.get("index", "").strip(): (r.line, r.offset)
        for r in rows
        if len(r.values.get("image", "").strip()) > _POINTER
    }
    for error in bad:
        yield f"line {error.line}", Problem("bad row", error.reason)
    for row in rows:
        index = row.values.get("index", "").strip()
        try:
            yield f"line {row.line}", _tsv_row(path, folder, row, index, own, by_path)
        except ClearValueError as error:
            yield f"line {row.line}", _problem(error, index)


def _placed(file: TsvFile, bad: list[TsvError]) -> Iterator[TsvRow]:
    """The rows without their pictures, which would not fit into memory."""
    for row in file.rows(bad):
        image = row.values.get("image", "")
        short = image if len(image.strip()) <= _POINTER else "x" * (_POINTER + 1)
        yield TsvRow(row.line, row.offset, {**row.values, "image": short} if image else row.values)


def _column_of(answer: str, filled: Mapping[str, str]) -> str | None:
    """The column that holds the true option; a letter up to the last column is never taken for the text of another."""
    letter = answer.strip("() .").upper()
    if len(letter) == 1 and "A" <= letter <= max(filled):
        return letter if letter in filled else None
    return letter_of(answer, filled)


def _tsv_row(
    path: Path, folder: Path, row: TsvRow, index: str, own: Mapping[str, tuple[int, int]], by_path: bool
) -> Row:
    values = row.values
    if not index:
        raise _RowError("bad row", "the row has no index")
    question, answer = _words(values, "question"), _words(values, "answer")
    filled = {c: values[c].strip() for c in string.ascii_uppercase if values.get(c, "").strip()}
    options = list(filled.values())
    if options:
        letter = _column_of(answer, filled)
        if letter is None:
            raise _RowError("answer is no option", f"the answer {answer!r} is none of the options")
        # Columns that are empty are not asked about, so the letters after them move up.
        answer = string.ascii_uppercase[list(filled).index(letter)]
        hint = values.get("hint", "").strip()
        question = with_options(f"{hint}\n{question}" if hint else question, options)
    if by_path:
        name = values.get("image_path", "").strip()
        if not name:
            raise _RowError("no picture", "the row names no picture")
        picture = Picture(name, _below(folder, name))
    else:
        image = values.get("image", "").strip()
        if not image:
            raise _RowError("no picture", "the row holds no picture")
        if image.startswith("["):
            raise _RowError(
                "several pictures", "several pictures in one row: one a question can be asked about"
            )
        place = (row.line, row.offset) if len(image) > _POINTER else own.get(image)
        if place is None:
            raise _RowError("missing picture", f"points at the picture of row {image!r}, which is not there")
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
