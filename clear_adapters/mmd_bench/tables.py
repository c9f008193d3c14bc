"""Tables of result files, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clear_adapters.mmd_bench.systems import get_system
from clear_adapters.mmd_bench.tasks import get_task
from clear_adapters.results import ResultFile


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column is text, the others are numbers."""
    lines = [list(head), ["---", *["---:"] * (len(head) - 1)], *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(entry: dict[str, Any] | None) -> str:
    """`71.2 [69.0, 73.3]`."""
    return "–" if entry is None else f"{entry['value']:.1f} [{entry['low']:.1f}, {entry['high']:.1f}]"


def rate(share: float | None) -> str:
    """A share in percent; a dash for what cannot restore."""
    return "–" if share is None else f"{100 * share:.1f}"


def overview(result: ResultFile) -> str:
    """One line an entry of both protocols."""
    rows = []
    for protocol, found in result.payload["protocols"].items():
        for system, own in found.items():
            conditions = own.items() if protocol == "mixed" else [("high, 16 types", own)]
            for condition, entries in conditions:
                for task, e in entries.items():
                    if task == "mean" and len(entries) == 2:
                        continue
                    title = "mean" if task == "mean" else get_task(task).title
                    rows.append(
                        [
                            f"{title}, {protocol}, {condition}",
                            get_system(system).title,
                            str(e["n"]),
                            percent(e),
                            rate(e["restored"]),
                            f"{e['seconds_per_question']:.3f}",
                            str(e["unreadable"]),
                        ]
                    )
    head = ["set", "system", "N", "right, % [95 %]", "restored, %", "s/question", "unreadable"]
    return table(head, rows)
