"""Accuracy without a network: the answer between its tags against the truth.

The paper has a judge in this place (`judge.py`); this one is for answers that can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clear_adapters.errors import unknown_name
from clear_adapters.scoring import KINDS, Kind, matches
from clear_adapters.transcript import parse


def accuracy(
    prompts: Sequence[Any],
    completions: Sequence[str],
    answer: Sequence[str | float | Sequence[str]],
    options: Sequence[Sequence[str] | None] | None = None,
    *,
    match: Kind = "auto",
    tolerance: float = 0.0,
    threshold: float = 0.8,
    **columns: Any,
) -> list[float | None]:
    """1 for a right answer, else 0.

    An answer that is missing, or in which no option or number can be read, is the model's own doing and earns 0.

        >>> accuracy(["Which?"], ["<answer>B</answer>"], ["B"], [["red", "blue"]])
        [1.0]

    Args:
        prompts: what was asked; not read.
        completions: what the model wrote, with its tags.
        answer: the truth: the letter or text of an option, a number, a text, or several forms of a text.
        options: the possible answers' texts in the order of their letters; empty or None where the question is open.
        match: one of `scoring.KINDS`. Where the truth is the letter of an option the answer must choose that one. Else
            `auto` compares numbers where the truth is a number, else exactly.
        tolerance: of numbers.
        threshold: of fuzzy matches.
        **columns: not read.

    Returns:
        A number for each rollout.

    Raises:
        UnknownNameError: an unknown `match`.
        ClearValueError: a truth that does not fit it.
    """
    if match not in KINDS:
        raise unknown_name("kind of comparison", match, KINDS)
    choices = options if options is not None else [None] * len(completions)
    rewards: list[float | None] = []
    for text, truth, texts in zip(completions, answer, choices, strict=True):
        given = parse(text).answer
        right = False
        if given:
            right = matches(given, truth, texts or (), match, tolerance=tolerance, threshold=threshold)
        rewards.append(float(right))
    return rewards
