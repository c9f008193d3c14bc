"""The weighted sum of rewards, `R = Σ w_k r_k`, over groups of rollouts of one question.

The paper (interleaved GRPO; Table 13) has 0.75 accuracy + 0.10 format + 0.15 decision.

What is None stays visible: a rollout that a reward does not score makes its whole group unscored, because an advantage
is taken against the group's mean, and a made-up number for one member would move all the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal, get_args

from clear_adapters.errors import ClearError, ClearTypeError, ClearValueError, unknown_name
from clear_adapters.rewards.registry import REWARDS, RewardFunction, columns_named, make_reward
from clear_adapters.transcript import Transcript

ACCURACY = "accuracy"
"""The term that is computed first; its values are the column `accuracy` of all the others."""

Absent = Literal["group", "neutral"]


@dataclass(frozen=True)
class Term:
    """One reward in the sum.

    Attributes:
        weight: its weight; 0 computes and logs it only.
        function: a registered name, or a function.
        settings: of a registered one.
        absent: what a None does. `group` makes the rollout's group unscored. `neutral` counts as the mean of the
            group's scored values, so it neither helps nor harms: for rewards that do not apply to every rollout.

    Raises:
        ClearValueError: a weight that is no finite number, or settings of what is not a name.
        UnknownNameError: no such reward, or another `absent`.
    """

    weight: float
    function: str | RewardFunction
    settings: Mapping[str, Any] = field(default_factory=dict)
    absent: Absent = "group"

    def __post_init__(self) -> None:
        if isinstance(self.weight, bool) or not isinstance(self.weight, int | float):
            raise ClearValueError(f"weight={self.weight!r}: must be a number")
        if not math.isfinite(self.weight):
            raise ClearValueError(f"weight={self.weight}: must be finite")
        if self.absent not in get_args(Absent):
            raise unknown_name("way with an absent reward", str(self.absent), get_args(Absent))
        if isinstance(self.function, str):
            if self.function not in REWARDS:
                raise unknown_name("reward", self.function, REWARDS.names())
        elif self.settings:
            raise ClearValueError("settings belong to a registered reward; bind those of a function yourself")


def read_terms(data: Mapping[str, Any]) -> dict[str, Term]:
    """Reads the terms of a sum from plain data, such as a recipe; nothing is imported or connected.

    Args:
        data: by name a weight (the reward of that name), or a mapping of `Term`'s fields, of which `function` is the
            name itself where it is left out.

    Raises:
        ClearValueError: no term at all, or one that cannot work.
        UnknownNameError: no such reward, or an unknown field.
    """
    if not isinstance(data, Mapping) or not data:
        raise ClearValueError(f"rewards={data!r}: a mapping of names to weights, with one at least")
    return {str(name): _read_term(str(name), value) for name, value in data.items()}


def _read_term(name: str, value: Any) -> Term:
    if isinstance(value, Term):
        return value
    given = dict(value) if isinstance(value, Mapping) else {"weight": value}
    for key in given:
        if key not in Term.__dataclass_fields__:
            raise unknown_name(f"field of reward {name!r}", str(key), Term.__dataclass_fields__)
    if "weight" not in given:
        raise ClearValueError(f"reward {name!r} has no weight")
    try:
        return Term(**{"function": name, **given})
    except ClearError as error:
        if isinstance(error, KeyError):
            raise
        raise ClearValueError(f"reward {name!r}: {error}") from error


@dataclass(frozen=True)
class Scores:
    """What a batch of rollouts earned.

    Attributes:
        totals: R of each rollout; None throughout a group that is not scored.
        parts: of each term its unweighted values.
        group: rollouts a group.
    """

    totals: list[float | None]
    parts: dict[str, list[float | None]]
    group: int

    @property
    def unscored(self) -> int:
        """Number of groups that are not scored."""
        return sum(total is None for total in self.totals[:: self.group])

    def means(self) -> dict[str, float]:
        """Means for logs.

        Returns:
            Of each term, and of `total`, over what is scored (left out where nothing is); and `unscored`, the share of
            groups that are not.
        """
        columns = {**self.parts, "total": self.totals}
        scored = {name: [v for v in values if v is not None] for name, values in columns.items()}
        means = {name: fmean(values) for name, values in scored.items() if values}
        groups = len(self.totals) // self.group
        return means | {"unscored": self.unscored / groups if groups else 0.0}


class Rewards:
    """A weighted sum of rewards.

        rewards = Rewards({"accuracy": 0.75, "format": 0.10, "decision": 0.15})
        scores = rewards(prompts, completions, group=4, answer=answers, restored=restored)

    Attributes:
        terms: the terms by name.
    """

    def __init__(self, terms: Mapping[str, Any]) -> None:
        """Makes the functions.

        Args:
            terms: as `read_terms` takes them.

        Raises:
            ClearValueError, UnknownNameError: a term that cannot work.
            BrokenEntryError: a reward that cannot be imported.
        """
        self.terms = read_terms(terms)
        self._functions = {
            name: make_reward(t.function, t.settings) if isinstance(t.function, str) else t.function
            for name, t in self.terms.items()
        }

    @property
    def columns(self) -> frozenset[str]:
        """Every column that a function names, required or not.

        What none of them names, such as a decoded picture, a trainer need not make.
        """
        named = {c for f in self._functions.values() for columns in columns_named(f) for c in columns}
        return frozenset(named - ({ACCURACY} & set(self.terms)))

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], *, group: int, **columns: Sequence[Any]
    ) -> Scores:
        """Scores rollouts.

        Args:
            prompts: what was asked, one for each rollout.
            completions: what the model wrote.
            group: rollouts of one question, which stand next to each other.
            **columns: further facts, one for each rollout.

        Returns:
            The sum and its parts.

        Raises:
            ClearValueError: lengths that do not fit, a column that a reward needs and nobody gave, or a reward that is
                no finite number.
            JudgeError: a judge failed too often.
        """
        given = {"prompts": prompts, "completions": completions, **columns}
        rows = len(completions)
        if group < 1 or rows % group:
            raise ClearValueError(f"{rows} rollouts are no whole number of groups of {group}")
        for name, column in given.items():
            if len(column) != rows:
                raise ClearValueError(f"column {name!r} has {len(column)} values for {rows} rollouts")
        if ACCURACY in columns and ACCURACY in self.terms:
            raise ClearValueError("the column 'accuracy' is made by the term of that name: do not pass it")
        parts: dict[str, list[float | None]] = {}
        if ACCURACY in self.terms:
            given[ACCURACY] = parts[ACCURACY] = self._values(ACCURACY, given, rows)
        for name in self.terms:
            if name != ACCURACY:
                parts[name] = self._values(name, given, rows)
        return self.summed({name: parts[name] for name in self.terms}, group)

    def summed(self, parts: Mapping[str, list[float | None]], group: int) -> Scores:
        """Scores of rollouts whose terms are there already.

        Args:
            parts: of each term its unweighted values, one for each rollout.
            group: rollouts of one question, which stand next to each other; their number is a multiple of it.
        """
        totals: list[float | None] = []
        for start in range(0, len(next(iter(parts.values()))), group):
            totals += self._sum({n: values[start : start + group] for n, values in parts.items()}, group)
        return Scores(totals, dict(parts), group)

    def _values(self, name: str, given: Mapping[str, Sequence[Any]], rows: int) -> list[float | None]:
        function = self._functions[name]
        missing = [column for column in columns_named(function)[0] if column not in given]
        if missing:
            hint = (
                f"; a term named {ACCURACY!r} makes it (its weight may be 0)" if ACCURACY in missing else ""
            )
            raise ClearValueError(f"reward {name!r} needs the column {', '.join(map(repr, missing))}{hint}")
        values = function(**given)
        if len(values) != rows:
            raise ClearValueError(f"reward {name!r} gave {len(values)} values for {rows} rollouts")
        return [None if value is None else _finite(name, value) for value in values]

    def _sum(self, parts: Mapping[str, list[float | None]], group: int) -> list[float | None]:
        totals = [0.0] * group
        for name, values in parts.items():
            term = self.terms[name]
            if not term.weight:
                continue
            scored = [value for value in values if value is not None]
            if len(scored) < group and term.absent == "group":
                return [None] * group
            neutral = fmean(scored) if scored else 0.0
            for row, value in enumerate(values):
                totals[row] += term.weight * (neutral if value is None else value)
        return [*totals]


def _finite(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ClearTypeError(f"reward {name!r} gave {value!r}, which is no number") from error
    if not math.isfinite(number):
        raise ClearValueError(f"reward {name!r} gave {number}; what it does not score is None")
    return number


def columns_of(transcripts: Sequence[Transcript]) -> dict[str, list[Any]]:
    """The columns that follow from what was sampled.

    Args:
        transcripts: rollouts, complete.

    Returns:
        `completions`, all that was written after the prompt; `restored`, whether a restoration was read; `transcripts`.
    """
    return {
        "completions": [t.reply for t in transcripts],
        "restored": [bool(t.restorations) for t in transcripts],
        "transcripts": list(transcripts),
    }
