"""The questions of one TSV file: read in one pass, checked, grouped; pictures stay on disk until they are asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from clear_adapters.datasets.tsv import POINTER, TsvError, TsvFile, TsvRow, options_in, picture_bytes
from clear_adapters.errors import ImageError
from clear_adapters.images import load_image
from clear_adapters.mmd_bench.tasks import Task, prompt
from clear_adapters.scoring import lone_letter

if TYPE_CHECKING:
    from PIL import Image

_ROTATION = 1_000_000
"""Without a column g_index, the rotations of a circular question differ by multiples of this (VLMEvalKit's rule)."""


@dataclass(frozen=True)
class Question:
    """One row that is asked.

    Attributes:
        index: unique in its file.
        place: line and byte offset of the row.
        picture: the same of the row that holds its picture.
        prompt: what a model is asked.
        text: the question alone.
        truth: letter of the true option, or the true answer.
        options: text by letter; empty where there are none.
        group: what is counted together: rotations of a question, halves of a pair; else the index.
        category: as the file has it; empty without one.
        source: the same.
    """

    index: str
    place: tuple[int, int]
    picture: tuple[int, int]
    prompt: str
    text: str
    truth: str
    options: Mapping[str, str]
    group: str
    category: str = ""
    source: str = ""


@dataclass(frozen=True)
class QuestionSet:
    """The questions of one file.

    Attributes:
        task: whose they are.
        file: where they lie.
        questions: in the order of the file.
        skipped: rows that were left out because something is wrong with them, with the reason.
        without_picture: rows without any picture, which VLMEvalKit leaves out as well.
        left_with_group: good rows that were left out because another row of their group is bad.
    """

    task: Task
    file: TsvFile
    questions: tuple[Question, ...]
    skipped: tuple[TsvError, ...] = ()
    without_picture: int = 0
    left_with_group: int = 0

    def image(self, question: Question) -> Image.Image:
        """The picture of a question, RGB.

        Raises:
            TsvError: it cannot be decoded.
        """
        return read_picture(self.file, question.picture)

    def first(self, units: int | None) -> QuestionSet:
        """The same file with its first units only: whole groups, in the order of the file."""
        if units is None:
            return self
        if self.task.unit == "pair":
            units //= 2
        kept = set(list(dict.fromkeys(q.group for q in self.questions))[:units])
        return replace(self, questions=tuple(q for q in self.questions if q.group in kept))

    def undecodable(self) -> list[TsvError]:
        """What is wrong with pictures that cannot be decoded; every picture is decoded once."""

        def tried(place: tuple[int, int]) -> TsvError | None:
            try:
                read_picture(self.file, place)
            except TsvError as error:
                return error
            return None

        with ThreadPoolExecutor() as pool:
            found = pool.map(tried, dict.fromkeys(q.picture for q in self.questions))
            return [error for error in found if error is not None]

    def readable(self) -> QuestionSet:
        """The same without the groups of which a picture cannot be decoded; every picture is decoded once."""
        broken = self.undecodable()
        lines = {error.line for error in broken}
        return self._without({q.group for q in self.questions if q.picture[0] in lines}, broken)

    def among(self, indices: Collection[str], reason: str) -> QuestionSet:
        """The same without the groups of which a row is not among some; the reason goes into `skipped`."""
        lacking = [q for q in self.questions if q.index not in indices]
        errors = [TsvError(self.file.path, q.place[0], f"row {q.index!r} {reason}") for q in lacking]
        return self._without({q.group for q in lacking}, errors)

    def _without(self, groups: Collection[str], errors: Sequence[TsvError]) -> QuestionSet:
        kept = tuple(q for q in self.questions if q.group not in groups)
        lines = {error.line for error in errors}
        left = len(self.questions) - len(kept) - sum(q.place[0] in lines for q in self.questions)
        if errors and not kept:
            raise TsvError(
                self.file.path,
                None,
                f"no question is left that can be asked; the first one lost: {errors[0]}",
            )
        return replace(
            self,
            questions=kept,
            skipped=(*self.skipped, *errors),
            left_with_group=self.left_with_group + left,
        )

    def digest(self) -> str:
        """A short hash of what is asked: indices, prompts and truths, not pictures."""
        listed = [[q.index, q.prompt, q.truth] for q in self.questions]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]


def read_picture(file: TsvFile, place: tuple[int, int]) -> Image.Image:
    """The picture in a row, RGB.

    Raises:
        TsvError: it cannot be decoded.
    """
    try:
        return load_image(picture_bytes(file, place))
    except ImageError as error:
        raise TsvError(file.path, place[0], f"the picture cannot be decoded: {error}") from error


def read_questions(path: str | Path, task: Task, *, skip_bad: bool = False) -> QuestionSet:
    """Reads and checks a file of a task; pictures are looked up, not decoded.

    Args:
        path: the TSV file.
        task: what it must hold.
        skip_bad: leave bad rows out instead of refusing the file. What is counted together is left out together.

    Raises:
        TsvError: a column is missing, or a row is damaged, stands twice, points at a missing row, or has an answer that
            cannot be true; the message names file and line.
    """
    file = TsvFile(path)
    if "image" not in file.columns and "image_path" in file.columns:
        raise TsvError(file.path, 1, "pictures are named by path: only those within the file can be read")
    file.require("index", "image", "question", "answer", *task.columns)
    bad: list[TsvError] | None = [] if skip_bad else None
    scan = _Scan(file, task, bad)
    for row in file.rows(bad):
        scan.guarded(scan.add, row)
    return scan.finish()


