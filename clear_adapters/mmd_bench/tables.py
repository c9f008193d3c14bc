"""Tables of result files, as Markdown and as rows of plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from clear_adapters.degradations import CATEGORIES, list_degradations
from clear_adapters.mmd_bench import published as paper
from clear_adapters.mmd_bench.compare import (
    Difference,
    Line,
    apart,
    common_tasks,
    drop,
    drop_pairs,
    gain,
    gain_pairs,
    mean_score,
)
from clear_adapters.mmd_bench.systems import get_system
from clear_adapters.mmd_bench.tasks import CLEAN, CORRUPTIONS, LEVELS, REAL, TASKS, get_task
from clear_adapters.results import ResultFile

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        name: in the JSON file.
        title: above it.
        head: names of the columns.
        rows: text by column; the first is a name, the others are numbers.
        data: the same as plain data, one object a row.
        note: below it.
    """

    name: str
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    data: tuple[dict[str, Any], ...]
    note: str = ""

    def markdown(self) -> str:
        """Title, table and note."""
        parts = [f"## {self.title}", table(self.head, self.rows), self.note]
        return "\n\n".join(p for p in parts if p)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column is text, the others are numbers."""
    lines = [list(head), ["---", *["---:"] * (len(head) - 1)], *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(entry: Entry | Difference | None) -> str:
    """`71.2 [69.0, 73.3]`."""
    if entry is None:
        return "–"
    e = asdict(entry) if isinstance(entry, Difference) else entry
    return f"{e['value']:.1f} [{e['low']:.1f}, {e['high']:.1f}]"


def points(entry: Difference | None) -> str:
    """`+4.0 [+1.9, +6.2]`."""
    return "–" if entry is None else f"{entry.value:+.1f} [{entry.low:+.1f}, {entry.high:+.1f}]"


def rate(share: float | None) -> str:
    """A share in percent; a dash for what cannot restore."""
    return "–" if share is None else f"{100 * share:.1f}"


def overview(result: ResultFile) -> str:
    """One line an entry of both protocols."""
    rows = []
    for protocol, found in result.payload["protocols"].items():
        for system, own in found.items():
            conditions = own.items() if protocol == "mixed" else [("16 types at high", own)]
            for condition, entries in conditions:
                for task, e in entries.items():
                    if task == "mean_with_real" or (task == "mean" and len(e["tasks"]) == 1):
                        continue
                    title = f"mean of {len(e['tasks'])}" if task == "mean" else get_task(task).title
                    place = f"{title}, {protocol}, {condition}"
                    rows.append([place, get_system(system).title, str(e["n"]), percent(e), *_costs(e)])
    head = ["set", "system", "N", "right, % [95 %]", *COSTS]
    return table(head, rows)


_ORDER = [t.name for t in TASKS]
COSTS = ("restored, %", "s/question", "unreadable")


def _costs(e: Entry) -> list[str]:
    return [rate(e["restored"]), f"{e['seconds_per_question']:.3f}", str(e["unreadable"])]


def tables(lines: Sequence[Line], published: bool) -> list[Table]:
    """All tables that the results give.

    Args:
        lines: systems of the results.
        published: lay the paper's numbers beside.
    """
    found = [protocol_table(lines, "mixed", c, published) for c in (*LEVELS, REAL)]
    found += [
        protocol_table(lines, "macro16", "high", False),
        also_table(lines),
        drop_table(lines, published),
        *corruption_tables(lines, published),
    ]
    return [t for t in found if t is not None and t.rows]


def protocol_table(lines: Sequence[Line], protocol: str, condition: str, published: bool) -> Table | None:
    """Systems by benchmark under one condition of one protocol."""
    entries = [(line, e) for line in lines if (e := line.entry(protocol, condition)) is not None]
    if all(get_system(line.system).sees == "clean" for line, _ in entries):
        return None  # nothing, or the ceiling alone, which stands beside what it is the ceiling of
    tasks = [t for t in _tasks(lines) if any(t in e for _, e in entries)]
    seven = any("mean_with_real" in e for _, e in entries)
    means = [("mean", "mean")] * (len(tasks) > 1) + [("mean_with_real", "mean with R-Bench-Dis")] * seven
    n = {t: next(e[t]["n"] for _, e in entries if t in e) for t in tasks}
    rows, data, whole = [], [], False
    for line, e in entries:
        cells = [_score(e.get(t), n[t]) for t in tasks]
        # A mean over fewer benchmarks than the table has is no lower or higher than the one beside it.
        all_there = set(e["mean"]["tasks"]) == set(tasks)
        whole = whole or all_there
        cells += [percent(e.get(key) if all_there else None) for key, _ in means]
        rows.append((line.label, *cells, *(_costs(e["mean"]) if all_there else ["–"] * len(COSTS))))
        data.append({"label": line.label, "system": line.system, "published": False, **e})
    if published:
        six = set(paper.MAIN) == set(tasks) and whole
        for row in paper.rows(condition):
            if set(row.scores) & set(tasks):
                scores = [_printed(row.scores.get(t)) for t in tasks]
                scores += [_printed(row.scores.get(key) if six else None) for key, _ in means]
                rows.append((f"*{row.model}, published*", *scores, "–", "–", "–"))
                data.append({"label": row.model, "published": True, **row.scores})
    head = (
        "system",
        *(f"{get_task(t).title} (N {n[t]})" for t in tasks),
        *(title for _, title in means),
        *COSTS,
    )
    where = "sixteen types, all pictures with each, at high" if protocol == "macro16" else condition
    note = (
        "Right answers in percent, with the 95 % interval of a bootstrap over questions (2,000 samples). "
        f"{_seeds(entries)}"
    )
    if not all(set(e["mean"]["tasks"]) == set(tasks) for _, e in entries):
        note += " The mean is over all benchmarks of the table: a line that lacks one has none, nor costs."
    if published and any(d["published"] for d in data):
        note += f" Rows in italics are as published ({paper.SOURCE}), for BAGEL-7B and others: single runs, no intervals."
    return Table(
        f"{protocol}_{condition}", f"Protocol {protocol}: {where}", head, tuple(rows), tuple(data), note
    )


def _score(entry: Entry | None, usual: int) -> str:
    """A score, with its N where that is not the one in the head."""
    other = "" if entry is None or entry["n"] == usual else f" (N {entry['n']})"
    return percent(entry) + other


def _seeds(entries: Sequence[tuple[Line, Entry]]) -> str:
    """The seeds of every result: once where they are the same."""
    by_result = {id(line.result): (e["mean"]["set_seed"], e["mean"]["seed"]) for line, e in entries}
    labels = {id(line.result): line.number for line, _ in entries}
    if len(set(map(str, by_result.values()))) == 1:
        of_sets, of_sampling = next(iter(by_result.values()))
        return f"Seed of the sets: {_said(of_sets)}; of sampling: {of_sampling}."
    parts = [f"result {labels[r]}: {_said(of_sets)} and {own}" for r, (of_sets, own) in by_result.items()]
    return f"Seeds of the sets and of sampling: {'; '.join(parts)}."


def _said(seed: Any) -> str:
    return "none recorded" if seed is None else str(seed)


def _over(tasks: Sequence[str], lines: Sequence[Line]) -> str:
    """Says of which benchmarks a mean is, where some line has others as well."""
    left = [t for t in _tasks(lines) if t not in tasks and not get_task(t).real]
    if not left:
        return "mean over benchmarks"
    if not tasks:
        return "no mean, since there is no benchmark that every line has under all conditions"
    names = ", ".join(get_task(t).title for t in tasks)
    without = ", ".join(get_task(t).title for t in left)
    return f"mean over {names}, which every line has under all conditions shown (not {without})"


def _not_compared(places: Mapping[str, Sequence[str]]) -> str:
    """Says what could not be compared: benchmarks by place."""
    parts = [
        f"{place}: {', '.join(get_task(t).title for t in found)}" for place, found in places.items() if found
    ]
    if not parts:
        return ""
    return f" Not compared, as the two sets of answers have no question in common: {'; '.join(parts)}."


def _printed(score: float | None) -> str:
    return "–" if score is None else f"{score:.2f}"


def _tasks(lines: Sequence[Line]) -> list[str]:
    seen = {t: None for line in lines for t in line.tasks()}
    return sorted(seen, key=lambda t: _ORDER.index(t))


def also_table(lines: Sequence[Line]) -> Table | None:
    """The second ways of counting: pairs of MMVP, the mean over sources of CV-Bench, single rotations of MMBench."""
    titles = {
        "pairs": "pairs with both right",
        "source_mean": "mean over sources",
        "rotations": "single rotations",
    }
    rows, data = [], []
    for line in lines:
        for condition in LEVELS:
            for task, e in (line.entry("mixed", condition) or {}).items():
                for metric, found in e.get("also", {}).items():
                    name = f"{get_task(task).title}, {titles[metric]}, {condition}"
                    rows.append((name, line.label, str(found["n"]), percent(found)))
                    data.append(
                        {"label": line.label, "task": task, "metric": metric, "condition": condition, **found}
                    )
    head = ("counted otherwise", "system", "N", "right, % [95 %]")
    return Table("also", "Counted otherwise", head, tuple(rows), tuple(data)) if rows else None


def drop_table(lines: Sequence[Line], published: bool) -> Table | None:
    """What every system loses from clean to each severity, over all its benchmarks."""
    rows, data = [], []
    own = [x for x in lines if get_system(x.system).sees != "clean"]
    levels = [c for c in LEVELS[1:] if any(drop_pairs(x, x.tasks(), c) for x in own)]
    own = [x for x in own if any(drop_pairs(x, x.tasks(), c) for c in levels)]
    tasks = common_tasks(own, (CLEAN, *levels))
    for line in own:
        drops = {c: drop(line, tasks, c) for c in levels}
        rows.append(
            (line.label, percent(mean_score(line, tasks, CLEAN)), *(points(drops[c]) for c in levels))
        )
        data.append(
            {"label": line.label, "published": False}
            | {c: asdict(d) for c, d in drops.items() if d is not None}
        )
    if published and rows and "high" in levels:
        for model, (clean_score, hard) in paper.ROBUSTNESS.items():
            shown = [f"{clean_score - hard:+.2f}" if c == "high" else "–" for c in levels]
            rows.append((f"*{model}, published (six benchmarks)*", f"{clean_score:.2f}", *shown))
            data.append({"label": model, "published": True, "clean": clean_score, "high": clean_score - hard})
    head = ("system", "clean, % [95 %]", *(f"lost at {c}, points" for c in levels))
    places = {f"{x.label}, {c}": apart(drop_pairs(x, tasks, c)) for x in own for c in levels}
    over = _over(tasks, own)
    note = f"{over[:1].upper()}{over[1:]}; differences are paired question by question."
    note += _not_compared(places)
    return Table("drop", "Drop from clean", head, tuple(rows), tuple(data), note)


def corruption_tables(lines: Sequence[Line], published: bool) -> list[Table]:
    """Every system at high by corruption, and what it has above the base of the same result."""
    measured = [c for c in CORRUPTIONS if any(mean_score(x, x.tasks(), c) for x in lines)]
    shown = [
        x
        for x in lines
        if get_system(x.system).sees != "clean" and any(mean_score(x, x.tasks(), c) for c in measured)
    ]
    if not measured:
        return []
    tasks = common_tasks(shown, measured)
    bases = {id(x.result): x for x in shown if x.system == "base"}
    compared = [x for x in shown if x.system != "base" and id(x.result) in bases]
    categories = {d.name: d.category for d in list_degradations()}
    rows, data, gains, gain_data = [], [], [], []
    for name in sorted(measured, key=lambda c: CATEGORIES.index(categories[c])):
        scores = {x.label: mean_score(x, tasks, name) for x in shown}
        rows.append((name, categories[name], *(percent(s) for s in scores.values())))
        data.append(
            {"corruption": name, "category": categories[name]}
            | {k: asdict(s) for k, s in scores.items() if s}
        )
        above = {x.label: gain(x, bases[id(x.result)], tasks, name) for x in compared}
        was, became = paper.BY_CORRUPTION[name]
        gains.append(
            (name, *(points(g) for g in above.values()), *([f"{became - was:+.2f}"] if published else []))
        )
        gain_data.append(
            {"corruption": name}
            | {k: asdict(g) for k, g in above.items() if g}
            | ({"published": round(became - was, 2)} if published else {})
        )
    found = [
        Table(
            "corruptions",
            "By corruption, at high",
            ("corruption", "category", *(x.label for x in shown)),
            tuple(rows),
            tuple(data),
            f"Right answers in percent, {_over(tasks, shown)}.",
        )
    ]
    if compared:
        head = (
            "corruption",
            *(x.label for x in compared),
            *(["*CLEAR-RL over Bagel, published (six benchmarks)*"] if published else []),
        )
        places = {
            f"{x.label}, {c}": apart(gain_pairs(x, bases[id(x.result)], tasks, c))
            for x in compared
            for c in measured
        }
        note = (
            f"Points above the base of the same result, {_over(tasks, shown)}, paired question by question."
            f"{_not_compared(places)}"
        )
        found.append(
            Table("gains", "Gain by corruption, at high", head, tuple(gains), tuple(gain_data), note)
        )
    return found
