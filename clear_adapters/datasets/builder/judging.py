"""A judge of answers whose words do not match the truth, every mark on disk when it comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from clear_adapters.datasets.example import Example
from clear_adapters.journal import Writer

RIGHT_ABOVE = 0.5
"""A judged answer is right above this mark (the paper's rule for its accuracy reward)."""

PORTION = 64
"""Answers that are marked at a time: what a killed run has paid for at most without having it."""

Said = dict[tuple[str, str, int], Mapping[str, Any]]
"""Entries of the journal by step, row and try."""


class Judge(Protocol):
    """Somebody who marks answers, such as `rewards.judge.Judge`.

    Attributes:
        name: for records.
    """

    name: str

    def mark(
        self, questions: Sequence[str], truths: Sequence[str], answers: Sequence[str]
    ) -> Sequence[float | None]:
        """Marks from 0 to 1; None where no judgement could be had."""


def judged(
    judge: Judge, step: str, number: int, answers: Sequence[tuple[Example, str]], said: Said, log: Writer
) -> dict[str, float | None]:
    """Marks of answers by their rows; asked for are those that are not on disk yet.

    Args:
        judge: who is asked.
        step: under which a mark stands in the journal.
        number: of the try.
        answers: rows and what was answered.
        said: what is on disk; grows by what is written to the journal.
        log: the journal.
    """
    left = [(row, answer) for row, answer in answers if (step, row.id, number) not in said]
    for start in range(0, len(left), PORTION):
        some = left[start : start + PORTION]
        marks = judge.mark([r.question for r, _ in some], [r.answer for r, _ in some], [a for _, a in some])
        for (row, _), mark in zip(some, marks, strict=True):
            if mark is not None:
                log.write({"step": step, "row": row.id, "try": number, "mark": mark})
    return {row.id: said.get((step, row.id, number), {}).get("mark") for row, _ in answers}
