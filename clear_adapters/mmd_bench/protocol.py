"""The two protocols, by name, and what every entry of their tables says.

`mixed` draws one corruption a picture and is comparable with the published tables. `macro16` is the mean over the
sixteen types, each applied to every picture, at high. An entry is never a bare number: score, N, 95 % bootstrap interval, seeds, restore rate, seconds a question, unreadable.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from clear_adapters.errors import ClearValueError
from clear_adapters.mmd_bench.score import Values, count, mean_over, summary
from clear_adapters.mmd_bench.tasks import CLEAN, CORRUPTIONS, REAL, Task

PROTOCOLS = ("mixed", "macro16")


@dataclass(frozen=True)
class Cell:
    """One system's answers to one set.

    Attributes:
        task: which benchmark.
        condition: which of its sets.
        system: which system.
        records: the lines of the answers file, every one with its `value`.
    """

    task: Task
    condition: str
    system: str
    records: Sequence[Mapping[str, Any]]

    @property
    def name(self) -> str:
        """Its key in a result file."""
        return f"{self.task.name}/{self.condition}/{self.system}"

    @property
    def values(self) -> dict[str, Values]:
        """What the benchmark counts, by metric; the main one first."""
        return count(self.task, self.records)

    def facts(self, seed: int) -> dict[str, Any]:
        """What a result file keeps of it."""
        values = self.values
        main = next(iter(values.values()))
        listed = [[r["index"], r["answer"]] for r in self.records]
        return {
            "task": self.task.name,
            "condition": self.condition,
            "system": self.system,
            "rows": len(self.records),
            "metrics": {name: summary(v, seed) for name, v in values.items()},
            "units": pack_ids([u for units in main.values() for u in units]),
            "values": _compact([v for units in main.values() for v in units.values()]),
            "unanswered": sum(r.get("answered") is False for r in self.records),
            "answers": hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16],
            **costs([self]),
        }


def _compact(values: Sequence[float]) -> str | list[float]:
    """Hits as a string of 0 and 1, marks as they are."""
    if all(v in (0, 1) for v in values):
        return "".join(str(int(v)) for v in values)
    return [round(v, 4) for v in values]


def pack_ids(ids: Sequence[str]) -> str | list[str]:
    """Ids in a short form: whole numbers as `0-199,205`, in their order; others as they are."""
    if not all(i.isascii() and i.isdigit() and i == str(int(i)) for i in ids):
        return list(ids)
    runs: list[list[int]] = []
    for number in map(int, ids):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def unpack_ids(packed: str | Sequence[str]) -> list[str]:
    """What `pack_ids` packed."""
    if not isinstance(packed, str):
        return list(packed)
    runs = [run.partition("-") for run in packed.split(",") if run]
    return [str(i) for first, _, last in runs for i in range(int(first), int(last or first) + 1)]


def costs(cells: Iterable[Cell]) -> dict[str, Any]:
    """Restore rate (None of systems that cannot restore), seconds a question and unreadable answers of some cells."""
    records = [r for c in cells for r in c.records]
    restored = [r["restored"] for r in records if r.get("restored") is not None]
    return {
        "restored": round(fmean(restored), 6) if restored else None,
        "seconds_per_question": round(fmean(r["seconds"] for r in records), 5),
        "unreadable": sum(r["read"] is None for r in records),
    }


def _mean_costs(tasks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The same of several tasks, each of which counts the same, as in their mean score; unreadable answers are a sum."""
    restored = [t["restored"] for t in tasks if t["restored"] is not None]
    return {
        "restored": round(fmean(restored), 6) if restored else None,
        "seconds_per_question": round(fmean(t["seconds_per_question"] for t in tasks), 5),
        "unreadable": sum(t["unreadable"] for t in tasks),
    }


def protocols(cells: Sequence[Cell], seeds: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
    """The entries of both protocols for which there are cells.

    Args:
        cells: what was measured.
        seeds: goes into every entry: of the sets and of sampling.
        seed: of the bootstrap.

    Returns:
        `mixed`: by system and condition, an entry a task and `mean`; `macro16`: by system, the same. A mean over
        several tasks counts each of them once, in its restore rate and seconds too; `tasks` in it says which. At high, `mean_with_real` counts the tasks
        that are distorted already as well, as the published mean does.
    """
    by_place = {(c.task.name, c.condition, c.system): c for c in cells}
    systems = list(dict.fromkeys(c.system for c in cells))
    conditions = [c for c in dict.fromkeys(c.condition for c in cells) if c not in CORRUPTIONS]
    mixed: dict[str, Any] = {}
    macro: dict[str, Any] = {}
    for system in systems:
        for condition in conditions:
            own = {c.task.name: [c] for c in cells if c.system == system and c.condition == condition}
            if own:
                mixed.setdefault(system, {})[condition] = _entries(own, seeds, seed)
            distorted = {c.task.name: [c] for c in cells if c.system == system and c.condition == REAL}
            if own and distorted and condition == "high":
                # The published mean at high counts R-Bench-Dis in.
                seven = _entries(own | distorted, seeds, seed)["mean"]
                mixed[system][condition]["mean_with_real"] = seven
        whole = {}
        for task in dict.fromkeys(c.task.name for c in cells):
            sets = [by_place.get((task, name, system)) for name in CORRUPTIONS]
            if all(s is not None for s in sets):
                whole[task] = [s for s in sets if s is not None]
        if whole:
            macro[system] = _entries(whole, seeds, seed)
    return {name: found for name, found in (("mixed", mixed), ("macro16", macro)) if found}


def _entries(by_task: Mapping[str, list[Cell]], seeds: Mapping[str, Any], seed: int) -> dict[str, Any]:
    main: dict[str, Values] = {}
    entries: dict[str, Any] = {}
    for name, sets in by_task.items():
        metrics = [s.values for s in sets]
        means = {m: mean_over([v[m] for v in metrics]) for m in metrics[0]}
        main[name] = next(iter(means.values()))
        first, *others = means
        entries[name] = summary(means[first], seed) | costs(sets) | dict(seeds)
        entries[name]["also"] = {m: summary(means[m], seed) for m in others}
    together = {name: v for name, units in main.items() for v in [_flat(units)]}
    entries["mean"] = (
        summary(together, seed)
        | _mean_costs([costs(sets) for sets in by_task.values()])
        | dict(seeds)
        | {"tasks": list(main)}
    )
    return entries


def _flat(values: Values) -> dict[str, float]:
    return {f"{stratum}/{unit}": v for stratum, units in values.items() for unit, v in units.items()}


def wanted(protocol_names: Iterable[str], severities: Sequence[str]) -> tuple[str, ...]:
    """The conditions that some protocols need, for tasks that are not distorted already.

    Raises:
        ClearValueError: an unknown protocol.
    """
    found: list[str] = []
    for name in protocol_names:
        if name not in PROTOCOLS:
            raise ClearValueError(f"protocol {name!r}: one of {', '.join(PROTOCOLS)}")
        found += [*severities] if name == "mixed" else [s for s in severities if s == CLEAN] + [*CORRUPTIONS]
    return tuple(dict.fromkeys(found))
