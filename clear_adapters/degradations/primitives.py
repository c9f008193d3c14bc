"""What the formulas share: types, random whole numbers, the scale of a small picture, rounding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Pixels: TypeAlias = NDArray[np.uint8]
"""(H, W, 3), uint8, RGB."""

Formula: TypeAlias = Callable[[Pixels, float, np.random.Generator], Pixels]
"""A corruption: picture, intensity in [0, 1], random numbers -> a new picture. Never writes to its input."""

REFERENCE_SIDE = 512
"""Shorter side in pixels from which on the benchmark's lengths are taken as they are by the fixed formulas."""

SMALLEST_SCALE = 1 / 8
"""Floor of the scale (reached at 64 px): below it blurs and shifts would be less than a pixel and change nothing."""


def scale_of(image: Pixels) -> float:
    """Return by what the fixed formulas multiply lengths in pixels.

    The benchmark's constants (discs of 50 px, blur of 18 px) are meant for photographs; on a thumbnail they leave
    nothing. `scale = clip(min(h, w) / 512, 1/8, 1)`: never above 1, so at 512 px and more the lengths are the
    benchmark's own.
    """
    return min(1.0, max(SMALLEST_SCALE, min(image.shape[:2]) / REFERENCE_SIDE))


def whole_numbers(rng: np.random.Generator, count: int, *ranges: tuple[int, int]) -> list[list[int]]:
    """Draw `count` rows of uniform whole numbers, column j within `ranges[j]`, both ends included.

    Rows are drawn in order: a smaller count gives the first rows of a larger one, so a higher severity adds things to
    the same scene.
    """
    low = np.array([bounds[0] for bounds in ranges])
    width = np.array([bounds[1] - bounds[0] + 1 for bounds in ranges])
    uniform = rng.random((max(0, count), len(ranges)))
    rows: list[list[int]] = (low + np.floor(uniform * width).astype(np.int64)).tolist()
    return rows


def scaled(length: float, scale: float) -> int:
    """Scale a length in pixels, to at least one pixel."""
    return max(1, math.floor(length * scale + 0.5))


def to_uint8(values: NDArray[np.integer | np.floating]) -> Pixels:
    """Round to the nearest grey level within 0 to 255."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def lookup(table: NDArray[np.floating]) -> Pixels:
    """Turn 256 results into a look-up table, cutting off fractions as the benchmark's casts do."""
    return np.clip(table, 0, 255).astype(np.uint8)