@dataclass
class _Scan:
    """A pass over a file."""

    file: TsvFile
    task: Task
    bad: list[TsvError] | None
    found: dict[str, tuple[Question, str]] = field(default_factory=dict)
    pictures: dict[str, tuple[int, int]] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    without: int = 0

    def guarded(self, step: object, *arguments: object) -> None:
        """Runs a step; what it refuses is raised, or noted where bad rows are skipped."""
        try:
            step(*arguments)  # type: ignore[operator]
        except TsvError as error:
            if self.bad is None:
                raise
            self.bad.append(error)

    def refuse(self, line: int, reason: str, group: str = "") -> None:
        self.broken.add(group)
        raise TsvError(self.file.path, line, reason)

    def add(self, row: TsvRow) -> None:
        values, line = row.values, row.line
        index = values.get("index", "").strip()
        if not index:
            self.refuse(line, "the row has no index")
        if index in self.lines:
            self.refuse(line, f"index {index!r} stands in line {self.lines[index]} already")
        self.lines[index] = line
        group = self.group(index, values, line)
        image = values.get("image", "").strip()
        if not image:
            self.without += 1
            return
        if image.startswith("["):
            self.refuse(line, "several pictures in one row: one a question can be asked about", group)
        target = image if len(image) <= POINTER else index
        if target == index:
            if len(image) <= POINTER:  # its own index
                self.refuse(
                    line, f"the picture is said to be that of row {index!r}, which is this row", group
                )
            self.pictures[index] = (line, row.offset)
        options = options_in(values)
        if not values.get("question", "").strip():
            self.refuse(line, "the question is empty", group)
        if self.task.prompt == "column" and not values.get("prompt", "").strip():
            self.refuse(line, "the prompt is empty", group)
        question = Question(
            index=index,
            place=(line, row.offset),
            picture=(line, row.offset),
            prompt=prompt(self.task, values, options),
            text=values["question"].strip(),
            truth=self.truth(values, options, line, group),
            options=options,
            group=group,
            category=values.get("category", "").strip(),
            source=values.get("source", "").strip(),
        )
        self.found[index] = (question, target)

    def group(self, index: str, values: Mapping[str, str], line: int) -> str:
        if self.task.unit not in ("circle", "pair"):
            return index
        if not index.removesuffix(".0").isdigit():
            self.refuse(line, f"index {index!r} is no whole number, which a {self.task.unit} is told by")
        if self.task.unit == "pair":
            return index
        own = values.get("g_index", "").strip().removesuffix(".0")
        return own or str(_number(index) % _ROTATION)

    def truth(self, values: Mapping[str, str], options: Mapping[str, str], line: int, group: str) -> str:
        answer = values.get("answer", "").strip()
        if not answer:
            self.refuse(line, "the answer is empty, so nothing could be right", group)
        if not options:
            return answer
        letter = lone_letter(answer)
        if letter not in options:
            self.refuse(line, f"the answer {answer!r} is none of the options {', '.join(options)}", group)
        return letter

    def finish(self) -> QuestionSet:
        questions: list[Question] = []
        for question, target in self.found.values():
            self.guarded(self.resolve, question, target, questions)
        questions = self.paired(questions) if self.task.unit == "pair" else questions
        if self.task.unit == "circle":
            whole = {q.group for q in questions if str(_number(q.index)) == q.group}
            for question in questions:
                if question.group not in whole and question.group not in self.broken:
                    self.guarded(
                        self.refuse,
                        question.place[0],
                        f"a rotation of row {question.group!r}, which is not there",
                        question.group,
                    )
        kept = [q for q in questions if q.group not in self.broken]
        if not kept:
            raise TsvError(self.file.path, None, "holds no question that can be asked")
        bad = sorted(self.bad or (), key=lambda error: error.line or 0)
        left = (
            len(self.found)
            - len(kept)
            - sum(e.line in {q.place[0] for q, _ in self.found.values()} for e in bad)
        )
        return QuestionSet(self.task, self.file, tuple(kept), tuple(bad), self.without, left)

    def resolve(self, question: Question, target: str, questions: list[Question]) -> None:
        place = self.pictures.get(target)
        if place is None:
            why = "holds no picture of its own" if target in self.lines else "is not there"
            self.refuse(
                question.place[0], f"points at the picture of row {target!r}, which {why}", question.group
            )
        else:
            questions.append(replace(question, picture=place))

    def paired(self, questions: list[Question]) -> list[Question]:
        """Neighbours in the order of all indices, those of bad rows too, are the halves of a pair."""
        ordered = sorted(self.lines, key=_number)
        first = {index: ordered[i - i % 2] for i, index in enumerate(ordered)}
        halves: dict[str, list[Question]] = {}
        for question in sorted(questions, key=lambda q: _number(q.index)):
            halves.setdefault(first[question.index], []).append(question)
        self.broken |= {first[index] for index in self.broken if index in first}
        for group, pair in halves.items():
            if group not in self.broken and (len(pair) != 2 or pair[0].text != pair[1].text):
                self.guarded(
                    self.refuse,
                    pair[0].place[0],
                    f"row {pair[0].index!r} has no other half that asks the same",
                    group,
                )
        return [replace(q, group=first[q.index]) for q in questions]


def _number(index: str) -> int:
    return int(index.removesuffix(".0"))


def lines_of(errors: Iterable[TsvError]) -> list[dict[str, object]]:
    """Bad rows as plain data: line and reason."""
    return [{"line": error.line, "reason": error.reason} for error in errors]
