"""Figures of result files: accuracy and restore rate against severity, gain by corruption. One colour a system.

What is published stands in grey with hollow marks, and is named so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clear_adapters.degradations import get_degradation
from clear_adapters.mmd_bench import published as paper
from clear_adapters.mmd_bench.compare import Line, common_tasks, gain
from clear_adapters.mmd_bench.systems import get_system
from clear_adapters.mmd_bench.tasks import CORRUPTIONS, LEVELS, TASKS, get_task

_GREY = "0.45"
_PUBLISHED: dict[str, Any] = {
    "color": _GREY,
    "linestyle": (0, (4, 2)),
    "marker": "D",
    "markerfacecolor": "white",
    "markersize": 5,
    "linewidth": 1.0,
    "zorder": 1,
}


def draw(lines: Sequence[Line], folder: Path, published: bool) -> list[Path]:
    """Writes every figure that the results give, as PNG and SVG.

    Args:
        lines: systems of the results.
        folder: where they go.
        published: lay the paper's numbers beside.

    Returns:
        The files.
    """
    import matplotlib

    settings = {
        "svg.hashsalt": "clear-adapters",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    written: list[Path] = []
    with matplotlib.rc_context(settings):
        for name, figure in (
            ("accuracy", _accuracy(lines, published)),
            ("restored", _restored(lines, published)),
            ("gains", _gains(lines, published)),
        ):
            if figure is None:
                continue
            for ending, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
                path = folder / f"{name}{ending}"
                figure.savefig(path, dpi=150, metadata=metadata)
                written.append(path)
    return written


def _figure(columns: int, rows: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _panels(lines: Sequence[Line]) -> list[str]:
    """Benchmarks with several severities, and `mean` where there is more than one."""
    seen = {t for line in lines for t in line.tasks() if not get_task(t).real}
    tasks = [t.name for t in TASKS if t.name in seen]
    return [*tasks, "mean"] if len(tasks) > 1 else tasks


def _entry(line: Line, condition: str, task: str, panels: Sequence[str]) -> dict[str, Any] | None:
    """An entry of a panel; a mean only where it is over all benchmarks that have panels, so that means can be compared."""
    found: dict[str, Any] | None = (line.entry("mixed", condition) or {}).get(task)
    if found is not None and task == "mean" and set(found["tasks"]) != set(panels) - {"mean"}:
        return None
    return found


def _accuracy(lines: Sequence[Line], published: bool) -> Any:
    levels = [
        c for c in LEVELS if any(x.entry("mixed", c) for x in lines if get_system(x.system).sees != "clean")
    ]
    panels = _panels(lines)
    if not panels or len(levels) < 2:
        return None
    curves = [x for x in lines if get_system(x.system).sees != "clean"]
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = _figure(columns, rows, (max(4.6, 3.1 * columns), 2.9 * rows + 0.9))
    for ax, task in zip(axes, panels, strict=False):
        for number, line in enumerate(lines):
            found = [(i, _entry(line, c, task, panels)) for i, c in enumerate(levels)]
            there = [(i, e) for i, e in found if e is not None]
            if not there:
                continue
            if get_system(line.system).sees == "clean":
                ax.axhline(
                    there[0][1]["value"], color=f"C{number}", linestyle=":", linewidth=1.2, label=line.label
                )
                continue
            shift = (curves.index(line) - (len(curves) - 1) / 2) * 0.12
            spread = [[e["value"] - e["low"] for _, e in there], [e["high"] - e["value"] for _, e in there]]
            ax.errorbar(
                [i + shift for i, _ in there],
                [e["value"] for _, e in there],
                yerr=spread,
                color=f"C{number}",
                marker="o",
                markersize=4,
                capsize=2.5,
                linewidth=1.3,
                label=line.label,
            )
        counts = {e["n"] for x in lines for c in levels if (e := _entry(x, c, task, panels)) is not None}
        if published and counts:
            _published_line(
                ax, levels, {c: paper.BY_SEVERITY.get(c, {}).get(task) for c in levels}, panels, task
            )
        title = "mean" if task == "mean" else get_task(task).title
        if counts:
            title += f" (N {' to '.join(f'{n:,}' for n in sorted({min(counts), max(counts)}))})"
        ax.set_title(title, fontsize=10)
        ax.set_xticks(range(len(levels)), levels)
        ax.set_xlim(-0.35, len(levels) - 0.65)
        ax.grid(axis="y", alpha=0.3)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    for ax in axes[::columns]:
        ax.set_ylabel("right answers, %")
    _legend(figure, axes[: len(panels)], lines)
    return figure


def _published_line(
    ax: Any, levels: Sequence[str], scores: dict[str, float | None], panels: Sequence[str], task: str
) -> None:
    """The paper's CLEAR-RL; its mean is of six benchmarks, and stands beside a mean of the same six alone."""
    if task == "mean" and {p for p in panels if p != "mean"} != set(paper.MAIN):
        return
    there = [(i, s) for i, c in enumerate(levels) if (s := scores[c]) is not None]
    if there:
        ax.plot(
            [i for i, _ in there],
            [s for _, s in there],
            label="CLEAR-RL on BAGEL-7B, published",
            **_PUBLISHED,
        )


