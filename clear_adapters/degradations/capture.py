"""Corruptions of taking a picture: focus, flare, motion, dirt, colour.

Legacy formulas: MMD-Bench (arXiv 2604.04780; the corruptions come from Robust-R1). `i` is the intensity. The benchmark
works on BGR; these work on RGB.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from clear_adapters.degradations.primitives import (
    Formula,
    Pixels,
    lookup,
    scale_of,
    scaled,
    to_uint8,
    whole_numbers,
)

_FLARE_RGB = (235.0, 255.0, 255.0)
"""Colour of a flare: (255, 255, 235) in the benchmark's BGR."""


def lens_blur(image: Pixels, intensity: float, rng: np.random.Generator) -> Pixels:
    """Blur out of focus.

    `(1 - 0.7 i) x + 0.9 i (k * x)`, k a Gaussian of sigma 20 i on min(101, int(3 + 300 i)) | 1 pixels. The weights sum
    to 1 + 0.2 i, so the picture also brightens. The kernel is applied whole (`filter2D` with the outer product), as
    the published pictures were made; `GaussianBlur` rounds otherwise by up to two levels.
    """
    size = min(101, int(3 + intensity * 300)) | 1
    line = cv2.getGaussianKernel(size, intensity * 20)
    blurred = cv2.filter2D(image.astype(np.float32), -1, line @ line.T)
    return cv2.addWeighted(image, 1 - intensity * 0.7, blurred.astype(np.uint8), intensity * 0.9, 0).astype(
        np.uint8
    )


def lens_blur_fixed(image: Pixels, intensity: float, rng: np.random.Generator) -> Pixels:
    """Blur out of focus without brightening, in proportion to a small picture.

    `(1 - 0.9 i) x + 0.9 i (k * x)`, k a Gaussian of sigma 20 i scale, kept to 3 sigma. Legacy differs in its gain of
    1 + 0.2 i, which saturates bright pictures, and its sigma of up to 18 px, which leaves nothing of a thumbnail.
    """
    sigma = 20 * intensity * scale_of(image)
    size = 2 * math.ceil(3 * sigma) + 1
    values = image.astype(np.float32)
    blurred = cv2.GaussianBlur(values, (size, size), sigma)
    return to_uint8(cv2.addWeighted(values, 1 - 0.9 * intensity, blurred, 0.9 * intensity, 0))


def lens_flare(image: Pixels, intensity: float, rng: np.random.Generator) -> Pixels:
    """Add stray light.

    3 + int(30 i) bright filled discs of radius 10 to 50, each with a ray of length 30 to 150 and width 2, softened by
    a 3 x 3 Gaussian of sigma 20 i; `x + 0.9 i flare`.
    """
    return _flare(image, intensity, rng, 1.0)


def lens_flare_fixed(image: Pixels, intensity: float, rng: np.random.Generator) -> Pixels:
    """Add stray light as in legacy, with radii, lengths and widths in proportion to a small picture.

    Legacy's discs of up to 100 px across cover a small picture whole and only brighten it.
    """
    return _flare(image, intensity, rng, scale_of(image))


def _flare(image: Pixels, intensity: float, rng: np.random.Generator, scale: float) -> Pixels:
    height, width = image.shape[:2]
    light = np.zeros((height, width), np.float32)
    # columns: x, y, radius, ray length, and the ray's angle in 2^-30 turns
    ranges = ((0, width), (0, height), (10, 50), (30, 150), (0, 2**30 - 1))
    for x, y, radius, length, turn in whole_numbers(rng, 3 + int(30 * intensity), *ranges):
        angle = 2 * math.pi * turn / 2**30
        end = int(x + scale * length * math.cos(angle)), int(y + scale * length * math.sin(angle))
        cv2.circle(light, (x, y), scaled(radius, scale), 1.0, -1)
        cv2.line(light, (x, y), end, 1.0, scaled(2, scale))
    light = cv2.GaussianBlur(light, (3, 3), 20 * intensity) * np.float32(0.9 * intensity)
    flare = cv2.merge([light * np.float32(level) for level in _FLARE_RGB])
    return np.clip(image + flare, 0, 255).astype(np.uint8)


def motion_blur(image: Pixels, intensity: float, rng: np.random.Generator) -> Pixels:
    """Smear along a random direction.

    The kernel is the diagonal of a d x d matrix, d = max(5, int(30 i)), rotated by a uniform angle and normalised.
    """
    size = max(5, int(intensity * 30))
    turn = cv2.getRotationMatrix2D((size / 2, size / 2), rng.uniform(0, 360), 1)
    kernel = cv2.warpAffine(np.eye(size), turn, (size, size))
    return cv2.filter2D(image, -1, kernel / kernel.sum()).astype(np.uint8)


