"""Corruptions of the surroundings: darkness, hot air, sensor noise, spreading colour.

Legacy formulas: MMD-Bench (arXiv 2604.04780; the corruptions come from Robust-R1). `i` is the intensity.
"""

from __future__ import annotations

import cv2
import numpy as np

from clear_adapters.degradations.primitives import Formula, Pixels, lookup, scale_of, to_uint8, whole_numbers


def dark_illumination(image: Pixels, intensity: float, rng: np.random.Generator) -> Pixels:
    """Darken: `(1 - i^2) x`, rounded down."""
    return lookup(np.arange(256) * (1 - intensity**2))[image]


def atmospheric_turbulence(image: Pixels, intensity: float, rng: np.random.Generator) -> Pixels:
    """Bend in waves: the pixel at (x, y) is taken from (x + s, y + 0.7 s), s = 40 i sin(y / 30 + 5 i), bilinear."""
    rows = np.arange(image.shape[0])
    return _bent(image, intensity * 40 * np.sin(rows / 30 + intensity * 5))


def atmospheric_turbulence_fixed(image: Pixels, intensity: float, rng: np.random.Generator) -> Pixels:
    """Bend in waves of a phase that severity does not move, in proportion to a small picture.

    s = 40 i scale sin(y / (30 scale)). In legacy the phase moves with i, so a part of the picture that one level bends
    most may lie still at the next, and shifts of up to 36 px push a small picture out of its frame.
    """
    scale = scale_of(image)
    rows = (
        np.arange(image.shape[0]) + 0.5
    )  # from the middle of the row, so that a picture of one row moves as well
    return _bent(image, intensity * 40 * scale * np.sin(rows / (30 * scale)))


def _bent(image: Pixels, shift: np.ndarray) -> Pixels:
    height, width = image.shape[:2]
    xs = np.clip(np.arange(width) + shift[:, None], 0, width - 1).astype(np.float32)
    ys = np.clip(np.arange(height) + 0.7 * shift, 0, height - 1).astype(np.float32)
    return cv2.remap(image, xs, np.repeat(ys[:, None], width, axis=1), cv2.INTER_LINEAR).astype(np.uint8)


def gaussian_noise(image: Pixels, intensity: float, rng: np.random.Generator) -> Pixels:
    """Add independent normal noise of standard deviation 75 i to every channel; clipped, rounded down."""
    values = rng.standard_normal(image.shape, dtype=np.float32)
    values *= np.float32(intensity * 75)
    values += image
    return np.clip(values, 0, 255, out=values).astype(np.uint8)


def color_diffusion(image: Pixels, intensity: float, rng: np.random.Generator) -> Pixels:
    """Spread colour, and darken.

    `max(0.1, 1 - 0.9 i) x + min(0.9, 0.9 i) (k * x)`, k a Gaussian of sigma 50 i on 3 + 2 int(20 i) pixels times i^2.
    Above i = 0.9 (never at the benchmark's levels) int(100 i) grey discs of radius 5 to 19 lie on the blurred picture.
    Because of the factor i^2 the middle level is the darkest: damage does not grow with severity.
    """
    line = cv2.getGaussianKernel(3 + 2 * int(intensity * 20), intensity * 50)
    spread = cv2.filter2D(image.astype(np.float32), -1, line @ line.T * intensity**2)
    if intensity > 0.9:
        height, width = image.shape[:2]
        ranges = ((0, width - 1), (0, height - 1), (5, 19), (0, 254))
        for x, y, radius, grey in whole_numbers(rng, int(100 * intensity), *ranges):
            cv2.circle(spread, (x, y), radius, (grey, grey, grey), -1)
    own, others = max(0.1, 1 - intensity * 0.9), min(0.9, intensity * 0.9)
    return cv2.addWeighted(image, own, spread.astype(np.uint8), others, 0).astype(np.uint8)


def color_diffusion_fixed(image: Pixels, intensity: float, rng: np.random.Generator) -> Pixels:
    """Spread colour without losing light, in proportion to a small picture.

    `(1 - 0.9 i) x + 0.9 i (k * x)`, k even over 2 r + 1 pixels, r = 20 i scale (the outermost pixels count by the
    fraction of r). Legacy's kernel is nearly even as well but sums to i^2, which darkens, most of all at the middle
    level; its discs appear all at once above i = 0.9.
    """
    radius = 20 * intensity * scale_of(image)
    whole = int(radius)
    line = np.concatenate([[radius - whole], np.ones(2 * whole + 1), [radius - whole]])
    line /= line.sum()
    values = image.astype(np.float32)
    spread = cv2.sepFilter2D(values, -1, line, line)
    return to_uint8(cv2.addWeighted(values, 1 - 0.9 * intensity, spread, 0.9 * intensity, 0))


LEGACY: dict[str, Formula] = {
    "dark_illumination": dark_illumination,
    "atmospheric_turbulence": atmospheric_turbulence,
    "gaussian_noise": gaussian_noise,
    "color_diffusion": color_diffusion,
}
FIXED: dict[str, Formula] = {
    "atmospheric_turbulence": atmospheric_turbulence_fixed,
    "color_diffusion": color_diffusion_fixed,
}
