"""Numbers that need two cells of a result file: drops, gains, and means over benchmarks, question by question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clear_adapters.errors import ClearValueError
from clear_adapters.mmd_bench.protocol import unpack_ids
from clear_adapters.mmd_bench.run import KIND, RESULT
from clear_adapters.mmd_bench.systems import get_system
from clear_adapters.mmd_bench.tasks import CLEAN, LEVELS, TASKS
from clear_adapters.results import ResultFile, read_result, strata_interval


@dataclass(frozen=True)
class Line:
    """One system of one result file: a line of a figure, a row of a table.

    Attributes:
        label: in words; names the adapter or model where several results are shown.
        system: its name.
        result: the file.
        number: of the file among those that are shown, from 1.
    """

    label: str
    system: str
    result: ResultFile
    number: int = 1

    def cell(self, task: str, condition: str) -> dict[str, Any] | None:
        """What was measured on one set; the ceiling's is that of the clean pictures, whatever the condition."""
        place = CLEAN if get_system(self.system).sees == "clean" else condition
        found: dict[str, Any] | None = self.result.payload["cells"].get(f"{task}/{place}/{self.system}")
        return found

    def tasks(self) -> list[str]:
        """What it was measured on, in the order of tables."""
        measured = {c["task"] for c in self.result.payload["cells"].values() if c["system"] == self.system}
        return [t.name for t in TASKS if t.name in measured]

    def entry(self, protocol: str, condition: str) -> dict[str, Any] | None:
        """The entries of a protocol, by task and `mean`; of `macro16` the condition is not asked for."""
        own = self.result.payload["protocols"].get(protocol, {}).get(self.system)
        if own is None or protocol == "macro16":
            return own
        if get_system(self.system).sees == "clean" and condition in LEVELS:
            condition = CLEAN
        found: dict[str, Any] | None = own.get(condition)
        return found


def read_results(paths: Sequence[str | Path]) -> list[ResultFile]:
    """Result files of `bench run`, by file or by the folder of the run.

    Raises:
        ClearValueError: a file cannot be read, or is of another kind.
    """
    found = []
    for path in map(Path, paths):
        result = read_result(path / RESULT if path.is_dir() else path)
        if result.kind != KIND:
            raise ClearValueError(f"{path} is a result of {result.kind!r}, not of {KIND!r}")
        found.append(result)
    return found


def lines(results: Sequence[ResultFile]) -> list[Line]:
    """Every system of every result, in the order of the files."""
    found = []
    for number, result in enumerate(results, 1):
        for system in dict.fromkeys(c["system"] for c in result.payload["cells"].values()):
            known = get_system(system)
            label = known.title
            if len(results) > 1:
                facts = result.payload[
                    "model" if known.plain or result.payload["adapter"] is None else "adapter"
                ]
                label = f"{label} ({number}: {facts['name']})"
            found.append(Line(label, system, result, number))
    return found


def values(cell: Mapping[str, Any]) -> list[float]:
    """The values of a cell's units: hits or marks."""
    return [float(v) for v in cell["values"]]


@dataclass(frozen=True)
class Difference:
    """A difference in percentage points, with its 95 % interval from a bootstrap of paired differences.

    Attributes:
        value: the difference.
        low: lower bound.
        high: upper bound.
        n: units in it.
    """

    value: float
    low: float
    high: float
    n: int


Pairs = Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]]
"""Two cells a benchmark."""


def paired(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[float]:
    """First minus second for every question that both cells count, told by its id; empty where there is none."""
    if "units" not in first or "units" not in second:  # a result of an early version, which kept no ids
        return []
    other = dict(zip(unpack_ids(second["units"]), values(second), strict=True))
    ids = zip(unpack_ids(first["units"]), values(first), strict=True)
    return [value - other[i] for i, value in ids if i in other]


def difference(pairs: Pairs, seed: int = 0) -> Difference | None:
    """The mean over benchmarks of first minus second, question by question.

    Args:
        pairs: two cells a benchmark.
        seed: of the bootstrap.

    Returns:
        None where there is no pair, or where two cells have no question in common (`apart` says which).
    """
    strata = [paired(first, second) for first, second in pairs.values()]
    if not strata or not all(strata):
        return None
    low, high = strata_interval(strata, seed=seed)
    mean = sum(sum(s) / len(s) for s in strata) / len(strata)
    return Difference(100 * mean, 100 * low, 100 * high, sum(map(len, strata)))


def apart(pairs: Pairs) -> list[str]:
    """The benchmarks of which two cells have no question in common, so that they cannot be compared."""
    return [task for task, (first, second) in pairs.items() if not paired(first, second)]


def _both(
    first: Line, at: str, second: Line, condition: str, tasks: Sequence[str]
) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    pairs = {t: (first.cell(t, at), second.cell(t, condition)) for t in tasks}
    return {t: (a, b) for t, (a, b) in pairs.items() if a is not None and b is not None}


def drop_pairs(line: Line, tasks: Sequence[str], condition: str) -> Pairs:
    """The cells at clean and under a condition, of the tasks that have both."""
    return _both(line, CLEAN, line, condition, tasks)


def gain_pairs(line: Line, over: Line, tasks: Sequence[str], condition: str) -> Pairs:
    """The cells of two systems under a condition, of the tasks that both were measured on."""
    return _both(line, condition, over, condition, tasks)


def drop(line: Line, tasks: Sequence[str], condition: str) -> Difference | None:
    """What is lost from clean to a condition, over the tasks that have both."""
    return difference(drop_pairs(line, tasks, condition))


def gain(line: Line, over: Line, tasks: Sequence[str], condition: str) -> Difference | None:
    """What one system has above another under a condition, over the tasks that both were measured on."""
    return difference(gain_pairs(line, over, tasks, condition))


def common_tasks(lines: Sequence[Line], conditions: Sequence[str]) -> list[str]:
    """The tasks that every line has under each of the conditions that it has at all: means over them can be compared."""
    found = [t.name for t in TASKS]
    for line in lines:
        has = [c for c in conditions if any(line.cell(t, c) for t in line.tasks())]
        found = [t for t in found if has and all(line.cell(t, c) for c in has)]
    return found if lines else []


def mean_score(line: Line, tasks: Sequence[str], condition: str) -> Difference | None:
    """The mean over the tasks that were measured under a condition."""
    cells = [line.cell(t, condition) for t in tasks]
    strata = [values(c) for c in cells if c is not None]
    if not strata:
        return None
    low, high = strata_interval(strata)
    mean = sum(sum(s) / len(s) for s in strata) / len(strata)
    return Difference(100 * mean, 100 * low, 100 * high, sum(map(len, strata)))
