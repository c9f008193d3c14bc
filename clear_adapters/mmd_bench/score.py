"""From answers to scores: one answer, then what a benchmark counts. Pure functions; nothing is ever guessed.

An answer from which no option or number can be read is wrong and is counted as unreadable, as is one that is empty.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clear_adapters.errors import ClearValueError
from clear_adapters.mmd_bench.miniature import comparison
from clear_adapters.mmd_bench.questions import Question
from clear_adapters.mmd_bench.tasks import Task
from clear_adapters.results import strata_interval
from clear_adapters.scoring import read_option, score
from clear_adapters.transcript import strip_tags


@dataclass(frozen=True)
class Mark:
    """What one answer is worth.

    Attributes:
        read: the option's letter, or the answer as it was compared; None where nothing can be read.
        value: 0 or 1; None where a judge has still to say.
    """

    read: str | None
    value: float | None

    @property
    def unreadable(self) -> bool:
        """Whether nothing could be read."""
        return self.read is None


def mark(task: Task, question: Question, reply: str) -> Mark:
    """Compares a reply with the truth.

    Args:
        task: whose rule holds.
        question: what was asked.
        reply: what was answered; tags and thoughts are stripped first.

    Returns:
        The mark; of a task with a judge, one without a value unless the answer is empty.
    """
    answer = strip_tags(reply)
    if task.rule == "judge":
        return Mark(answer, None) if answer else Mark(None, 0.0)
    if question.options:
        letter = read_option(answer, question.options)
        return Mark(letter, float(letter == question.truth))
    kind = comparison(question.category, question.truth) if task.rule == "kind" else "auto"
    right = score(answer, question.truth, kind)
    return Mark(None if right is None or not answer else answer, float(right is True))


Values = dict[str, dict[str, float]]
"""Stratum to unit to value. A score is the mean over strata of the means over their units."""


def count(task: Task, records: Sequence[Mapping[str, Any]]) -> dict[str, Values]:
    """What a benchmark counts.

    Args:
        task: whose rule holds.
        records: lines of an answers file, each with `index`, `group`, `source` and `value`.

    Returns:
        Values by metric. The first is the one that published tables show: `accuracy` (of circular groups for MMBench, of
        questions elsewhere), or `score` of a judge; besides, `pairs` of MMVP and `source_mean` of CV-Bench.
    """
    single = {r["index"]: float(r["value"]) for r in records}
    if task.unit == "circle":
        return {"accuracy": {"": _all_of(records)}, "rotations": {"": single}}
    found: dict[str, Values] = {"score" if task.rule == "judge" else "accuracy": {"": single}}
    if task.unit == "pair":
        found["pairs"] = {"": _all_of(records)}
    if task.unit == "source":
        by_source: Values = defaultdict(dict)
        for record in records:
            by_source[record["source"]][record["index"]] = float(record["value"])
        found["source_mean"] = dict(sorted(by_source.items()))
    return found


def _all_of(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    groups: dict[str, float] = {}
    for record in records:
        groups[record["group"]] = min(groups.get(record["group"], 1.0), float(record["value"]))
    return groups


def mean_over(sets: Sequence[Values]) -> Values:
    """The mean of several sets of the same questions, unit by unit; the sets themselves are not a sample.

    A unit that one of them lacks (a bad row was left out of it) counts in none.

    Raises:
        ClearValueError: the sets have no unit in common.
    """
    means: Values = {}
    for stratum, units in sets[0].items():
        shared = [u for u in units if all(u in s.get(stratum, ()) for s in sets)]
        if shared:
            means[stratum] = {u: sum(s[stratum][u] for s in sets) / len(sets) for u in shared}
    if not means:
        raise ClearValueError(f"{len(sets)} sets have no question in common, so they have no mean")
    return means


def summary(values: Values, seed: int = 0) -> dict[str, float | int]:
    """The score in percent with its 95 % bootstrap interval: `value`, `low`, `high`, `n`."""
    strata = [list(units.values()) for units in values.values()]
    low, high = strata_interval(strata, seed=seed)
    mean = sum(sum(s) / len(s) for s in strata) / len(strata)
    return {
        "value": round(100 * mean, 4),
        "low": round(100 * low, 4),
        "high": round(100 * high, 4),
        "n": sum(map(len, strata)),
    }
