"""Corruptions of editing a picture: sharpening, scribbles and stamps, removed marks.

Legacy formulas: MMD-Bench (arXiv 2604.04780; the corruptions come from Robust-R1). `i` is the intensity. The benchmark
works on BGR; these work on RGB.
"""

from __future__ import annotations

import cv2
import numpy as np

from clear_adapters.degradations.primitives import Formula, Pixels, lookup, scale_of, scaled, whole_numbers

_RED = (255, 0, 0)
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_WORDS = ("X", "FAKE", "COPY", "VOID", "COPYRIGHT")


def sharpness_change(image: Pixels, intensity: float, rng: np.random.Generator) -> Pixels:
    """Sharpen until it saturates.

    `0.7 x + 0.3 (k * x)`, k the cross (0 -1 0; -1 5 -1; 0 -1 0) times 80 i, clipped to 8 bit. The factor is 18 at the
    lowest level, so nearly every pixel of `k * x` is 0 or 255 at every level: damage does not grow with severity. At
    i = 0 a 3 x 3 Gaussian takes the cross's place.
    """
    if intensity > 0:
        filtered = cv2.filter2D(image, -1, _cross(1.0) * (intensity * 80))
    else:
        filtered = cv2.GaussianBlur(image, (3, 3), 0)
    return cv2.addWeighted(image, 0.7, filtered, 0.3, 0).astype(np.uint8)


def sharpness_change_fixed(image: Pixels, intensity: float, rng: np.random.Generator) -> Pixels:
    """Sharpen more the higher the level.

    `x - 2 i laplacian(x)`, clipped: a kernel that sums to 1. Legacy's sums to 80 i, so it saturates at once.
    """
    return cv2.filter2D(image, -1, _cross(2 * intensity)).astype(np.uint8)


def _cross(amount: float) -> np.ndarray:
    """Return the 3 x 3 kernel of the identity less `amount` times the Laplacian."""
    return np.array([[0, -amount, 0], [-amount, 1 + 4 * amount, -amount], [0, -amount, 0]])


def graffiti(image: Pixels, intensity: float, rng: np.random.Generator) -> Pixels:
    """Scribble over it.

    int(10 i) lines of random ends and colours, 1 to max(1, int(5 i)) px thick; above i = 0.55 a red word of the
    size max(0.5, 5 i) in OpenCV's plain font, left out where it is taller than the picture. How large the word comes
    out depends on OpenCV's font.
    """
    height, width = image.shape[:2]
    result = image.copy()
    _scribble(result, int(10 * intensity), max(1, int(5 * intensity)), rng)
    if intensity > 0.55:
        word, size = _word(rng), max(0.5, intensity * 5)
        thickness = max(1, int(size))
        (text_width, text_height), _ = cv2.getTextSize(word, _FONT, size, thickness)
        if height - 10 > text_height + 10:
            ranges = ((0, max(1, width - text_width - 10)), (text_height + 10, height - 10))
            x, y = whole_numbers(rng, 1, *ranges)[0]
            cv2.putText(result, word, (x, y), _FONT, size, _RED, thickness)
    return result


def graffiti_fixed(image: Pixels, intensity: float, rng: np.random.Generator) -> Pixels:
    """Scribble over it, in proportion to a small picture.

    max(1, int(10 i)) lines, thickness times scale; above i = 0.55 a red word of size 5 i scale, smaller where it would
    be wider than 0.9 or taller than 0.5 of the picture, always inside it. Legacy draws nothing below i = 0.1, leaves
    the word out of a low picture and lets a long one run out of a narrow one.
    """
    height, width = image.shape[:2]
    result = image.copy()
    scale = scale_of(image)
    _scribble(result, max(1, int(10 * intensity)), scaled(max(1, int(5 * intensity)), scale), rng)
    if intensity > 0.55:
        word = _word(rng)
        (unit_width, unit_height), _ = cv2.getTextSize(word, _FONT, 1.0, 1)
        size = min(intensity * 5 * scale, 0.9 * width / unit_width, 0.5 * height / unit_height)
        text_width, text_height = int(size * unit_width), int(size * unit_height)
        x, y = whole_numbers(rng, 1, (0, max(0, width - text_width)), (min(text_height, height), height))[0]
        cv2.putText(result, word, (x, y), _FONT, size, _RED, max(1, int(size)))
    return result


