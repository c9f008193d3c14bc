"""The sets that a run needs, found in folders and repositories, read and checked before a model is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clear_adapters.datasets.hub import Found, Source, locate
from clear_adapters.datasets.tsv import TsvError
from clear_adapters.errors import ClearValueError
from clear_adapters.mmd_bench.questions import Question, QuestionSet, read_questions
from clear_adapters.mmd_bench.tasks import CLEAN, REAL, Task


@dataclass(frozen=True)
class BenchSet:
    """One file as it is asked.

    Attributes:
        condition: which of its task's sets.
        questions: what is asked.
        clean: the clean set's question with the same index, where it is needed.
    """

    condition: str
    questions: QuestionSet
    clean: QuestionSet | None = None

    @property
    def task(self) -> Task:
        """Whose set it is."""
        return self.questions.task

    def clean_rows(self) -> dict[str, Question]:
        """The clean set's questions by index."""
        return {} if self.clean is None else {q.index: q for q in self.clean.questions}

    def facts(self) -> dict[str, Any]:
        """What a result file records of it."""
        q = self.questions
        return {
            "file": q.file.path.name,
            "bytes": q.file.path.stat().st_size,
            "rows": len(q.questions),
            "units": len({x.group for x in q.questions}),
            "digest": q.digest(),
            "skipped": len(q.skipped),
            "without_picture": q.without_picture,
            "left_with_group": q.left_with_group,
            "set_seed": built_with(q.file.path),
        }


def built_with(path: Path) -> int | None:
    """The seed with which a set was built; None where no manifest beside it says."""
    try:
        manifest = json.loads((path.parent / "manifest.json").read_text(encoding="utf-8"))
        return int(manifest["seed"]) if path.name in manifest["files"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find_sets(sources: Sequence[Source], tasks: Sequence[Task], conditions: Sequence[str]) -> Found:
    """Looks the files of some tasks and conditions up; those of a repository are downloaded when they are read."""
    names = [t.file_name(c) for t in tasks for c in t.conditions(tuple(conditions))]
    return locate(sources, names)


def read_sets(
    found: Found,
    tasks: Sequence[Task],
    conditions: Sequence[str],
    *,
    needs_clean: bool = False,
    limit: int | None = None,
    skip_bad: bool = False,
) -> list[BenchSet]:
    """Reads the sets that were found, in the order of tasks and conditions, and decodes every picture once.

    What is found here would otherwise stop a run after hours.

    Args:
        found: as `find_sets` gives it.
        tasks: which.
        conditions: which; a task that is distorted already has its own.
        needs_clean: whether every row needs its clean picture as well.
        limit: first units of every set; None is all.
        skip_bad: leave bad rows out, and rows of which the clean counterpart is bad.

    Raises:
        TsvError: a file has a bad row, or a picture that cannot be decoded.
        ClearValueError: a row has no clean counterpart.
    """
    sets: list[BenchSet] = []
    for task in tasks:
        whole: QuestionSet | None = None
        tried: set[str] = set()  # indices of clean pictures that were decoded
        for condition in task.conditions(tuple(conditions)):
            path = found.files.get(task.file_name(condition))
            if path is None:
                continue
            questions = read_questions(path, task, skip_bad=skip_bad)
            asked = questions.first(limit)
            asked = asked.readable() if skip_bad else _decoded(asked)
            if needs_clean and condition not in (CLEAN, REAL) and whole is None:
                clean_path = found.files.get(task.file_name(CLEAN))
                if clean_path is None:
                    raise ClearValueError(
                        f"{task.file_name(CLEAN)} is missing, and a system that was asked for needs the clean pictures"
                    )
                whole = read_questions(clean_path, task, skip_bad=skip_bad)
                whole = whole.readable() if skip_bad else whole
            clean = {CLEAN: asked, REAL: None}.get(condition, whole)
            if clean is not None and clean is not asked:
                known = {q.index for q in clean.questions}
                if skip_bad:
                    asked = asked.among(known, f"has no good counterpart in {clean.file.path.name}")
                lacking = next((q for q in asked.questions if q.index not in known), None)
                if lacking is not None:
                    raise ClearValueError(
                        f"{path}, line {lacking.place[0]}: row {lacking.index!r} has no counterpart in "
                        f"{task.file_name(CLEAN)}; --skip-bad leaves such rows out"
                    )
                if not skip_bad:
                    wanted = {q.index for q in asked.questions} - tried
                    _decoded(replace(clean, questions=tuple(q for q in clean.questions if q.index in wanted)))
                    tried |= wanted
            sets.append(BenchSet(condition, asked, clean if needs_clean else None))
    return sets


def _decoded(questions: QuestionSet) -> QuestionSet:
    """The same set, of which every picture was decoded.

    Raises:
        TsvError: one cannot be.
    """
    broken = questions.undecodable()
    if broken:
        first = broken[0]
        more = f" ({len(broken)} pictures of this file cannot)" if len(broken) > 1 else ""
        raise TsvError(first.path, first.line, f"{first.reason}{more}; --skip-bad leaves such rows out")
    return questions