def _restored(lines: Sequence[Line], published: bool) -> Any:
    """The restore rate of systems that decide for themselves."""
    deciding = [x for x in lines if not get_system(x.system).plain and get_system(x.system).restore == "auto"]
    levels = [c for c in LEVELS if any(x.entry("mixed", c) for x in deciding)]
    if not deciding or len(levels) < 2:
        return None
    panels = _panels(deciding)
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = _figure(columns, rows, (max(4.6, 3.1 * columns), 2.7 * rows + 0.8))
    for ax, task in zip(axes, panels, strict=False):
        for line in deciding:
            found = [(i, _entry(line, c, task, panels)) for i, c in enumerate(levels)]
            there = [
                (i, 100 * e["restored"]) for i, e in found if e is not None and e["restored"] is not None
            ]
            if not there:
                continue
            ax.plot(
                [i for i, _ in there],
                [r for _, r in there],
                color=f"C{list(lines).index(line)}",
                marker="o",
                markersize=4,
                linewidth=1.3,
                label=line.label,
            )
        if published and ax.lines:
            rates = {c: paper.RESTORED.get(task, {}).get(c) for c in levels}
            _published_line(ax, levels, rates, panels, task)
        ax.set_title("mean" if task == "mean" else get_task(task).title, fontsize=10)
        ax.set_xticks(range(len(levels)), levels)
        ax.set_xlim(-0.35, len(levels) - 0.65)
        ax.set_ylim(-4, 104)
        ax.grid(axis="y", alpha=0.3)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    for ax in axes[::columns]:
        ax.set_ylabel("restored, %")
    _legend(figure, axes[: len(panels)], lines)
    return figure


def _gains(lines: Sequence[Line], published: bool) -> Any:
    bases = {id(x.result): x for x in lines if x.system == "base"}
    compared = [
        x
        for x in lines
        if x.system != "base" and id(x.result) in bases and get_system(x.system).sees != "clean"
    ]
    measured_on = [*compared, *(bases[id(x.result)] for x in compared)]
    measured = [c for c in CORRUPTIONS if any(x.cell(t, c) for x in compared for t in x.tasks())]
    there = [x for x in measured_on if any(x.cell(t, c) for c in measured for t in x.tasks())]
    tasks = common_tasks(there, measured)
    found = {
        x.label: {c: g for c in measured if (g := gain(x, bases[id(x.result)], tasks, c)) is not None}
        for x in compared
    }
    shown = [c for c in CORRUPTIONS if any(c in own for own in found.values())]
    if not shown:
        return None
    figure, (ax,) = _figure(1, 1, (6.6, 0.9 + 0.34 * len(shown) + 0.25 * len(compared)))
    for line in compared:
        own = found[line.label]
        if not own:
            continue
        shift = (compared.index(line) - (len(compared) - 1) / 2) * 0.18
        places = [shown.index(c) + shift for c in own]
        spread = [[g.value - g.low for g in own.values()], [g.high - g.value for g in own.values()]]
        ax.errorbar(
            [g.value for g in own.values()],
            places,
            xerr=spread,
            fmt="o",
            color=f"C{list(lines).index(line)}",
            markersize=4,
            capsize=2.5,
            linewidth=1.2,
            label=line.label,
        )
    if published:
        gains = [paper.BY_CORRUPTION[c][1] - paper.BY_CORRUPTION[c][0] for c in shown]
        style = {k: v for k, v in _PUBLISHED.items() if k not in ("linestyle", "linewidth")}
        ax.plot(
            gains,
            range(len(shown)),
            linestyle="none",
            label="CLEAR-RL over Bagel, six benchmarks, published",
            **style,
        )
    ax.axvline(0, color="0.3", linewidth=0.8)
    categories = [get_degradation(c).category for c in shown]
    for place in range(1, len(shown)):
        if categories[place] != categories[place - 1]:
            ax.axhline(place - 0.5, color="0.8", linewidth=0.8, linestyle=(0, (2, 2)))
    ax.set_yticks(range(len(shown)), [c.replace("_", " ") for c in shown])
    ax.set_ylim(len(shown) - 0.4, -0.6)
    ax.set_xlabel("points above the base at high, 95 % intervals")
    ax.grid(axis="x", alpha=0.3)
    _legend(figure, [ax], lines)
    return figure


def _legend(figure: Any, axes: Sequence[Any], lines: Sequence[Line]) -> None:
    """One for all panels: systems in the order of tables, what is published last."""
    entries: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    order = [x.label for x in lines if x.label in entries]
    order += [label for label in entries if label not in order]
    figure.legend(
        [entries[label] for label in order],
        order,
        loc="outside lower center",
        ncols=min(2 if figure.get_figwidth() < 7 else 4, len(order)),
        frameon=False,
        fontsize=8,
    )