def _scribble(image: Pixels, lines: int, thickest: int, rng: np.random.Generator) -> None:
    height, width = image.shape[:2]
    across, down = (0, width - 1), (0, height - 1)
    levels = ((0, 255), (0, 255), (0, 255))
    for x_1, y_1, x_2, y_2, thickness, *color in whole_numbers(
        rng, lines, across, down, across, down, (1, thickest), *levels
    ):
        cv2.line(image, (x_1, y_1), (x_2, y_2), color, thickness)


def _word(rng: np.random.Generator) -> str:
    """Draw one of the five words or, as likely as each of them, a number from 1 to 100."""
    choice, number = whole_numbers(rng, 1, (0, len(_WORDS)), (1, 100))[0]
    return (*_WORDS, str(number))[choice]


def watermark_damage(image: Pixels, intensity: float, rng: np.random.Generator) -> Pixels:
    """Wipe out rectangles as if marks had been removed.

    int(1 + 15 i) rectangles of 50 to 200 by 20 to 80, filled from around (Telea's method, radius 3);
    `(1 - i) x + i filled`, above i = 0.5 the outline of their union times 0.8. The picture of a side below 50 (the
    benchmark's code fails) and one that they cover whole (nothing is left to fill from) gets rectangles as a picture
    of 200 px would, shrunk.
    """
    height, width = image.shape[:2]
    shortest, count = min(height, width), int(1 + intensity * 15)
    mask = np.zeros((height, width), np.uint8)
    if shortest >= 50:
        ranges = ((0, width - 50), (0, height - 50), (50, 200), (20, 80))
        _wipe(mask, whole_numbers(rng, count, *ranges))
    if shortest < 50 or mask.all():
        mask[:] = 0
        size = shortest / 200
        least = scaled(50, size)
        ranges = (
            (0, max(0, width - least)),
            (0, max(0, height - least)),
            (least, scaled(200, size)),
            (scaled(20, size), scaled(80, size)),
        )
        _wipe(mask, whole_numbers(rng, count, *ranges))
    return _filled(image, mask, intensity)


def watermark_damage_fixed(image: Pixels, intensity: float, rng: np.random.Generator) -> Pixels:
    """Wipe out rectangles as in legacy, in proportion to a small picture.

    Sides times scale and at most a third of the picture's. Legacy's rectangles cover a small picture whole, and then
    change nothing.
    """
    height, width = image.shape[:2]
    scale = scale_of(image)
    widest, tallest = max(1, width // 3), max(1, height // 3)
    narrow, wide = (min(scaled(side, scale), widest) for side in (50, 200))
    low, high = (min(scaled(side, scale), tallest) for side in (20, 80))
    ranges = ((0, width - narrow), (0, height - low), (narrow - 1, wide - 1), (low - 1, high - 1))
    mask = np.zeros((height, width), np.uint8)
    _wipe(mask, whole_numbers(rng, int(1 + intensity * 15), *ranges))
    return _filled(image, mask, intensity)


def _wipe(mask: np.ndarray, rectangles: list[list[int]]) -> None:
    """Set rectangles (x, y, width, height) in the mask; as in the benchmark both edges belong to them."""
    for x, y, across, down in rectangles:
        cv2.rectangle(mask, (x, y), (x + across, y + down), 255, -1)


def _filled(image: Pixels, mask: np.ndarray, intensity: float) -> Pixels:
    filled = cv2.inpaint(image, mask, 3, cv2.INPAINT_TELEA)
    result = cv2.addWeighted(image, 1 - intensity, filled, intensity, 0).astype(np.uint8)
    if intensity > 0.5:
        outline = cv2.Canny(mask, 50, 150) > 0
        result[outline] = lookup(np.arange(256) * 0.8)[result[outline]]
    return result


LEGACY: dict[str, Formula] = {
    "sharpness_change": sharpness_change,
    "graffiti": graffiti,
    "watermark_damage": watermark_damage,
}
FIXED: dict[str, Formula] = {
    "sharpness_change": sharpness_change_fixed,
    "graffiti": graffiti_fixed,
    "watermark_damage": watermark_damage_fixed,
}
