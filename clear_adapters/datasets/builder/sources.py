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
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from clear_adapters.datasets.builder.plan import Plan
from clear_adapters.datasets.builder.rows import (
    Found,
    Picture,
    Placed,
    Problem,
    Rejected,
    Row,
    RowError,
    problem_of,
    with_options,
    words_of,
)
from clear_adapters.datasets.builder.tables import read_table
from clear_adapters.datasets.example import below
from clear_adapters.datasets.parts import TAG, is_text
from clear_adapters.errors import ClearValueError
from clear_adapters.scoring import letter_of, letters_of, matches, normalise

HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
"""Chinese characters (the Unicode blocks of Han ideographs)."""


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
    readers = {".json": _json, ".jsonl": _jsonl, ".tsv": read_table}
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
    if any(map(TAG.search, (row.question, row.answer, row.fact, *row.options))):
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
            raise RowError("bad row", f"a row must be a JSON object, not {type(entry).__name__}")
        return _row(entry, folder, place)
    except ClearValueError as error:
        return problem_of(error, entry.get("id") if isinstance(entry, dict) else None)


def _row(entry: Mapping[str, Any], folder: Path, place: str) -> Row:
    if "conversations" in entry:
        question, answer = _exchange(entry["conversations"])
        plain = False
    else:
        question, answer, plain = words_of(entry, "question"), words_of(entry, "answer"), True
    question = _without_mark(question)
    options = entry.get("options") or []
    if not isinstance(options, list) or not all(isinstance(o, str) and o.strip() for o in options):
        raise RowError("bad row", f"options={options!r}: must be a list of texts")
    if options:
        if len(options) > len(string.ascii_uppercase):
            raise RowError("too many options", f"{len(options)} options, and there are letters for 26")
        letter = letter_of(answer, letters_of(options))
        if letter is None:
            raise RowError("answer is no option", f"the answer {answer!r} is none of {options!r}")
        if plain:
            # The question that is written here asks for the letter.
            question, answer = with_options(question, options), letter
    name = entry.get("image")
    if isinstance(name, list):
        if len(name) != 1:
            raise RowError(
                "several pictures", f"{len(name)} pictures in one row: one a question can be asked about"
            )
        name = name[0]
    if name in (None, ""):
        raise RowError("no picture", "the row names no picture")
    if not isinstance(name, str):
        raise RowError("bad row", f"image={name!r}: must be the name of a file")
    return Row(
        id=str(entry["id"]) if entry.get("id") not in (None, "") else place.replace(" ", "-"),
        question=question,
        answer=answer,
        picture=Picture(name, below(folder, name, "image")),
        place=place,
        options=tuple(options),
        kind=str(entry.get("kind") or entry.get("subset") or entry.get("data_source") or ""),
        group=str(entry.get("group") or ""),
        fact=str(entry.get("fact") or "").strip(),
    )


def _exchange(turns: object) -> tuple[str, str]:
    """The first exchange of a conversation, which alone the authors use."""
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(t, dict) for t in turns[:2]):
        raise RowError("bad row", "conversations must be a list of a human's and a model's turn")
    human, model = turns[0], turns[1]
    if human.get("from") not in ("human", "user") or model.get("from") not in ("gpt", "assistant"):
        raise RowError("bad row", "conversations must begin with a turn from 'human' and one from 'gpt'")
    return words_of(human, "value"), words_of(model, "value")


def _without_mark(question: str) -> str:
    """A question without the mark that stands for its picture."""
    if question.count("<image>") > 1:
        raise RowError(
            "several pictures", "the question names several pictures: one a question can be asked about"
        )
    question = question.replace("<image>", "").strip()
    if not question:
        raise RowError("empty text", "the question is '<image>' alone and asks nothing")
    return question
