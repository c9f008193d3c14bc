"""One picture, one corruption: checks what is asked, finds the formula, applies it."""

from __future__ import annotations

import importlib
import math
from numbers import Real
from typing import TYPE_CHECKING, Literal

import numpy as np

from clear_adapters.degradations.catalogue import SEVERITIES, draw, generator, get_degradation
from clear_adapters.errors import ClearTypeError, ClearValueError, ImageError

if TYPE_CHECKING:
    from PIL import Image

    from clear_adapters.degradations.primitives import Formula, Pixels
    from clear_adapters.images import ImageLike

Formulas = Literal["legacy", "fixed"]
Severity = Literal["low", "mid", "high"] | float

_DRAWS = 8
"""How often a random corruption is drawn at most before an unchanged picture is accepted."""


def degrade(
    image: ImageLike,
    name: str | None = None,
    *,
    severity: Severity = "mid",
    seed: int = 0,
    formulas: Formulas = "legacy",
) -> Image.Image:
    """Corrupt a picture as MMD-Bench does, at the picture's own resolution.

    Everything random comes from `seed` alone: the same call gives the same picture in every process, for any number
    of threads. The draws of one corruption do not depend on the others, and `name=None` gives what naming the drawn
    one (`draw(seed)`) gives. Severities share the seed's draws where they can, so low, mid and high of one seed are
    one scene growing worse; the published sets drew each level anew, for which three seeds serve.

    Args:
        image: a PIL image of any mode, a path, the bytes of an image file, or a uint8 array (H, W, 3) in RGB.
        name: one of the names of `list_degradations`; None draws one with the benchmark's weights.
        severity: `"low"`, `"mid"`, `"high"` (0.23, 0.45, 0.90), or an intensity from 0 to 1.
        seed: a whole number from 0 on.
        formulas: `"legacy"` for the formulas of the benchmark, `"fixed"` for this project's corrections: damage that
            grows with severity for every corruption, and lengths that shrink with the picture (below 512 px).

    Returns:
        A new RGB image of the same size.

    Raises:
        UnknownNameError: no corruption has this name.
        ClearValueError: severity, seed or formulas is out of its range.
        ImageError: the image cannot be read.
        ClearTypeError: a value of a type that cannot work.
    """
    from PIL import Image

    from clear_adapters.images import load_image

    intensity = intensity_of(severity)
    if name is None:
        name = draw(seed)
    get_degradation(name)
    pixels = np.asarray(load_image(image))
    return Image.fromarray(apply(name, pixels, intensity, generator(seed, name), formulas))


def apply(
    name: str,
    image: Pixels,
    intensity: float,
    rng: np.random.Generator,
    formulas: Formulas = "legacy",
) -> Pixels:
    """Corrupt an array. The core of `degrade`, for loops that bring their own generator.

    A random draw that leaves the picture exactly as it was (blocks swapped back, a rectangle over everything) is drawn
    again, up to eight times in all. `fixed` at intensity 0 is the picture itself.

    Args:
        name: one of the sixteen names.
        image: (H, W, 3), uint8, RGB; not written to.
        intensity: from 0 to 1.
        rng: where random numbers are taken from.
        formulas: `"legacy"` or `"fixed"`.

    Returns:
        A new array (H, W, 3), uint8, RGB.

    Raises:
        UnknownNameError: no corruption has this name.
        ClearValueError: the intensity is outside [0, 1] or no number, or `formulas` is unknown.
        ImageError: the array has another shape or type.
    """
    entry = get_degradation(name)
    if formulas not in ("legacy", "fixed"):
        raise ClearValueError(
            f"formulas={formulas!r} is unknown. Choose 'legacy' (as the benchmark) or 'fixed'."
        )
    intensity = intensity_of(intensity)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        given = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ImageError(
            f"Expected a uint8 array of shape (H, W, 3), got {given}. `degrade` takes any picture."
        )
    if 0 in image.shape:
        raise ImageError(f"The array of shape {image.shape} holds no pixel, so nothing can be corrupted.")
    if formulas == "fixed" and intensity == 0:
        return image.copy()
    formula = _formula(name, entry.category, formulas)
    pixels = np.ascontiguousarray(image)
    for _ in range(_DRAWS if entry.random and intensity > 0 else 1):
        result = formula(pixels, intensity, rng)
        if not np.array_equal(result, pixels):
            break
    return result


def intensity_of(severity: Severity) -> float:
    """Turn a severity into an intensity.

    Args:
        severity: `"low"`, `"mid"`, `"high"`, or a number from 0 to 1.

    Returns:
        A number from 0 to 1.

    Raises:
        ClearValueError: an unknown word, or a number outside [0, 1] or NaN.
        ClearTypeError: neither a word nor a number.
    """
    if isinstance(severity, str):
        if severity not in SEVERITIES:
            words = ", ".join(repr(word) for word in SEVERITIES)
            raise ClearValueError(
                f"severity={severity!r} is unknown. Choose one of {words}, or a number from 0 to 1."
            )
        return SEVERITIES[severity]
    if isinstance(severity, bool | np.bool_) or not isinstance(severity, Real):
        raise ClearTypeError(
            f"severity={severity!r} is a {type(severity).__name__}. Pass 'low', 'mid', 'high' or a number from 0 to 1."
        )
    number = float(severity)
    if math.isnan(number) or not 0.0 <= number <= 1.0:
        raise ClearValueError(f"severity={number} is outside 0 to 1, where the formulas mean something.")
    return number


def _formula(name: str, category: str, formulas: Formulas) -> Formula:
    """Find the function of one corruption; its module, and with it OpenCV, is imported now."""
    module = importlib.import_module(f"clear_adapters.degradations.{category}")
    legacy: dict[str, Formula] = module.LEGACY
    fixed: dict[str, Formula] = module.FIXED
    return fixed.get(name, legacy[name]) if formulas == "fixed" else legacy[name]
