"""What a build came to: counts whose parts add up to what was read, and the same as tables for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table

from clear_adapters.datasets.builder.rows import Found, Rejected
from clear_adapters.datasets.example import Example
from clear_adapters.datasets.parts import read_parts
from clear_adapters.errors import ClearError


def summarise(
    found: Found,
    splits: Mapping[str, Sequence[Example]],
    rejected: Sequence[Rejected],
    pictures: Iterable[Mapping[str, Any]],
    faults: Mapping[str, int],
    accepted: Mapping[int, int],
) -> dict[str, Any]:
    """Counts of a finished build, as plain data.

    Args:
        found: what the source gave.
        splits: the rows of each; those for training have their traces.
        rejected: rows that are in none.
        pictures: all records of the manifest.
        faults: what was wrong with replies of the teacher, by reason.
        accepted: traces by the try that gave them, from 1 on.

    Raises:
        ClearError: the counts do not add up (a fault of this library).
    """
    rows = sum(map(len, splits.values()))
    if found.read != found.not_sampled + len(rejected) + rows:
        raise ClearError(
            f"{found.read} rows were read, and {found.not_sampled} not sampled, {len(rejected)} rejected and {rows} in the "
            "data are not as many: please report this"
        )
    reasons: dict[str, Counter[str]] = {}
    for entry in rejected:
        reasons.setdefault(entry.stage, Counter())[entry.reason] += 1
    records = list(pictures)
    ways = [read_parts(e.reply or "").way for e in splits["train"]]
    table = Counter((e.severity or "clean", way) for e, way in zip(splits["train"], ways, strict=True))
    return {
        "read": found.read,
        "not_sampled": found.not_sampled,
        "rejected": {stage: dict(sorted(c.items())) for stage, c in sorted(reasons.items())},
        "rows": {name: len(part) for name, part in splits.items()},
        "pictures": {
            "used": sum("rejected" not in r for r in records),
            "rejected": sum("rejected" in r for r in records),
            "groups": len({r["group"] for r in records if "group" in r}),
        },
        "pathways": dict(sorted(Counter(ways).items())),
        "pathways_by_severity": {
            level: {w: table[level, w] for w in ("direct", "restore")}
            for level in sorted({a for a, _ in table})
        },
        "severities": _counts(splits, lambda e: e.severity or "clean"),
        "corruptions": _counts(splits, lambda e: e.degradation or "none"),
        "teacher": {
            "faults": dict(sorted(faults.items())),
            "accepted_at_try": {str(n): c for n, c in sorted(accepted.items())},
        },
    }


def _counts(splits: Mapping[str, Sequence[Example]], key: Any) -> dict[str, dict[str, int]]:
    return {name: dict(sorted(Counter(map(key, part)).items())) for name, part in splits.items()}


def tables(summary: Mapping[str, Any]) -> Group:
    """A summary for a terminal."""
    splits = list(summary["rows"])
    rows = Table("", *splits, title="Rows")
    rows.add_row("in all", *(str(summary["rows"][s]) for s in splits))
    for title, key in (("severity", "severities"), ("corruption", "corruptions")):
        rows.add_section()
        for name in sorted({n for s in splits for n in summary[key][s]}):
            rows.add_row(f"{title} {name}", *(str(summary[key][s].get(name, 0)) for s in splits))
    ways = Table("severity", "direct", "restore", title="Paths of the training rows")
    for level, counts in summary["pathways_by_severity"].items():
        ways.add_row(level, str(counts["direct"]), str(counts["restore"]))
    ways.add_section()
    ways.add_row("in all", *(str(summary["pathways"].get(w, 0)) for w in ("direct", "restore")))
    lost = Table("stage", "reason", "rows", title="Not in the data")
    lost.add_row("", "not sampled", str(summary["not_sampled"]))
    for stage, reasons in summary["rejected"].items():
        for reason, count in reasons.items():
            lost.add_row(stage, reason, str(count))
    shown = [rows, ways, lost]
    teacher = summary["teacher"]
    if teacher["faults"] or teacher["accepted_at_try"]:
        told = Table("", "replies", title="Teacher")
        for number, count in teacher["accepted_at_try"].items():
            told.add_row(f"taken at try {number}", str(count))
        for reason, count in teacher["faults"].items():
            told.add_row(f"not taken: {reason}", str(count))
        shown.append(told)
    return Group(*shown)
