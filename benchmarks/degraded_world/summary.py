"""From a result file's cells to numbers with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from systems import BY_NAME, SYSTEMS

from clear_adapters.results import bootstrap_interval, mean_of_seeds_interval, proportion_interval


@dataclass(frozen=True)
class Value:
    """A number with its 95 % interval.

    Attributes:
        mean: the number.
        low: lower bound.
        high: upper bound.
        runs: training seeds in it.
    """

    mean: float
    low: float
    high: float
    runs: int = 1


def ones(bits: str) -> np.ndarray:
    """A string of 0 and 1 as numbers."""
    return np.array([float(b) for b in bits])


def runs_of(
    payload: Mapping[str, Any], system: str, condition: str, field: str = "correct"
) -> np.ndarray | None:
    """(runs, N): one row an adapter; None where nothing was measured."""
    cells = [c for c in payload["cells"].values() if c["system"] == system and c["condition"] == condition]
    rows = [ones(c[field]) for c in sorted(cells, key=lambda c: c["run"]) if field in c]
    return np.stack(rows) if rows else None


def share(rows: np.ndarray) -> Value:
    """Mean and interval: Wilson's of one run, else a bootstrap over questions and seeds."""
    if len(rows) == 1:
        low, high = proportion_interval(int(rows.sum()), rows.size)
    else:
        low, high = mean_of_seeds_interval(rows.tolist())
    return Value(float(rows.mean()), low, high, len(rows))


def accuracy(
    payload: Mapping[str, Any], system: str, condition: str, kind: str | None = None
) -> Value | None:
    """Share of right answers, of one kind of question or of all."""
    rows = runs_of(payload, system, condition)
    if rows is None:
        return None
    if kind is not None:
        rows = rows[:, np.array(payload["set"]["kinds"]) == kind]
    return share(rows) if rows.size else None


def restore_rate(payload: Mapping[str, Any], system: str, condition: str) -> Value | None:
    """How often a system restores."""
    rows = runs_of(payload, system, condition, "restored")
    return None if rows is None else share(rows)


def difference(payload: Mapping[str, Any], first: tuple[str, str], second: tuple[str, str]) -> Value | None:
    """First minus second, question by question: (system, condition) each.

    Trained systems are paired seed by seed; the base stands against each run of the other.
    """
    a, b = runs_of(payload, *first), runs_of(payload, *second)
    if a is None or b is None:
        return None
    trained = all(BY_NAME[system].family is not None for system, _ in (first, second))
    runs = (min if trained else max)(len(a), len(b))
    a, b = a[:runs], b[:runs]
    rows = np.broadcast_to(a, (runs, a.shape[1])) - np.broadcast_to(b, (runs, b.shape[1]))
    low, high = bootstrap_interval(rows[0].tolist()) if runs == 1 else mean_of_seeds_interval(rows.tolist())
    return Value(float(rows.mean()), low, high, runs)


def won_back(payload: Mapping[str, Any], system: str, samples: int = 2000) -> Value | None:
    """Which share of what the base loses from clean to high a system wins back at high."""
    found = [runs_of(payload, *c) for c in (("base", "clean"), ("base", "high"), (system, "high"))]
    if any(f is None for f in found):
        return None
    clean, poor, own = (f for f in found if f is not None)
    loss = float(clean.mean() - poor.mean())
    if loss <= 0:
        return None
    random = np.random.default_rng(0)
    drawn = []
    for _ in range(samples):
        at = random.integers(0, clean.shape[1], clean.shape[1])
        of = random.integers(0, len(own), len(own))
        lost = clean[0, at].mean() - poor[0, at].mean()
        if lost > 0:
            drawn.append((own[of][:, at].mean() - poor[0, at].mean()) / lost)
    low, high = (float(q) for q in np.quantile(drawn, [0.025, 0.975])) if drawn else (-1.0, 1.0)
    return Value(float(own.mean() - poor.mean()) / loss, low, high, len(own))


def restorations(
    payload: Mapping[str, Any], measure: str = "psnr"
) -> list[tuple[str, int, dict[str, float]]]:
    """By corruption, then over all: how many, and by way the median of a measure, where it was taken."""
    names = np.array(payload["set"]["degradations"])
    rows = []
    for name in (*sorted(set(names)), "all"):
        of = np.ones(len(names), bool) if name == "all" else names == name
        medians = {
            way: float(np.median(np.array(values[measure])[of]))
            for way, values in payload["restorations"]["ways"].items()
            if measure in values
        }
        rows.append((str(name), int(of.sum()), medians))
    return rows


def gain(payload: Mapping[str, Any], way: str, over: str = "input", measure: str = "psnr") -> Value:
    """Median over pictures of what one way has above another."""
    ways = payload["restorations"]["ways"]
    values = np.array(ways[way][measure]) - np.array(ways[over][measure])
    low, high = bootstrap_interval(values.tolist(), statistic=np.median)
    return Value(float(np.median(values)), low, high)


def signs(payload: Mapping[str, Any]) -> dict[str, Value]:
    """How often the plain base reads the sign, by picture: clean, high, or a system's restoration."""
    found = payload["restorations"]["signs"]
    return {n: share(ones(bits)[None]) for n, bits in found.items() if n != "asked" and bits}


def measured(payload: Mapping[str, Any]) -> list[str]:
    """Names of the systems with at least one cell, in the order of tables."""
    present = {c["system"] for c in payload["cells"].values()}
    return [s.name for s in SYSTEMS if s.name in present]
