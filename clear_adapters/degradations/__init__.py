"""The sixteen image corruptions of MMD-Bench.

`degrade` corrupts a picture as a caller has it, `apply` an array, `draw` chooses a corruption with the benchmark's or
the training set's weights, `list_degradations` lists them. The formulas live in one file a category; OpenCV is
imported only when one of them runs.
"""

from __future__ import annotations

from clear_adapters.degradations.catalogue import (
    CATEGORIES,
    SEVERITIES,
    Degradation,
    draw,
    get_degradation,
    list_degradations,
)
from clear_adapters.degradations.corruption import apply, degrade, intensity_of

__all__ = [
    "CATEGORIES",
    "SEVERITIES",
    "Degradation",
    "apply",
    "degrade",
    "draw",
    "get_degradation",
    "intensity_of",
    "list_degradations",
]