def motion_blur_fixed(image: Pixels, intensity: float, rng: np.random.Generator) -> Pixels:
    """Smear along a random direction over 30 i scale pixels.

    The kernel is an ideal line of that (fractional) length through the kernel's middle, spread over the pixels it
    touches. Legacy's kernel is at least 5 px long, so that low levels are alike, is turned about a point beside its
    middle, so that the picture also shifts, and is cut off at the corners.
    """
    length = 30 * intensity * scale_of(image)
    angle = rng.uniform(0, math.pi)
    reach = math.ceil(length / 2) + 1
    along = np.linspace(-length / 2, length / 2, 16 * reach + 1)
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    xs, ys = reach + along * math.cos(angle), reach + along * math.sin(angle)
    left, top = np.floor(xs).astype(int), np.floor(ys).astype(int)
    right_share, low_share = xs - left, ys - top
    np.add.at(kernel, (top, left), (1 - low_share) * (1 - right_share))
    np.add.at(kernel, (top, left + 1), (1 - low_share) * right_share)
    np.add.at(kernel, (top + 1, left), low_share * (1 - right_share))
    np.add.at(kernel, (top + 1, left + 1), low_share * right_share)
    return cv2.filter2D(image, -1, kernel / kernel.sum()).astype(np.uint8)


def dirty_lens(image: Pixels, intensity: float, rng: np.random.Generator) -> Pixels:
    """Veil behind dirt.

    A map of dirt: above i = 0.1 int(10 i) ellipses (half axes 150 to 300 and 100 to 200, value 50), then int(300 i)
    discs (radius 4 to 20, value 50 to 100), above i = 0.5 int(5 i) pairs of discs (radius 20 to 50, value 80; radius
    10 to 30, value 120), all blurred with sigma 30; `(1 - 0.7 i) x + 0.8 i dirt`.
    """
    return _dirt(image, intensity, rng, 1.0)


def dirty_lens_fixed(image: Pixels, intensity: float, rng: np.random.Generator) -> Pixels:
    """Veil behind dirt as in legacy, with axes, radii and blur in proportion to a small picture.

    Legacy's ellipses cover a small picture whole and its blur makes the dirt an even grey.
    """
    return _dirt(image, intensity, rng, scale_of(image))


def _dirt(image: Pixels, intensity: float, rng: np.random.Generator, scale: float) -> Pixels:
    height, width = image.shape[:2]
    dirt = np.zeros((height, width), np.float32)  # grey, so one channel does
    place = ((0, width), (0, height))
    if intensity > 0.1:
        ranges = (*place, (150, 300), (100, 200), (0, 180))
        for x, y, long, short, angle in whole_numbers(rng, int(10 * intensity), *ranges):
            cv2.ellipse(dirt, (x, y), (scaled(long, scale), scaled(short, scale)), angle, 0, 360, 50, -1)
    for x, y, radius, value in whole_numbers(rng, int(300 * intensity), *place, (4, 20), (50, 100)):
        cv2.circle(dirt, (x, y), scaled(radius, scale), value, -1)
    if intensity > 0.5:
        for x, y, outer, inner in whole_numbers(rng, int(5 * intensity), *place, (20, 50), (10, 30)):
            cv2.circle(dirt, (x, y), scaled(outer, scale), 80, -1)
            cv2.circle(dirt, (x, y), scaled(inner, scale), 120, -1)
    grey: NDArray[np.uint8] = cv2.GaussianBlur(dirt, (0, 0), 30 * scale).astype(np.uint8)
    veil = cv2.merge([grey, grey, grey])
    return cv2.addWeighted(image, 1 - 0.7 * intensity, veil, 0.8 * intensity, 0).astype(np.uint8)


def hsv_saturation(image: Pixels, intensity: float, rng: np.random.Generator) -> Pixels:
    """Fade the colours: saturation (HSV, 8 bit) times 1 - i. A grey picture stays as it is."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hsv[..., 1] = lookup(np.arange(256, dtype=np.float32) * np.float32(1 - intensity))[hsv[..., 1]]
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).astype(np.uint8)


LEGACY: dict[str, Formula] = {
    "lens_blur": lens_blur,
    "lens_flare": lens_flare,
    "motion_blur": motion_blur,
    "dirty_lens": dirty_lens,
    "hsv_saturation": hsv_saturation,
}
FIXED: dict[str, Formula] = {
    "lens_blur": lens_blur_fixed,
    "lens_flare": lens_flare_fixed,
    "motion_blur": motion_blur_fixed,
    "dirty_lens": dirty_lens_fixed,
}
