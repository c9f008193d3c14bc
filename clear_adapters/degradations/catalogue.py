"""What each corruption is called, where it comes from in a picture's life, and how often it is drawn.

Names, categories, weights and levels are those of MMD-Bench (arXiv 2604.04780 and its released generators). No formula
stands here and OpenCV is not imported, so that listing is cheap.
"""

from __future__ import annotations

import operator
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from clear_adapters.errors import ClearTypeError, ClearValueError, unknown_name

Category = Literal["capture", "transmission", "environment", "post_processing"]
Weights = Literal["benchmark", "training"]

CATEGORIES: tuple[Category, ...] = ("capture", "transmission", "environment", "post_processing")
"""The four stages of a picture's life in which corruptions happen."""

SEVERITIES: dict[str, float] = {"low": 0.23, "mid": 0.45, "high": 0.90}
"""The benchmark's three levels as intensities."""


@dataclass(frozen=True)
class Degradation:
    """Facts about one corruption.

    Attributes:
        name: its name in MMD-Bench.
        category: one of `CATEGORIES`.
        weight: how often the benchmark's mixed sets draw it; all sixteen sum to 400.
        training_weight: how often the training set draws it; all sixteen sum to 400.
        description: what it does to a picture, one line.
        random: whether the legacy formula draws random numbers at the benchmark's levels.
        monotone_in_legacy: whether the legacy formula damages a picture more at a higher level.
        fixed_differs: whether the `fixed` formula is another one than the legacy formula.
    """

    name: str
    category: Category
    weight: int
    training_weight: int
    description: str
    random: bool
    monotone_in_legacy: bool = True
    fixed_differs: bool = True


_DEGRADATIONS = (
    Degradation("lens_blur", "capture", 20, 30, "out of focus, slightly brighter", random=False),
    Degradation("lens_flare", "capture", 20, 15, "bright discs and streaks of stray light", random=True),
    Degradation("motion_blur", "capture", 20, 30, "smeared along one direction", random=True),
    Degradation("dirty_lens", "capture", 20, 15, "grey, washed out by dirt on the lens", random=True),
    Degradation("hsv_saturation", "capture", 20, 10, "colours faded", random=False, fixed_differs=False),
    Degradation(
        "jpeg_compression",
        "transmission",
        25,
        15,
        "blocky, compressed hard",
        random=False,
        fixed_differs=False,
    ),
    Degradation("block_exchange", "transmission", 25, 40, "square blocks in each other's place", random=True),
    Degradation(
        "mean_shift", "transmission", 25, 15, "detail flattened into patches of one colour", random=False
    ),
    Degradation("scan_lines", "transmission", 25, 30, "black horizontal bars", random=False),
    Degradation("dark_illumination", "environment", 25, 40, "too dark", random=False, fixed_differs=False),
    Degradation(
        "atmospheric_turbulence", "environment", 25, 30, "bent in waves, as through hot air", random=False
    ),
    Degradation("gaussian_noise", "environment", 25, 15, "grainy", random=True, fixed_differs=False),
    Degradation(
        "color_diffusion",
        "environment",
        25,
        15,
        "colours spread into their surroundings",
        random=False,
        monotone_in_legacy=False,
    ),
    Degradation(
        "sharpness_change",
        "post_processing",
        33,
        10,
        "sharpened until edges glare",
        random=False,
        monotone_in_legacy=False,
    ),
    Degradation(
        "graffiti", "post_processing", 33, 45, "coloured lines and a stamped word across it", random=True
    ),
    Degradation(
        "watermark_damage", "post_processing", 34, 45, "rectangles wiped out and painted over", random=True
    ),
)
_BY_NAME = {entry.name: entry for entry in _DEGRADATIONS}


def list_degradations() -> tuple[Degradation, ...]:
    """List the sixteen corruptions in the benchmark's order: by category, then as published."""
    return _DEGRADATIONS


def get_degradation(name: str) -> Degradation:
    """Look a corruption up by its name.

    Raises:
        UnknownNameError: no corruption has this name; close matches are in the message.
    """
    entry = _BY_NAME.get(name) if isinstance(name, str) else None
    if entry is None:
        raise unknown_name("degradation", name, _BY_NAME)
    return entry


def generator(seed: int, purpose: str) -> np.random.Generator:
    """Build the random generator that one seed gives one purpose.

    Purposes (the name of a corruption, or the choice among them) have independent streams, so what one draws never
    moves what another draws.

    Args:
        seed: any whole number from 0 on.
        purpose: what the numbers are for.

    Raises:
        ClearTypeError: `seed` is no whole number.
        ClearValueError: `seed` is negative.
    """
    if isinstance(seed, bool | np.bool_):
        raise ClearTypeError(f"seed={seed!r} is a truth value. Pass a whole number from 0 on.")
    try:
        number = operator.index(seed)
    except TypeError as error:
        raise ClearTypeError(
            f"seed={seed!r} is a {type(seed).__name__}, not a whole number, so it cannot be reproduced. Pass an int."
        ) from error
    if number < 0:
        raise ClearValueError(
            f"seed={number} is negative, which numpy's generators do not take. Pass 0 or more."
        )
    return np.random.Generator(
        np.random.PCG64(np.random.SeedSequence(number, spawn_key=(zlib.crc32(purpose.encode()),)))
    )


def draw(seed: int | np.random.Generator, weights: Weights = "benchmark") -> str:
    """Draw the name of one corruption.

    Args:
        seed: a whole number from 0 on, or a generator to draw from (which moves on by one number).
        weights: `"benchmark"` for the weights of the mixed sets, `"training"` for those of the training set.

    Returns:
        One of the sixteen names.

    Raises:
        ClearValueError: `weights` is neither of the two, or the seed is negative.
        ClearTypeError: `seed` is neither a whole number nor a generator.
    """
    if weights == "benchmark":
        shares = [entry.weight for entry in _DEGRADATIONS]
    elif weights == "training":
        shares = [entry.training_weight for entry in _DEGRADATIONS]
    else:
        raise ClearValueError(f"weights={weights!r} is unknown. Choose 'benchmark' or 'training'.")
    rng = seed if isinstance(seed, np.random.Generator) else generator(seed, "draw")
    bounds = np.cumsum(shares)
    return _DEGRADATIONS[int(np.searchsorted(bounds, rng.integers(bounds[-1]), side="right"))].name
