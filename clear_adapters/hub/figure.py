"""The figure of a card: right answers and restore rate by how much pictures are corrupted."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from clear_adapters.errors import BrokenEntryError
from clear_adapters.hub.facts import CardFacts
from clear_adapters.hub.scores import CONDITIONS, COUNTED, Interval, Score

FACTS_KEY = "Facts"
"""Key of the text in the picture's file that names the scores it was drawn of."""


def draw_figure(facts: CardFacts) -> bytes | None:
    """A PNG of the first scores; None without scores.

    Raises:
        BrokenEntryError: matplotlib is not installed.
    """
    if not facts.scores:
        return None
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BrokenEntryError(
            "the card's figure needs matplotlib, which is not installed: pip install matplotlib"
        ) from error
    scores = facts.scores[0].scores
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    measured = list(dict.fromkeys(s.condition for s in scores if s.own))
    conditions = [c for c in CONDITIONS if c in measured] or measured
    base = [s for s in scores if s.system == "the base alone" and s.condition in conditions]
    own = [s for s in scores if s.own and s.condition in conditions]
    for shift, (label, shown, colour) in enumerate(
        (("base alone", base, "#7f7f7f"), ("with this adapter", own, "#0072b2"))
    ):
        _line(left, shown, [s.right for s in shown], conditions, 0.06 * shift, colour, label)
    rates = [s for s in own if s.restored is not None]
    _line(right, rates, [s.restored for s in rates if s.restored], conditions, 0, "#0072b2", "restored")
    left.set_title(f"{COUNTED[facts.scores[0].metric]}, %", fontsize=9)
    left.legend(fontsize=8, frameon=False)
    right.set_title("pictures restored, %", fontsize=9)
    right.set_ylim(-4, 104)
    for axes in (left, right):
        axes.set_xticks(range(len(conditions)), conditions)
        axes.grid(axis="y", alpha=0.3)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None, FACTS_KEY: scores_hash(facts)})
    return out.getvalue()


def scores_hash(facts: CardFacts) -> str:
    """A short hash of the scores that a figure shows."""
    told = json.dumps([asdict(s) for s in facts.scores], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _line(
    axes: Any,
    shown: Sequence[Score],
    values: Sequence[Interval],
    conditions: Sequence[str],
    shift: float,
    colour: str,
    label: str,
) -> None:
    axes.errorbar(
        [conditions.index(s.condition) + shift for s in shown],
        [100 * v.value for v in values],
        yerr=[[100 * (v.value - v.low) for v in values], [100 * (v.high - v.value) for v in values]],
        fmt="o-",
        capsize=3,
        markersize=4,
        linewidth=1.2,
        color=colour,
        label=label,
    )
