"""Numbers that need two cells of a result file: drops, gains, and means over benchmarks, question by question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clear_adapters.errors import ClearValueError
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
    """

    label: str
    system: str
    result: ResultFile

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
            found.append(Line(label, system, result))
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


def difference(
    pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], seed: int = 0
) -> Difference | None:
    """The mean over benchmarks of first minus second, question by question.

    Args:
        pairs: two cells a benchmark.
        seed: of the bootstrap.

    Returns:
        None where there is no pair, or two cells count different questions.
    """
    strata = []
    for first, second in pairs:
        a, b = values(first), values(second)
        if len(a) != len(b):
            return None
        strata.append([x - y for x, y in zip(a, b, strict=True)])
    if not strata:
        return None
    low, high = strata_interval(strata, seed=seed)
    mean = sum(sum(s) / len(s) for s in strata) / len(strata)
    return Difference(100 * mean, 100 * low, 100 * high, sum(map(len, strata)))


def drop(line: Line, tasks: Sequence[str], condition: str) -> Difference | None:
    """What is lost from clean to a condition, over the tasks that have both."""
    pairs = [(line.cell(t, "clean"), line.cell(t, condition)) for t in tasks]
    return difference([(a, b) for a, b in pairs if a is not None and b is not None])


def gain(line: Line, over: Line, tasks: Sequence[str], condition: str) -> Difference | None:
    """What one system has above another under a condition, over the tasks that both were measured on."""
    pairs = [(line.cell(t, condition), over.cell(t, condition)) for t in tasks]
    return difference([(a, b) for a, b in pairs if a is not None and b is not None])


def mean_score(line: Line, tasks: Sequence[str], condition: str) -> Difference | None:
    """The mean over the tasks that were measured under a condition."""
    cells = [line.cell(t, condition) for t in tasks]
    strata = [values(c) for c in cells if c is not None]
    if not strata:
        return None
    low, high = strata_interval(strata)
    mean = sum(sum(s) / len(s) for s in strata) / len(strata)
    return Difference(100 * mean, 100 * low, 100 * high, sum(map(len, strata)))
